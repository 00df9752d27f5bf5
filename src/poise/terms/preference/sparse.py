"""Token-level preference with sparse masks: which tokens carry the reward, and which the divergence (SparsePO, MaPO)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError, QuantityError
from poise.objective import Term, Value
from poise.parts.token_mask import Kind, TokenMask
from poise.terms.preference.margin import PairedTerm, require_one_of, require_positive, sequence_sum

__all__ = ["MaskL1", "SparsePO"]


class SparsePO(PairedTerm):
    """Weigh each token's log-ratio and each token's divergence by masks, learned from the reference's states or given as data.

    -log sigma(u - d)

    u = beta [sum_t m^u_t D_t(chosen) - sum_t m^u_t D_t(rejected)],      D = log pi - log pi_ref
    d = beta [sum_t m^d_t K_t(rejected) - sum_t m^d_t K_t(chosen)],      K = KL(pi_ref || pi) over the vocabulary

    With all masks 1 it is `tdpo(version=1)`, without d `dpo`. As there, the divergence of the chosen answer is raised. The masks stand
    inside the logarithm and grow with the margin; add `mask_l1` and watch `reward_size`:

        sparse_po(layers=4, width=64) + 0.001*mask_l1.on(size='sparse_po.reward_size')

    Args:
        beta: as in `dpo`.
        layers, width: of the reference (`config.num_hidden_layers`, `config.hidden_size`); needed where a mask is learned.
        mask_from: "states": masks are learned, parameters of the term that descend with the model. "data": masks are
            `<side>_token_weight`, such as those of `poise.weights.ActivationMask` (MaPO).
        masks: "common": one mask for u and d; "independent": two networks.
        reward: "mask", or "ones" for m^u = 1.
        kl: "mask", "ones" for m^d = 1, or "none" for m^d = 0.
        kind, activation, dropout, seed: of `poise.parts.token_mask.TokenMask`.

    Reads: what `dpo` reads, per token; `chosen_mask`, `rejected_mask`; `chosen_kl`, `rejected_kl` unless kl="none"; `chosen_states`,
        `rejected_states` float [layers, batch, time, width], or `<side>_token_weight`.
    Returns and publishes: see `PairedTerm`; margin and rewards are u's. Also `reward_size`, `kl_size` (the sums of m over both answers,
        with gradient), `sparsity` and `kl_sparsity` (share of tokens at 0), `chosen_kl`, `rejected_kl` (masked sums), float [batch];
        `<side>_reward_mask`, `<side>_kl_mask` float [batch, time].

    Raises:
        InputError: a learned mask without sizes, or an unknown option.
        QuantityError: states of another depth or width, negative masks, an answer without tokens, sums instead of tokens.

    Source: arXiv:2410.05102; the folder SparsePO of huawei-noah/HEBO.
    """

    formula = "sparse_po"
    equation: ClassVar[str] = (
        "-log sigma(beta (sum m^u D(chosen) - sum m^u D(rejected)) + beta (sum m^d K(chosen) - sum m^d K(rejected)))"
    )
    source: ClassVar[str] = "arXiv:2410.05102"
    differentiable_extras: ClassVar[tuple[str, ...]] = ("reward_size", "kl_size")

    def __init__(
        self,
        beta: float = 0.1,
        layers: int | None = None,
        width: int | None = None,
        mask_from: Literal["states", "data"] = "states",
        masks: Literal["common", "independent"] = "common",
        reward: Literal["mask", "ones"] = "mask",
        kl: Literal["mask", "ones", "none"] = "mask",
        kind: Kind = "all",
        activation: Literal["relu", "rescale"] | None = "relu",
        dropout: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_positive(self.formula, beta=beta)
        require_one_of(self.formula, "mask_from", mask_from, ("states", "data"))
        require_one_of(self.formula, "masks", masks, ("common", "independent"))
        require_one_of(self.formula, "reward", reward, ("mask", "ones"))
        require_one_of(self.formula, "kl", kl, ("mask", "ones", "none"))
        self.beta, self.layers, self.width, self.mask_from, self.masks = beta, layers, width, mask_from, masks
        self.reward, self.kl, self.kind, self.activation, self.dropout, self.seed = (
            reward, kl, kind, activation, dropout, seed,
        )  # fmt: skip
        self.learned = mask_from == "states" and "mask" in (reward, kl)
        if mask_from == "data" and masks == "independent":
            raise InputError(
                "sparse_po: masks='independent' are two networks; mask_from='data' offers one weight a token."
            )
        if self.learned:
            if layers is None or width is None:
                raise InputError(
                    "sparse_po: a learned mask needs the sizes of the reference: layers= and width=, in transformers "
                    "config.num_hidden_layers and config.hidden_size. mask_from='data' reads masks instead."
                )
            count = 2 if masks == "independent" and reward == kl == "mask" else 1
            self.networks = torch.nn.ModuleList(
                TokenMask(layers, width, activation, kind, dropout, seed + n) for n in range(count)
            )
            self.stochastic = dropout > 0 or kind == "random"  # type: ignore[misc]

    def _columns(self) -> list[str]:
        columns = ["kl"] if self.kl != "none" else []
        if "mask" in (self.reward, self.kl):
            columns.append("states" if self.mask_from == "states" else "token_weight")
        return columns

    def readings(self) -> tuple[str, ...]:
        """What this configuration has no use for."""
        unread = [c for c in ("kl", "states", "token_weight") if c not in self._columns()]
        return tuple(f"{side}_{column}" for side in ("chosen", "rejected") for column in unread)

    def requirements(self) -> tuple[str, ...]:
        """The divergences, and what the masks are made of."""
        return tuple(f"{side}_{column}" for side in ("chosen", "rejected") for column in self._columns())

    def forward(  # type: ignore[override]
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        chosen_mask: Tensor,
        rejected_mask: Tensor,
        chosen_kl: Tensor | None = None,
        rejected_kl: Tensor | None = None,
        chosen_states: Tensor | None = None,
        rejected_states: Tensor | None = None,
        chosen_token_weight: Tensor | None = None,
        rejected_token_weight: Tensor | None = None,
    ) -> Value:
        if chosen_logps.ndim == 1 or rejected_logps.ndim == 1:
            raise QuantityError("sparse_po: masks need a log-probability for each token, and sums were offered.")
        chosen = self._masks("chosen", chosen_mask, chosen_states, chosen_token_weight, chosen_logps)
        rejected = self._masks("rejected", rejected_mask, rejected_states, rejected_token_weight, rejected_logps)
        pair = self.pair(
            (chosen_logps, reference_chosen_logps, chosen_mask, chosen[0]),
            (rejected_logps, reference_rejected_logps, rejected_mask, rejected[0]),
        )
        margin = self.margin(pair)
        extras = _extras(chosen, rejected, chosen_mask, rejected_mask)
        if self.kl != "none":
            assert chosen_kl is not None
            assert rejected_kl is not None
            lost = (
                sequence_sum(chosen_kl, chosen_mask, chosen[1]),
                sequence_sum(rejected_kl, rejected_mask, rejected[1]),
            )
            margin = margin - self.beta * (lost[1] - lost[0])
            extras |= {"chosen_kl": lost[0].detach(), "rejected_kl": lost[1].detach()}
        value = self.published(pair, -F.logsigmoid(margin))
        value.extras.update(extras)
        return value

    def _masks(
        self, side: str, mask: Tensor, states: Tensor | None, weight: Tensor | None, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return m^u and m^d of one answer, float [batch, time]."""
        ones = mask.to(like.dtype)
        if not bool(mask.any(-1).all()):
            row = int((~mask.any(-1)).nonzero()[0])
            raise QuantityError(f"sparse_po: the {side} answer of row {row} has no token.")
        found: list[Tensor] = [ones]
        if self.learned:
            if states is None:
                raise QuantityError(f"sparse_po reads '{side}_states' of the reference, and they were not offered.")
            found = [network(states, mask).to(like.dtype) for network in self.networks]
        elif "mask" in (self.reward, self.kl):
            if weight is None:
                raise QuantityError(f"sparse_po reads '{side}_token_weight', and it was not offered.")
            if bool((weight < 0).any()):
                raise QuantityError(
                    f"sparse_po: masks are at least 0, and '{side}_token_weight' reaches {float(weight.min())}."
                )
            found = [torch.where(mask, weight, 0.0).to(like.dtype)]
        none = torch.zeros_like(ones)
        return (
            found[0] if self.reward == "mask" else ones,
            found[-1] if self.kl == "mask" else ones if self.kl == "ones" else none,
        )


def _extras(
    chosen: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor], chosen_mask: Tensor, rejected_mask: Tensor
) -> dict[str, Tensor]:
    """Sizes with gradient, sparsity, and the masks themselves."""
    tokens = (chosen_mask.sum(-1) + rejected_mask.sum(-1)).clamp(min=1)
    found: dict[str, Tensor] = {}
    for place, name in enumerate(("reward", "kl")):
        a, b = chosen[place], rejected[place]
        found[f"{name}_size"] = a.abs().sum(-1) + b.abs().sum(-1)
        zeros = ((a == 0) & chosen_mask).sum(-1) + ((b == 0) & rejected_mask).sum(-1)
        found["sparsity" if place == 0 else "kl_sparsity"] = (zeros / tokens).to(a.dtype)
        found |= {f"chosen_{name}_mask": a.detach(), f"rejected_{name}_mask": b.detach()}
    return found


class MaskL1(Term):
    """Charge the size of a mask: the sum of its values over the tokens of both answers.

    Reads: `size` float [batch], which another term publishes: `mask_l1.on(size='sparse_po.reward_size')` or `.kl_size`.
    Returns: float [batch].

    Example:
        >>> MaskL1()(torch.tensor([1.5]))
        tensor([1.5000])

    Source: arXiv:2410.05102 (weights of 0 or 0.001).
    """

    formula = "mask_l1"
    equation: ClassVar[str] = "sum_t m_t, over the tokens of both answers"
    source: ClassVar[str] = "arXiv:2410.05102"
    expects: ClassVar[dict[str, str]] = {"size": "float [batch]"}

    def forward(self, size: Tensor) -> Tensor:
        return size
