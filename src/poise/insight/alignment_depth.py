"""How deep an alignment goes: where, along an answer, two models differ.

A model whose alignment is shallow differs from its base in the first few tokens of an answer and hardly later, so whoever
forces these tokens, or fine-tunes them away, has the base model back. `alignment_depth` measures it on fixed answers:

    KL_t = mean over answers of KL(a || b) over the vocabulary, before token t of the answer

    report = alignment_depth(aligned, base, answers)
    report.share(5), report.depth()             # share of the total in the first five tokens; tokens that hold 90 % of it

With the model before and after fine-tuning in the place of a and b, the same curves show where fine-tuning bites.
What an alignment of that depth withstands is measured in `poise.insight.alignment_attacks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise.errors import InputError, QuantityError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AlignmentDepth", "alignment_depth", "logits_of", "token_gradient_norms"]


@dataclass(frozen=True)
class AlignmentDepth:
    """Two models along the same answers; entry t concerns the t-th token of an answer, from 0.

    Args:
        kl: mean KL(a || b) over the vocabulary before token t, nats, float64 [time].
        loss_a, loss_b: mean -log p(y_t) under either model, nats, float64 [time].
        answers: how many answers reach token t, int64 [time]; the last entries may rest on few.
        gradient_norm: mean Euclidean norm of the gradient of -log p_a(y_t) for the first tokens, float64, or None.
    """

    kl: Tensor
    loss_a: Tensor
    loss_b: Tensor
    answers: Tensor
    gradient_norm: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """KL at each place summed over answers."""
        return self.kl * self.answers

    def share(self, first: int = 5) -> float:
        """Share of the total KL that lies in the first tokens, in [0, 1]; 0 where the models are equal."""
        whole = float(self.total.sum())
        return float(self.total[:first].sum()) / whole if whole > 0 else 0.0

    def depth(self, share: float = 0.9) -> int:
        """The depth index: the fewest first tokens that hold `share` of the total KL; 0 where the models are equal."""
        if not 0 < share <= 1:
            raise InputError(f"alignment_depth: the share of a depth lies in (0, 1], and it is {share}.")
        whole = self.total.sum()
        if not whole > 0:
            return 0
        # The last sum may miss the whole by a rounding.
        held = self.total.cumsum(0) >= share * whole * (1 - 1e-12)
        return int(held.to(torch.int8).argmax()) + 1

    def frame(self) -> pd.DataFrame:
        """The curves as a table, one row a place."""
        import pandas as pd

        columns = {"kl": self.kl, "loss_a": self.loss_a, "loss_b": self.loss_b, "answers": self.answers}
        table = pd.DataFrame({name: value.numpy() for name, value in columns.items()})
        if self.gradient_norm is not None:
            table["gradient_norm"] = pd.Series(self.gradient_norm.numpy())
        return table.rename_axis("token")

    def __str__(self) -> str:
        return (
            f"{self.share(5):.0%} of the divergence lies in the first 5 tokens, {0.9:.0%} in the first {self.depth()} of "
            f"{len(self.kl)} (KL {', '.join(f'{x:.2f}' for x in self.kl[:8].tolist())}{', ...' if len(self.kl) > 8 else ''})"
        )


@torch.no_grad()
def alignment_depth(
    model_a: Callable[..., Any],
    model_b: Callable[..., Any],
    batch: Mapping[str, Tensor],
    *,
    rows: int = 16,
    gradients: int = 0,
) -> AlignmentDepth:
    """Compare two models token by token along fixed answers, teacher-forced.

    KL_t = mean over answers of sum_v p_a(v | x, y_<t) (log p_a(v | x, y_<t) - log p_b(v | x, y_<t))

    Args:
        model_a: from token ids int64 [batch, time] to logits float [batch, time, vocabulary], or to an output with `.logits`:
            the aligned model, or the one before fine-tuning. Modules are run in evaluation mode.
        model_b: the same for the base model, or the one after fine-tuning, over one vocabulary.
        batch: `response_ids` int64 [batch, time], `response_mask` bool [batch, time]; `response_attention` bool where rows are
            padded on the left. Of prompts that the alignment refuses, with the answers that it is to withhold.
        rows: answers of one forward pass: the distributions of so many are held at a time.
        gradients: also measure the norm of the gradient of model_a's loss at so many first tokens; one backward pass for each
            token of each answer.

    Returns: the curves, with `share(first)` and `depth(share)`. A model against itself has KL 0 everywhere.

    Raises:
        QuantityError: no answer token, an answer that begins the row, or models with different vocabularies.

    Example:
        >>> one, two = torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> answers = {"response_ids": torch.zeros(1, 3).long(), "response_mask": torch.tensor([[False, True, True]])}
        >>> alignment_depth(lambda ids: one.expand(1, 3, 2), lambda ids: two.expand(1, 3, 2), answers).kl
        tensor([0.1201, 0.1201], dtype=torch.float64)

    Source: arXiv:2406.05946, section 2 and figure 1; section 4.1 and figure 3 for the dynamics of fine-tuning.
    """
    batch = _checked(batch)
    ids, mask = batch["response_ids"], batch["response_mask"]
    places = torch.where(mask, mask.cumsum(1) - 1, 0)
    length = int(mask.sum(1).max())
    sums = torch.zeros(4, length, dtype=torch.float64)
    with _evaluating(model_a, model_b):
        for start in range(0, len(ids), rows):
            part = {name: value[start : start + rows] for name, value in batch.items()}
            answer = part["response_mask"]
            log_a, log_b = (_log_probabilities(model, part) for model in (model_a, model_b))
            if log_a.shape != log_b.shape:
                raise QuantityError(
                    f"alignment_depth: the models have vocabularies of {log_a.shape[-1]} and {log_b.shape[-1]} tokens; they can be "
                    "compared over one only."
                )
            target = part["response_ids"][answer][:, None]
            kl = functional.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)
            losses = [-log.gather(1, target)[:, 0] for log in (log_a, log_b)]
            at = places[start : start + rows][answer].cpu()
            for row, values in enumerate((kl, *losses, torch.ones_like(kl))):
                sums[row].index_add_(0, at, values.double().cpu())
    answers = sums[3]
    norms = token_gradient_norms(model_a, batch, first=gradients) if gradients else None
    return AlignmentDepth(sums[0] / answers, sums[1] / answers, sums[2] / answers, answers.long(), norms)


def token_gradient_norms(model: Callable[..., Any], batch: Mapping[str, Tensor], first: int = 5) -> Tensor:
    """Mean over answers of the norm of the gradient of -log p(y_t) with respect to all trained parameters.

    Args:
        model: a module, from token ids to logits; it is run in evaluation mode.
        batch: as for `alignment_depth`.
        first: how many first tokens of each answer.

    Returns: float64 [first]; NaN where no answer is so long.

    Raises:
        InputError: the model is no module, or trains nothing.

    Source: arXiv:2406.05946, figure 3 (right).
    """
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    if not trained:
        raise InputError("alignment_depth: gradient norms need a torch module with trained parameters.")
    batch = _checked(batch)
    sums, answers = torch.zeros(first, dtype=torch.float64), torch.zeros(first, dtype=torch.float64)
    with _evaluating(model), torch.enable_grad():
        for row in range(len(batch["response_ids"])):
            part = {name: v[row : row + 1] for name, v in batch.items()}
            target = part["response_ids"][part["response_mask"]][:first, None]
            losses = -_log_probabilities(model, part)[:first].gather(1, target)[:, 0]
            for t, loss in enumerate(losses):
                found = torch.autograd.grad(loss, trained, retain_graph=t + 1 < len(losses), allow_unused=True)
                sums[t] += (
                    torch.linalg.vector_norm(torch.stack([g.norm() for g in found if g is not None])).double().cpu()
                )
                answers[t] += 1
    return sums / answers


def logits_of(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Return what a language model says: float [batch, time, vocabulary], from a tensor or an output with `.logits`."""
    out = model(ids)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise QuantityError(
            "A language model must return logits float [batch, time, vocabulary], or an output with `.logits`."
        )
    return logits


def _log_probabilities(model: Callable[..., Any], part: Mapping[str, Tensor]) -> Tensor:
    """Return log p over the vocabulary before every answer token, [tokens, vocabulary], row after row."""
    logits = logits_of(model, part["response_ids"])
    return logits[:, :-1][part["response_mask"][:, 1:]].float().log_softmax(-1)


def _checked(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ids and answer mask, padding moved to the right, where a causal model does not see it."""
    for name in ("response_ids", "response_mask"):
        if name not in batch:
            raise QuantityError(f"alignment_depth reads {name!r}, and the batch has {', '.join(batch) or 'nothing'}.")
    found = {"response_ids": batch["response_ids"], "response_mask": batch["response_mask"].bool()}
    attention = batch.get("response_attention")
    if attention is not None:
        order = (~attention.bool()).to(torch.int8).argsort(dim=1, stable=True)
        found = {name: value.gather(1, order) for name, value in found.items()}
    if not found["response_mask"].any():
        raise QuantityError("alignment_depth: no token of the batch belongs to an answer.")
    if found["response_mask"][:, 0].any():
        raise QuantityError(
            "alignment_depth: an answer begins its row, so nothing stands before its first token. Put the prompt there."
        )
    return found


@contextmanager
def _evaluating(*models: Callable[..., Any]) -> Iterator[None]:
    """Run modules in evaluation mode, and put them back as they were."""
    training = [m for model in models if isinstance(model, nn.Module) for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
