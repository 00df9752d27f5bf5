"""Weights that descend on the validation objective while the model trains: one run, no inner problem solved to the end.

    theta = log w,    dF/dtheta_i = - w_i <g_i, q>,    q ~ H^-1 v

with `g_i` the gradient of what the weight multiplies, `v` that of the validation objective and `H` the Hessian of the
training objective. The three methods differ in `q` alone:

    one_step   q = a v                                   the effect of the last optimiser step (T1-T2)
    neumann    q = a sum_{k<=K} (1 - a H)^k v            the effect of the last K + 1 steps, a geometric series for H^-1
    cg         H q = v by conjugate gradients            the effect of training to the end

Only the sign and the size relative to the past matter to the step, which is Adam's on `theta`. Sources: Luketina et al.,
arXiv:1511.06727 (one step); Lorraine, Vicol and Duvenaud, arXiv:1911.02590 (Neumann series); Pedregosa, arXiv:1602.02355
(conjugate gradients).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.weights.descent import Descent
from poise.weights.hyperparameter import Hyperparameter, check_names

if TYPE_CHECKING:
    from poise.problem import Problem, Signals

METHODS = ("one_step", "neumann", "cg")
Vector = dict[str, Tensor]


class OnlineBilevel(nn.Module):
    """Move weights down the gradient of the validation objective, every few steps of the one run.

    Args:
        method: "one_step", "neumann" or "cg".
        every: optimiser steps between two updates of the weights, at least 1; None for 5 (one_step) or 20.
        warmup: share of the run before the first update, in [0, 1).
        terms: `K` of the Neumann series, or iterations of conjugate gradients.
        scale: `a`, the step that the series stands for; None for the model's learning rate.
        damping: added to the Hessian by conjugate gradients, >= 0: a network's Hessian is not positive definite.
        hypers: hyperparameters that terms read (`label_smoothing(epsilon=...)`, `Hyperparameter(...) * l2`), moved likewise through their
            unconstrained variables: the same hypergradient, with `g_i` the derivative of the training gradient in the variable.
        lr, decay: of the weights; see `Descent`.
        upper: the validation objective, as a formula; None for the formula's terms on data at fixed weights.
        valid_batch: validation rows of one update; None for all.

    Raises:
        InputError: an argument out of range; a weight on which the training objective does not depend (its name is said).

    >>> OnlineBilevel("neumann", every=10).needs == {"gradients", "validation"}
    True
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "validation"})
    balances: ClassVar[bool] = False

    def __init__(
        self,
        method: str = "one_step",
        *,
        every: int | None = None,
        warmup: float = 0.1,
        hypers: Iterable[Hyperparameter] = (),
        terms: int = 3,
        scale: float | None = None,
        damping: float = 1e-2,
        lr: float | None = None,
        decay: bool = True,
        upper: str | None = None,
        valid_batch: int | None = 512,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise InputError(f"bilevel: method is one of {', '.join(METHODS)}, and it is {method!r}.")
        if (every is not None and every < 1) or terms < 1 or not 0 <= warmup < 1 or damping < 0:
            raise InputError(
                "bilevel: every and terms must be at least 1, warmup in [0, 1) and damping >= 0; they are "
                f"{every}, {terms}, {warmup} and {damping}."
            )
        if scale is not None and not scale > 0:
            raise InputError(f"bilevel: scale must be positive, and it is {scale}.")
        self.method, self.terms, self.warmup = method, terms, warmup
        self.every = every or (5 if method == "one_step" else 20)
        self.scale, self.damping, self.upper, self.valid_batch = scale, damping, upper, valid_batch
        self.descent = Descent(lr, decay)
        given = tuple(hypers)
        self.hypers = nn.ModuleList(check_names(given, "OnlineBilevel") if given else ())
        self.tunes_hyperparameters = bool(given)
        self.names: tuple[str, ...] = ()
        self._said: dict[str, float] = {}

    @property
    def tuned(self) -> tuple[Hyperparameter, ...]:
        """The hyperparameters."""
        return tuple(hyper for hyper in self.hypers if isinstance(hyper, Hyperparameter))

    def bind(self, starts: Mapping[str, float], ranges: Mapping[str, tuple[float, float]]) -> None:
        """Take the weights' first values and their ranges.

        Raises:
            InputError: a hyperparameter is discrete, so that nothing is differentiable in it.
        """
        for hyper in self.tuned:
            if hyper.discrete:
                raise InputError(
                    f"The hyperparameter {hyper.name!r} is discrete, and nothing is differentiable in it: use SelfTuning, or a search."
                )
        self.names = tuple(starts)
        bounds = [ranges.get(name, (1e-8, 1e8)) for name in starts]
        raws = [float(hyper.raw) for hyper in self.tuned]
        start = torch.tensor([*(math.log(w) for w in starts.values()), *raws], dtype=torch.float64)
        # At +-8 a sigmoid is within a thousandth of its ends.
        low = torch.tensor([*(math.log(b[0]) for b in bounds), *(min(-8.0, r) for r in raws)], dtype=torch.float64)
        high = torch.tensor([*(math.log(b[1]) for b in bounds), *(max(8.0, r) for r in raws)], dtype=torch.float64)
        self.descent.bind(start, low, high)

    def weights(self, signals: Signals) -> Mapping[str, float | Tensor]:
        """Return the weights by name, moved where an update is due."""
        first = math.ceil(self.warmup * signals.steps)
        if signals.step >= first and (signals.step - first) % self.every == 0:
            self.descent.step(self._hypergradient(signals), max(1, (signals.steps - first) // self.every))
            for hyper, raw in zip(self.tuned, self.descent.theta[len(self.names) :], strict=True):
                hyper.move(raw)
        return dict(zip(self.names, self._weights.tolist(), strict=True))

    @property
    def _weights(self) -> Tensor:
        return self.descent.theta[: len(self.names)].exp()

    def advance(self, signals: Signals) -> None:
        """Nothing moves after the update."""

    def report(self) -> Mapping[str, float]:
        """The last hypergradient by weight, the validation and the training objective, and the residual of conjugate gradients."""
        return {**self._said, **{f"hyperparameter/{hyper.name}": float(hyper) for hyper in self.tuned}}

    def _hypergradient(self, signals: Signals) -> Tensor:
        """Return dF/dtheta, f64 [m]."""
        validation = signals.validation
        assert validation is not None
        towards = validation.gradient()
        response, residual = self._response(signals.problem, towards, self.scale or signals.lr)
        found = torch.cat([self._of_weights(signals, response), self._of_hypers(signals.problem, response)])
        signals.problem.reports()
        names = (*self.names, *(hyper.name for hyper in self.tuned))
        self._said = {
            "validation_objective": float(validation.latest_value),
            "training_objective": float(signals.problem.step.value),
            **{f"hypergradient/{n}": g for n, g in zip(names, found.tolist(), strict=True)},
        }
        if residual is not None:
            self._said["hypergradient_error"] = residual
        return found

    def _of_weights(self, signals: Signals, response: Vector) -> Tensor:
        if not self.names:
            return torch.zeros(0, dtype=torch.float64)
        table = signals.gradients
        idle = [name for name, size in zip(self.names, table.norms.tolist(), strict=True) if size == 0]
        if idle and not int(self.descent.count):
            raise InputError(
                f"The hypergradient of {', '.join(map(repr, idle))} is identically zero: what the weight multiplies has no gradient on "
                "the model's parameters. Fix the weight, or take the term out."
            )
        return -self._weights * table.against(response)

    def _of_hypers(self, problem: Problem, response: Vector) -> Tensor:
        """Return `-d<training gradient, q>/d raw`, f64 [hypers]."""
        if not self.tuned:
            return torch.zeros(0, dtype=torch.float64)
        raws = [hyper.raw.detach().clone().requires_grad_() for hyper in self.tuned]
        try:
            for hyper, raw in zip(self.tuned, raws, strict=True):
                hyper.place(raw)
            point = {n: p.detach().requires_grad_() for n, p in problem.parameters.items() if n in response}
            with torch.enable_grad():
                gradient = problem.fresh().gradient(at=point, create_graph=True)
                along = [(g * response[n]).sum() for n, g in gradient.items() if n in response and g.requires_grad]
                total = torch.stack(along).sum() if along else raws[0].new_zeros(())
            found = torch.autograd.grad(total, raws, allow_unused=True) if total.requires_grad else [None] * len(raws)
        finally:
            for hyper in self.tuned:
                hyper.place(None)
        idle = [hyper.name for hyper, g in zip(self.tuned, found, strict=True) if g is None]
        if idle:
            raise InputError(
                f"The hypergradient of {', '.join(map(repr, idle))} is identically zero: the training gradient does not depend on it. "
                "Let a term read it; noise and masks are tuned by SelfTuning."
            )
        return -torch.stack([g.double().cpu() for g in found if g is not None])

    def _response(self, problem: Problem, towards: Vector, scale: float) -> tuple[Vector, float | None]:
        """Return `q`, and the relative residual `|H q - v|/|v|` where it solves for it."""
        if self.method == "one_step":
            return {name: scale * v for name, v in towards.items()}, None
        hessian = problem.hessian()
        if self.method == "neumann":
            return _neumann(hessian, towards, scale, self.terms), None
        return _conjugate_gradients(hessian, towards, self.damping, self.terms)


def _neumann(hessian: Any, towards: Vector, scale: float, terms: int) -> Vector:
    """`a sum_{k<=K} (1 - a H)^k v`."""
    power = dict(towards)
    total = dict(towards)
    for _ in range(terms):
        curved = hessian(power)
        power = {name: p - scale * curved[name] for name, p in power.items()}
        total = {name: t + power[name] for name, t in total.items()}
    return {name: scale * t for name, t in total.items()}


def _conjugate_gradients(hessian: Any, towards: Vector, damping: float, iterations: int) -> tuple[Vector, float]:
    """Solve `(H + damping) q = v`; stop at a direction of negative curvature, where the answer so far is still one of descent."""
    q = {name: torch.zeros_like(v) for name, v in towards.items()}
    r = dict(towards)
    p = dict(r)
    size = before = _dot(r, r)
    for _ in range(iterations):
        if before <= 0:
            break
        curved = {name: c + damping * p[name] for name, c in hessian(p).items() if name in p}
        along = _dot(p, curved)
        if along <= 0:
            if before == size:  # at the very first direction: the gradient itself, as one step would take it
                q = dict(towards)
            break
        length = before / along
        q = {name: x + length * p[name] for name, x in q.items()}
        r = {name: x - length * curved[name] for name, x in r.items()}
        after = _dot(r, r)
        p = {name: x + (after / before) * p[name] for name, x in r.items()}
        before = after
    return q, math.sqrt(before / size) if size > 0 else 0.0


def _dot(left: Vector, right: Vector) -> float:
    return float(sum((float((v * right[name]).sum()) for name, v in left.items()), start=0.0))


def one_step(**options: Any) -> OnlineBilevel:
    """Move weights down the validation objective as the last optimiser step saw it: the cheapest, and the default of `bilevel`."""
    return OnlineBilevel("one_step", **options)


def neumann(**options: Any) -> OnlineBilevel:
    """Move weights down the validation objective through the last few steps: a truncated series for the inverse Hessian."""
    return OnlineBilevel("neumann", **options)


def cg(**options: Any) -> OnlineBilevel:
    """Move weights down the validation objective as if training had ended: conjugate gradients for the inverse Hessian."""
    return OnlineBilevel("cg", **options)
