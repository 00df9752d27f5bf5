"""The scores of tokens equal those of full logits, whatever the tiles, and so do their gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError, QuantityError
from poise.readouts import token_scores as module
from poise.readouts.token_scores import OUTPUTS, Head, token_scores

TOKENS, WIDTH, RANK, VOCABULARY = 7, 5, 2, 23


def head(seed: int, softcap: float | None = None, scale: float = 1.0, bias: bool = True, rank: int = 0) -> Head:
    g = torch.Generator().manual_seed(seed)
    widths = [WIDTH] + ([rank] if rank else [])
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()  # noqa: E731
    return Head(
        tuple(make(TOKENS, w) for w in widths),
        tuple(make(VOCABULARY, w) for w in widths),
        make(VOCABULARY) if bias else None,
        softcap,
        scale,
    )


def dense(head: Head) -> Tensor:
    z = sum(f @ m.t() for f, m in zip(head.features, head.matrices, strict=True))
    if head.bias is not None:
        z = z + head.bias
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def dense_scores(policy: Head, target: Tensor, reference: Head) -> dict[str, Tensor]:
    z = dense(policy)
    log_p, log_q = z.log_softmax(-1), dense(reference).detach().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    return {
        "logps": log_p.gather(1, target[:, None]).squeeze(1),
        "logsumexp": z.logsumexp(-1),
        "entropy": -(p * log_p).sum(-1),
        "kl": (q * (log_q - log_p)).sum(-1),
        "reverse_kl": (p * (log_p - log_q)).sum(-1),
    }


@pytest.fixture(params=[(1 << 22, 4096), (TOKENS * 4, 4096), (9, 3)], ids=["one tile", "tiles", "tiles of rows too"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE", request.param[0])
    monkeypatch.setattr(module, "_ROWS", request.param[1])


@pytest.mark.parametrize(
    ("softcap", "scale", "rank"), [(None, 1.0, 0), (3.0, 1.0, 0), (None, 0.5, RANK), (2.0, 0.7, RANK)]
)
def test_scores_and_gradients_equal_those_of_full_logits(
    tiles: None, softcap: float | None, scale: float, rank: int
) -> None:
    policy, reference = head(0, softcap, scale, rank=rank), head(1, softcap, scale)
    target = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(2))
    ours, theirs = token_scores(policy, target, OUTPUTS, reference), dense_scores(policy, target, reference)
    weights = dict(zip(OUTPUTS, torch.randn(len(OUTPUTS), TOKENS, dtype=torch.float64), strict=True))
    leaves = [t for t in policy.tensors() if t is not None]
    gradients = []
    for scores in (ours, theirs):
        for name in OUTPUTS:
            torch.testing.assert_close(scores[name], theirs[name], rtol=1e-12, atol=1e-12)
        gradients.append(torch.autograd.grad(sum((weights[n] * scores[n]).sum() for n in OUTPUTS), leaves))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert all(t is None or t.grad is None for t in reference.tensors())


@pytest.mark.parametrize("name", OUTPUTS)
def test_each_score_alone_equals_that_of_full_logits(tiles: None, name: str) -> None:
    policy, reference = head(3), head(4)
    target = torch.arange(TOKENS)
    score = token_scores(policy, target, [name], reference)
    assert list(score) == [name]
    (ours,) = torch.autograd.grad(score[name].sum(), policy.matrices)
    (theirs,) = torch.autograd.grad(dense_scores(policy, target, reference)[name].sum(), policy.matrices)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_gradients_are_those_of_the_values_by_finite_differences() -> None:
    policy, reference = head(5, softcap=2.0), head(6)
    target = torch.arange(TOKENS)

    def scores(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(token_scores(policy.like(tensors), target, OUTPUTS, reference).values())

    assert torch.autograd.gradcheck(scores, policy.tensors())


@pytest.mark.parametrize("has_half", [True, False], ids=["products in bfloat16", "products in float32"])
def test_half_precision_is_accumulated_in_float32(has_half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cpu_has_half", lambda: has_half)
    policy = head(7, bias=False)
    target = torch.arange(TOKENS)
    half = policy.like([None if t is None else t.detach().bfloat16().requires_grad_() for t in policy.tensors()])
    score = token_scores(half, target)["logps"]
    assert score.dtype == torch.float32
    exact = F.log_softmax(half.features[0].double() @ half.matrices[0].double().t(), -1).gather(1, target[:, None])
    # The products themselves round to bfloat16, 2^-8 of logits of size about 10, or to float32.
    torch.testing.assert_close(score.double(), exact.squeeze(1), atol=0.1 if has_half else 1e-5, rtol=0.0)
    score.sum().backward()
    assert half.matrices[0].grad is not None
    assert half.matrices[0].grad.dtype == torch.bfloat16


def test_no_token_gives_no_score_and_a_gradient_of_zero() -> None:
    policy = head(8)
    empty = policy.like([policy.features[0][:0], policy.matrices[0], policy.bias])
    score = token_scores(empty, torch.zeros(0, dtype=torch.int64))["logps"]
    assert score.shape == (0,)
    score.sum().backward()
    assert torch.equal(policy.matrices[0].grad, torch.zeros_like(policy.matrices[0]))


def test_a_divergence_of_equal_heads_is_zero_and_so_is_its_gradient() -> None:
    policy = head(9)
    scores = token_scores(policy, torch.arange(TOKENS), ["kl", "reverse_kl"], policy)
    for value, leaf in itertools.product(scores.values(), policy.matrices):
        assert value.abs().max() < 1e-12
        (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        assert gradient.abs().max() < 1e-12


def test_what_does_not_exist_or_does_not_fit_is_refused_by_name() -> None:
    policy = head(10)
    target = torch.arange(TOKENS)
    with pytest.raises(InputError, match="surprise"):
        token_scores(policy, target, ["surprise"])
    with pytest.raises(InputError, match="needs a reference"):
        token_scores(policy, target, ["kl"])
    other = Head(policy.features, (policy.matrices[0][:-1],))
    with pytest.raises(QuantityError, match="23 tokens and the reference 22"):
        token_scores(policy, target, ["kl"], other)
