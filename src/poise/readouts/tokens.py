"""The token record of small models that map ids to logits: `model(ids) -> logits [batch, time, vocabulary]`.

Entry t of the logits is the distribution of token t, given the tokens before it. Where the vocabulary is tiny nothing needs
to be read in tiles: the logits of a side are computed once, and everything follows from them. Transformers models are read
by `poise.readouts.language`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.frozen import FrozenModel
from poise.problem import ModelView
from poise.quantities import Quantities

__all__ = ["TokenReadout", "gathered_logps"]

SIDES = ("response", "chosen", "rejected")


class TokenReadout:
    """Offer the token record of answers: log-probabilities, divergences, entropies.

    For each of `response`, `chosen` and `rejected` whose `<side>_ids` and `<side>_mask` the batch holds, offers `<side>_logps`,
    `_positions`, `_entropy`, `_logsumexp`, and with a reference `reference_<side>_logps`, `_entropy`, `_logsumexp`,
    `<side>_kl` (reference first), `<side>_reverse_kl`, and `<side>_states` where the reference has `states(ids)`. On pairs
    `response` is another name for `chosen`. Nothing is computed that nobody reads, and one forward pass serves all that is
    read of a side. Data columns go before what is computed.

    Args:
        reference: the frozen reference: a module, or a `FrozenModel` that several readouts share.
    """

    output = "response_logps"

    def __init__(self, reference: nn.Module | FrozenModel | None = None) -> None:
        self.reference = FrozenModel(reference) if isinstance(reference, nn.Module) else reference

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        sides = [side for side in SIDES if f"{side}_ids" in batch]
        if not sides:
            raise InputError(
                "TokenReadout reads 'response_ids' and 'response_mask', or both for 'chosen' and 'rejected', and the batch "
                f"holds {', '.join(batch) or 'nothing'}."
            )
        for side in sides:
            _Side(model, batch, side, self.reference).offer_all()
        if "chosen" in sides and "response" not in sides:
            for name in [name for name in batch if "chosen_" in name]:
                other = name.replace("chosen_", "response_")
                if other not in batch:
                    batch.offer(other, lambda name=name: batch[name])  # type: ignore[misc]
        batch.put("model", model)
        if "parameters" in reads:
            batch.put("parameters", model.parameters)
        return batch


class _Side:
    """One answer of each row, and what the readout offers about it."""

    def __init__(self, model: ModelView, batch: Quantities, side: str, reference: FrozenModel | None) -> None:
        self.model, self.batch, self.side, self.reference = model, batch, side, reference

    @property
    def ids(self) -> Tensor:
        return self.batch[f"{self.side}_ids"]  # type: ignore[no-any-return]

    @property
    def mask(self) -> Tensor:
        return self.batch[f"{self.side}_mask"]  # type: ignore[no-any-return]

    def offer_all(self) -> None:
        policy = f"{self.side}_logits"
        self._offer(policy, lambda: self.model(self.ids))
        self._offer(f"{self.side}_positions", lambda: torch.where(self.mask, self.mask.long().cumsum(1) - 1, -1))
        self._offer_record(self.side, policy)
        if self.reference is None:
            return
        network, frozen = self.reference, f"reference_{self.side}_logits"
        self._offer(frozen, lambda: network.to(self.ids.device)(self.ids))
        self._offer_record(f"reference_{self.side}", frozen)
        self._offer_within(f"{self.side}_kl", lambda: _divergence(self.batch[frozen], self.batch[policy]))
        self._offer_within(f"{self.side}_reverse_kl", lambda: _divergence(self.batch[policy], self.batch[frozen]))
        if hasattr(network.module, "states"):
            self._offer(f"{self.side}_states", lambda: _states(network, self.ids, self.mask))

    def _offer_record(self, prefix: str, logits: str) -> None:
        self._offer(f"{prefix}_logps", lambda: gathered_logps(self.batch[logits], self.ids, self.mask))
        self._offer_within(f"{prefix}_logsumexp", lambda: self.batch[logits].logsumexp(-1))
        self._offer_within(f"{prefix}_entropy", lambda: _entropy(self.batch[logits]))

    def _offer(self, name: str, make: Callable[[], Tensor]) -> None:
        if name not in self.batch:
            self.batch.offer(name, make)

    def _offer_within(self, name: str, make: Callable[[], Tensor]) -> None:
        self._offer(name, lambda: torch.where(self.mask, make(), 0.0))


def gathered_logps(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the log-probability of each token: `logits[t, ids[t]] - logsumexp(logits[t])` within the mask, 0 outside.

    Args:
        logits: float `[batch, time, vocabulary]`.
        ids: int64 `[batch, time]`; outside the mask anything, padding beyond the vocabulary included.
        mask: bool `[batch, time]`.
    """
    token = torch.where(mask, ids, 0)
    chosen = logits.gather(-1, token[..., None])[..., 0]
    return torch.where(mask, chosen - logits.logsumexp(-1), 0.0)


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) over the vocabulary."""
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def _states(network: FrozenModel, ids: Tensor, mask: Tensor) -> Tensor:
    states: Tensor = network.module.states(ids)  # type: ignore[operator]
    return torch.where(mask[..., None], states, 0.0)
