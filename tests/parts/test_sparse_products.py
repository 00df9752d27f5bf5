"""Products with few features: equal to dense ones, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from poise.parts import SparseAutoencoder, sparse_products
from poise.parts.sparse_products import decode, encode


def case(dtype: torch.dtype = torch.float64, share: float = 0.05) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    f = torch.rand(40, 300, generator=g, dtype=dtype) * (torch.rand(40, 300, generator=g) < share)
    w = torch.randn(300, 130, generator=g, dtype=dtype)
    b = torch.randn(130, generator=g, dtype=dtype)
    return f, w, b, (f > 0).sum(1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_is_the_dense_product_in_value_and_gradient(dtype: torch.dtype, share: float, threads: int) -> None:
    f, w, b, active = case(dtype, share)
    out = torch.randn(40, 130, generator=torch.Generator().manual_seed(1), dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaves = [t.clone().requires_grad_() for t in (f, w, b)]
        value = decode(*leaves, active)
        ours = torch.autograd.grad((value * out).sum(), leaves)
    finally:
        torch.set_num_threads(before)
    assert (value.grad_fn.name() == "_DecodeBackward") == (share == 0.05)
    torch.testing.assert_close(value, f @ w + b)
    mask = f > 0
    torch.testing.assert_close(ours[0] * mask, (out @ w.T) * mask)
    torch.testing.assert_close(ours[1], f.T @ out)
    torch.testing.assert_close(ours[2], out.sum(0))


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_encoding_has_the_dense_gradient_for_sparse_and_dense_ones(share: float) -> None:
    f, w, _, _ = case(share=share)
    x = torch.randn(40, 130, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    b, c = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (130, 300))
    w = w.requires_grad_()
    for leaves in ((b, w, c), (b, w)):
        value = encode(x, b, w, c if len(leaves) == 3 else None)
        plain = functional.linear(x - b, w, c if len(leaves) == 3 else None)
        torch.testing.assert_close(value, plain)
        ours = torch.autograd.grad((value * f).sum(), leaves)
        for one, other in zip(ours, torch.autograd.grad((plain * f).sum(), leaves), strict=True):
            torch.testing.assert_close(one, other)
    by_x = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad((encode(by_x, b, w, c) * f).sum(), by_x)[0], f @ w)


def test_a_gradient_can_be_differentiated_again() -> None:
    sae = SparseAutoencoder(5, 60, "top_k(k=3)").double()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss(encoder: Tensor, decoder: Tensor) -> Tensor:
        out = torch.func.functional_call(sae, {"encoder": encoder, "decoder": decoder}, (x,))
        return (out.reconstruction - out.signal).square().sum()

    at = (sae.encoder.detach().requires_grad_(), sae.decoder.detach().requires_grad_())
    assert sae(x).reconstruction.grad_fn.name() == "_DecodeBackward"
    direction = [torch.randn_like(p) for p in at]
    first = torch.autograd.grad(loss(*at), at, create_graph=True)
    second = torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, direction, strict=True)), at)
    step = 1e-6
    moved = [
        [(p + s * step * d).detach().requires_grad_() for p, d in zip(at, direction, strict=True)] for s in (1, -1)
    ]
    ends = [torch.autograd.grad(loss(*m), m) for m in moved]
    for exact, up, down in zip(second, *ends, strict=True):
        torch.testing.assert_close(exact, (up - down) / (2 * step), rtol=1e-5, atol=1e-6)


def test_forward_mode_and_other_devices_take_the_dense_product() -> None:
    f, w, b, active = case()
    value, moved = torch.func.jvp(lambda w: decode(f, w, b, active), (w,), (torch.ones_like(w),))
    torch.testing.assert_close(value, f @ w + b)
    torch.testing.assert_close(moved, f @ torch.ones_like(w))


def test_without_a_compiler_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    f, w, b, active = case()
    one = decode(f, w, b, active)
    monkeypatch.setattr(sparse_products, "_loops", lambda: None)
    torch.testing.assert_close(decode(f, w, b, active), one)


@pytest.mark.parametrize("kind", ["top_afa(max_k=3)", "top_k(k=3)", "batch_top_k(k=3)"])
def test_an_autoencoder_trains_alike_on_both_paths(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for most in (1 / 12, -1.0):
        monkeypatch.setattr(sparse_products, "_MOST", most)
        sae = SparseAutoencoder(5, 60, kind).double()
        out = sae(x)
        assert (out.reconstruction.grad_fn.name() == "_DecodeBackward") == (most > 0)
        loss = (out.reconstruction - x).square().mean() + 0.1 * out.features.norm(dim=1).sum()
        found.append([loss, *torch.autograd.grad(loss, list(sae.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
