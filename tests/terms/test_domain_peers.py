"""Alignment beside dalib, the library that the authors' code is built on: values, and gradients on features and discriminators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from poise.terms import ConditionalDomainAdversarial, DomainAdversarial, MarginDisparity

pytestmark = pytest.mark.peer
K, WIDTH, ROWS = 4, 3, 6
STEP = 500


@pytest.fixture
def adaptation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The peer; it reads `numpy.float`, which NumPy has no longer."""
    monkeypatch.setattr(np, "float", float, raising=False)
    pytest.importorskip("dalib", reason="dalib is not installed: pip install --no-deps dalib==0.2")
    return pytest.importorskip("dalib.adaptation")


def rows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2 * ROWS, WIDTH, generator=generator).requires_grad_()
    domain = torch.where(torch.arange(2 * ROWS) < ROWS, 0, -1)
    return features, torch.randn(2 * ROWS, K, generator=generator), domain


def alike(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    # Both compute in float32, in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    found = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (ours, theirs)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_domain_adversarial(adaptation: Any) -> None:
    features, _, domain = rows()
    term = DomainAdversarial(WIDTH, (5,))
    assert term.built is not None
    peer = adaptation.dann.DomainAdversarialLoss(nn.Sequential(term.built, nn.Sigmoid()))
    peer.grl.iter_num = STEP
    theirs = peer(features[:ROWS], features[ROWS:])
    alike(term(features, domain, STEP).values.mean(), theirs, [features, *term.parameters()])


@pytest.mark.parametrize("entropy", [False, True])
def test_conditional_domain_adversarial(adaptation: Any, entropy: bool) -> None:
    features, logits, domain = rows()
    term = ConditionalDomainAdversarial(WIDTH, K, (5,), entropy=entropy)

    class InOurOrder(nn.Module):
        """The peer's product runs over classes first."""

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = term.discriminator(x.view(-1, K, WIDTH).transpose(1, 2).flatten(1)).sigmoid()
            return out

    peer = adaptation.cdan.ConditionalDomainAdversarialLoss(InOurOrder(), entropy_conditioning=entropy)
    peer.grl.iter_num = STEP
    theirs = peer(logits[:ROWS], features[:ROWS], logits[ROWS:], features[ROWS:])
    ours = term(features, logits, domain, STEP).values.mean()
    alike(ours, theirs, [features, *term.parameters()])


def test_margin_disparity(adaptation: Any) -> None:
    features, logits, domain = rows()
    term = MarginDisparity(WIDTH, K, (5,))
    grl = adaptation.mdd.WarmStartGradientReverseLayer(alpha=1.0, lo=0.0, hi=0.1, max_iters=1000)
    grl.iter_num = STEP
    other = term.head(grl(features))
    theirs = adaptation.mdd.MarginDisparityDiscrepancy(4)(logits[:ROWS], other[:ROWS], logits[ROWS:], other[ROWS:])
    ours = term(features, logits, domain, STEP).mean()
    # The peer shifts 1 - p by 1e-6 before the logarithm.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    found = [torch.autograd.grad(v, [features, *term.parameters()], retain_graph=True) for v in (ours, theirs)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
