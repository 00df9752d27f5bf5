"""Many data sources in one run, each with the share that its samples have: n_t / sum n.

    objective = sum_t (n_t / N) * term.on(t)            one weight a source: SourceWeights.objective(term)
    batch of source t ~ n_t of every step               one rate a source: SourceWeights.streams(data, batch_size)
    poise.fit(..., policy=weights)                      the same weights on an objective of `auto`, changed between rounds of a search
    poise.fit(..., policy=SourceRelevance(...))         weights that follow the gradients of the target while the run goes on

Weights and rates are two ways to the same expected gradient. With rates every sample of a step counts the same, which has the
smaller variance; weights leave batches alone, and let a source of share 0 rise again.

Source: arXiv:2306.02556, where a source with n_t of N samples enters the pooled loss with n_t/N.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.objective import Objective, Summand, Term
from poise.streams import Stream
from poise.weights.allocation import largest_remainder
from poise.weights.auto import Auto

if TYPE_CHECKING:
    from poise.problem import Signals

__all__ = ["SourceRelevance", "SourceWeights"]


class SourceWeights(nn.Module):
    """Shares of sources, from samples or from relevance.

        weight_t = n_t / sum n

    Args:
        names: of the sources: the streams' names, and so the labels of their terms.
        counts: n_t, not negative, not all 0: samples as `LassoRelevance.allocate` gives them, or |nu_t|. Even by default.

    Buffers: `shares`, float64 (T,), of sum 1.

    Raises:
        InputError: names that repeat, or counts that are no shares.

    >>> weights = SourceWeights(["news", "web"], torch.tensor([300, 100]))
    >>> weights.weights()
    {'news': 0.75, 'web': 0.25}
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    shares: Tensor

    def __init__(self, names: Sequence[str], counts: Tensor | Sequence[float] | None = None) -> None:
        super().__init__()
        self.names = tuple(names)
        if len(set(self.names)) != len(self.names) or not self.names:
            raise InputError(
                f"SourceWeights: the names of the sources must differ; they are {', '.join(self.names) or 'none'}."
            )
        self.register_buffer("shares", torch.ones(len(self.names), dtype=torch.float64) / len(self.names))
        if counts is not None:
            self.update(counts)

    def update(self, counts: Tensor | Sequence[float]) -> None:
        """Take new counts, as after another epoch of a search."""
        n = torch.as_tensor(counts).detach().to(self.shares)
        if (
            n.shape != self.shares.shape
            or not bool(torch.isfinite(n).all())
            or bool((n < 0).any())
            or not bool(n.any())
        ):
            raise InputError(
                f"SourceWeights: one count a source, finite, not negative and not all 0, for {len(self.names)} sources; "
                f"got {n.tolist()[:10]}."
            )
        self.shares = n / n.sum()

    def weights(self, signals: Signals | None = None) -> Mapping[str, float | Tensor]:
        """Return every source's share by name.

        Raises:
            InputError: a weight that is no source's.
        """
        found = dict(zip(self.names, self.shares.tolist(), strict=True))
        if signals is not None and set(signals.names) != set(self.names):
            raise InputError(
                f"SourceWeights sets the weights of {', '.join(self.names)}, and the run has {', '.join(signals.names)}: make the "
                "objective with objective(term, owned=True)."
            )
        return found

    def advance(self, signals: Signals | None = None) -> None:
        """Stay: shares change only by `update`."""

    def objective(self, term: Term, owned: bool = False) -> Objective:
        """Return `sum_t share_t * term.on(t)`; each summand is named after its source, sources of share 0 are left out.

        Args:
            term: the loss of every source.
            owned: write `auto` in place of the shares, for `poise.fit(..., policy=...)`; then no source is left out.
        """
        parts = [
            Summand(copy.deepcopy(term), Auto(name) if owned else share, name=name, stream=name)
            for name, share in zip(self.names, self.shares.tolist(), strict=True)
            if share > 0 or owned
        ]
        return Objective(parts)

    def rates(self, batch_size: int) -> dict[str, int]:
        """Return each source's examples of a step, of sum `batch_size`, by the largest remainder; sources without any are left out.

        >>> SourceWeights(["news", "web"], [3, 1]).rates(8)
        {'news': 6, 'web': 2}
        """
        sizes = largest_remainder(self.shares.cpu().numpy() * batch_size, batch_size)
        return {name: int(size) for name, size in zip(self.names, sizes, strict=True) if size}

    def streams(self, data: Mapping[str, Any], batch_size: int, **options: Any) -> dict[str, Stream]:
        """Return a stream for every source that has a part in a step of `batch_size` examples.

        The objective for them is `at_rates(term, batch_size)`.

        Args:
            data: of every source by name, as `poise.fit` takes it.
            options: of `Stream`.

        Raises:
            InputError: a source without data.
        """
        missing = [name for name in self.rates(batch_size) if name not in data]
        if missing:
            raise InputError(f"SourceWeights: no data for {', '.join(missing)}; given are {', '.join(data)}.")
        return {name: Stream(data[name], size, **options) for name, size in self.rates(batch_size).items()}

    def at_rates(self, term: Term, batch_size: int) -> Objective:
        """Return the objective in which every example of a step counts the same: weights are the rounded rates over the batch."""
        rates = self.rates(batch_size)
        counts = np.array([rates.get(name, 0) for name in self.names], dtype=np.float64)
        return SourceWeights(self.names, torch.from_numpy(counts)).objective(term)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the names, which a loaded state must match."""
        return {"names": list(self.names)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Check them."""
        if tuple(state["names"]) != self.names:
            raise InputError(
                f"The state is of the sources {', '.join(state['names'])}, and these are {', '.join(self.names)}."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> SourceWeights:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.shares = self.shares.double()
        return self


class SourceRelevance(SourceWeights):
    """Shares that follow the target while the run goes on: the relevance of paper 07 with gradients in the place of heads.

        nu = argmin over nu >= 0 of   1/2 |sum_t nu_t g_t - g|^2 + lam max_t <g_t, g> sum_t nu_t
        share <- (1 - rate) share + rate nu / sum nu,      every `every` steps

    g_t is the gradient of source t on what all share and g that of the target on validation data. A coefficient below 0 would train
    against its source, so there is none. All that is needed are inner products. Where every <g_t, g> is negative nothing changes.
    Once the target's gradient is nearly 0 its direction is noise and the shares wander: take a small `rate` in long runs.

    Args:
        names: of the sources.
        upper: the target's objective, as a formula.
        lam: relative to the value at which no source is left, in [0, 1).
        every: steps from one look to the next; a look costs a backward pass a source and one for the target.
        rate: of the moving average, in (0, 1].
        least: share that every source keeps, so that it can rise again, in [0, 1/T].

    Raises:
        InputError: an argument out of its range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "validation"})

    def __init__(
        self,
        names: Sequence[str],
        upper: str,
        *,
        lam: float = 0.1,
        every: int = 10,
        rate: float = 0.3,
        least: float = 0.01,
    ) -> None:
        super().__init__(names)
        if not 0 <= lam < 1 or every < 1 or not 0 < rate <= 1 or not 0 <= least <= 1 / len(self.names):
            raise InputError(
                "SourceRelevance: lam in [0, 1), every >= 1, rate in (0, 1] and least in [0, 1/T]; they are "
                f"{lam}, {every}, {rate} and {least}."
            )
        self.upper, self.lam, self.every, self.rate, self.least = upper, lam, every, rate, least

    def weights(self, signals: Signals | None = None) -> Mapping[str, float | Tensor]:
        """Return every source's share by name, after a look at the gradients where one is due."""
        found = super().weights(signals)
        if signals is None or signals.step % self.every:
            return found
        if signals.validation is None:
            raise InputError(
                "SourceRelevance goes by the target's gradient on validation data: give poise.fit valid=..."
            )
        table = signals.gradients
        nu = relevance_of_gradients(table.gram, table.against(signals.validation.gradient()), self.lam)
        if bool(nu.any()):
            order = [table.labels.index(name) for name in self.names]
            fresh = self.shares + self.rate * ((nu / nu.sum())[order].to(self.shares) - self.shares)
            self.shares = self.least + (1 - self.least * len(self.names)) * fresh / fresh.sum()
        return super().weights(signals)


def relevance_of_gradients(gram: Tensor, agreement: Tensor, lam: float = 0.0, sweeps: int = 1000) -> Tensor:
    """Solve `min over nu >= 0 of 1/2 nu'G nu - c'nu + lam max(c) sum nu` by coordinate descent.

    Args:
        gram: G = <g_s, g_t>, f64 (T, T).
        agreement: c = <g_t, g>, f64 (T,).
        lam: in [0, 1).

    Returns:
        nu, f64 (T,); 0 where no source agrees with the target.

    >>> relevance_of_gradients(torch.eye(2).double(), torch.tensor([1.0, -1.0]).double())
    tensor([1., 0.], dtype=torch.float64)
    """
    pull = agreement - lam * agreement.max().clamp_min(0)
    nu = torch.zeros_like(agreement)
    for _ in range(sweeps):
        before = nu.clone()
        for t in range(len(nu)):
            if gram[t, t] > 0:
                nu[t] = (nu[t] + (pull[t] - gram[t] @ nu) / gram[t, t]).clamp_min(0)
        if float((nu - before).abs().max()) <= 1e-10 * float(nu.abs().max()):
            break
    return nu
