"""Codes of new samples, and labels from them.

    code          h = argmin  xi |x - W h|^2 + penalties                                  what reconstruction alone says
    joint_code    h = argmin  xi |x - W h|^2 + l(y, beta' h + o) + nu/2 |beta' h|^2        what it says with a label y
    naive         the label of `code`
    alternating   label and `joint_code` in turns, from the naive label, until the label stays
    exhaustive    the label whose `joint_code` has the least loss

Everything needs `W'X` and `W'W` alone. Without penalties the joint code moves along `(W'W)^-1 beta`, so each sample is a problem with
kappa unknowns: `2 xi u + P(a) - y + nu a = 0` with `a = a_0 + K u` and `K = beta' (W'W)^-1 beta`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.solvers.dictionary_blocks import FactorPenalty, proximal_descent
from poise.solvers.dictionary_data import DataMatrix
from poise.solvers.low_rank import LowRank
from poise.solvers.ridge_logistic import bound_of, probabilities

__all__ = ["Coder", "Coding"]

STEPS = 500


@dataclass(frozen=True)
class Coding:
    """Codes and what they say of labels.

    Attributes:
        codes: [r, m].
        scores: [kappa + 1, m]; their softmax are probabilities. Logits of the code, or minus the least joint loss of each label.
    """

    codes: Tensor
    scores: Tensor


class Coder:
    """Code samples with a fixed dictionary and classifier.

    Args:
        dictionary: W [p, r].
        coefficients: beta [r, kappa].
        xi, nu: weights of the objective.
        penalty: of the codes.
    """

    def __init__(self, dictionary: Tensor, coefficients: Tensor, xi: float, nu: float, penalty: FactorPenalty) -> None:
        self.w, self.beta, self.penalty = dictionary, coefficients, penalty
        self.kappa = coefficients.shape[1]
        # Without a reconstruction any label can be had for nothing; the limit of a small weight is what remains.
        self.xi, self.nu = max(xi, 1e-8), nu
        self.gram = dictionary.mT @ dictionary
        self.inverse: Tensor = torch.linalg.pinv(self.gram, hermitian=True)

    def code(self, x: DataMatrix) -> Tensor:
        """Return the codes that reconstruct best, [r, m]."""
        h = self._coded(x.transposed_times(self.w).mT)
        if x.missing is not None:
            for _ in range(STEPS):
                x.fill(LowRank(self.w, h))
                before, h = h, self._coded(x.transposed_times(self.w).mT, h)
                if float((h - before).norm()) <= 1e-8 * float(h.norm()):
                    break
        return h

    def _coded(self, cross: Tensor, start: Tensor | None = None) -> Tensor:
        if not self.penalty.acts:
            return self.inverse @ cross
        start = torch.zeros_like(cross) if start is None else start
        curvature = 2 * self.xi * self._top(self.gram)
        return proximal_descent(
            start, lambda h: 2 * self.xi * (self.gram @ h - cross), curvature, self.penalty, STEPS, tolerance=1e-9
        )

    def joint_code(self, cross: Tensor, h: Tensor, offset: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes [r, m] and joint losses [m] for given labels.

        Args:
            cross: `W' X` [r, m].
            h: the codes of reconstruction alone.
            offset: `Gamma' z` [kappa, m].
            y: one-hot without the first class, [kappa, m].
        """
        codes = self._joint_proximal(cross, h, offset, y) if self.penalty.acts else self._joint(h, offset, y)
        away = codes - h
        a = self.beta.mT @ codes
        # xi |x - W h|^2 less its value at the best reconstruction; exact without penalties, and with them up to a constant of x.
        squares = (
            (codes * (self.gram @ codes)).sum(0) - 2 * (codes * cross).sum(0)
            if self.penalty.acts
            else (away * (self.gram @ away)).sum(0)
        )
        loss = _losses(a + offset, y) + self.nu / 2 * a.square().sum(0) + self.xi * squares
        if self.penalty.acts:
            loss = loss + self.penalty.l1 * codes.abs().sum(0) + self.penalty.l2 / 2 * codes.square().sum(0)
        return codes, loss

    def _joint(self, h: Tensor, offset: Tensor, y: Tensor) -> Tensor:
        """Newton's method in `u` [m, kappa], halved where the residual of a sample would rise."""
        direction: Tensor = self.inverse @ self.beta
        k = self.beta.mT @ direction
        a0, o, target = ((self.beta.mT @ h).mT, offset.mT, y.mT)
        u = torch.zeros_like(a0)
        eye = torch.eye(self.kappa, dtype=u.dtype, device=u.device)

        def residual(v: Tensor) -> tuple[Tensor, Tensor]:
            a = a0 + v @ k
            p = probabilities((a + o).mT).mT
            return 2 * self.xi * v + p - target + self.nu * a, p

        g, p = residual(u)
        for _ in range(50):
            curve = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            step = torch.linalg.solve(2 * self.xi * eye + (curve + self.nu * eye) @ k, g)
            length = torch.ones(len(u), 1, dtype=u.dtype, device=u.device)
            for _ in range(30):
                trial = u - length * step
                found, at = residual(trial)
                rises = found.norm(dim=1, keepdim=True) > g.norm(dim=1, keepdim=True) * (1 - 1e-4 * length) + 1e-14
                if not bool(rises.any()):
                    break
                length = torch.where(rises, length / 2, length)
            u, g, p = trial, found, at
            if float(g.abs().max()) <= 1e-12 + 64 * torch.finfo(u.dtype).eps:
                break
        return h + direction @ u.mT

    def _joint_proximal(self, cross: Tensor, h: Tensor, offset: Tensor, y: Tensor) -> Tensor:
        outer = self.beta @ self.beta.mT
        curvature = 2 * self.xi * self._top(self.gram) + (bound_of(self.kappa) + self.nu) * self._top(outer)

        def gradient(x: Tensor) -> Tensor:
            r = probabilities(self.beta.mT @ x + offset) - y
            return 2 * self.xi * (self.gram @ x - cross) + self.beta @ r + self.nu * (outer @ x)

        return proximal_descent(h, gradient, curvature, self.penalty, STEPS, tolerance=1e-9)

    # ---- labels ------------------------------------------------------------------------------------------------------

    def predict(self, x: DataMatrix, offset: Tensor, method: str) -> Coding:
        """Return codes and scores by "naive", "alternating" or "exhaustive"."""
        h = self.code(x)
        known: dict[str, Callable[[Tensor, Tensor, Tensor], Coding]] = {
            "naive": lambda _, codes, o: self._coding(codes, o),
            "alternating": self._alternating,
            "exhaustive": self._exhaustive,
        }
        return known[method](x.transposed_times(self.w).mT, h, offset)

    def _coding(self, codes: Tensor, offset: Tensor) -> Coding:
        logits = self.beta.mT @ codes + offset
        return Coding(codes, torch.cat([torch.zeros_like(logits[:1]), logits]))

    def _alternating(self, cross: Tensor, h: Tensor, offset: Tensor) -> Coding:
        found = self._coding(h, offset)
        label = found.scores.argmax(0)
        for _ in range(20):
            codes, _ = self.joint_code(cross, h, offset, self._one_hot(label))
            found = self._coding(codes, offset)
            after = found.scores.argmax(0)
            if torch.equal(after, label):
                break
            label = after
        return found

    def _exhaustive(self, cross: Tensor, h: Tensor, offset: Tensor) -> Coding:
        losses, codes = [], []
        for c in range(self.kappa + 1):
            label = torch.full((h.shape[1],), c, device=h.device)
            found = self.joint_code(cross, h, offset, self._one_hot(label))
            codes.append(found[0])
            losses.append(found[1])
        scores = -torch.stack(losses)
        best = scores.argmax(0)
        return Coding(torch.stack(codes)[best, :, torch.arange(h.shape[1], device=h.device)].mT, scores - scores[:1])

    def _one_hot(self, label: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(label, self.kappa + 1)[:, 1:].mT.to(self.w.dtype)

    @staticmethod
    def _top(gram: Tensor) -> float:
        return float(torch.linalg.eigvalsh(gram)[-1])


def _losses(logits: Tensor, y: Tensor) -> Tensor:
    whole = torch.cat([torch.zeros_like(logits[:1]), logits]).logsumexp(0)
    return whole - (y * logits).sum(0)
