"""Projection onto the sparse simplex and the conjugate of the k-sparse squared norm, against every support in turn."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.errors import InputError
from poise.operators import Simplex, largest, project_sparse_simplex, topk_conjugate


def over_supports(v: Tensor, k: int, total: float = 1.0) -> float:
    """Return the least squared distance to the sparse simplex over all supports of k entries."""
    found = torch.inf
    for support in itertools.combinations(range(len(v)), k):
        p = torch.zeros_like(v)
        p[list(support)] = Simplex(total).project(v[list(support)])
        found = min(found, float((p - v).square().sum()))
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8), st.integers(1, 9), st.floats(0.1, 4.0))
def test_the_projection_is_the_best_over_every_support(values: list[float], k: int, total: float) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    p = project_sparse_simplex(v, k, total)
    assert (p >= 0).all()
    assert int((p > 0).sum()) <= k
    torch.testing.assert_close(p.sum(), torch.tensor(total, dtype=torch.float64))
    assert float((p - v).square().sum()) == pytest.approx(over_supports(v, min(k, len(v)), total), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8), st.integers(1, 9), st.floats(0.2, 4.0))
def test_the_conjugate_is_the_best_over_every_support(values: list[float], k: int, gamma: float) -> None:
    s = torch.tensor(values, dtype=torch.float64)
    best = max(
        float(s[list(c)].clamp_min(0).square().sum()) / (2 * gamma)
        for c in itertools.combinations(range(len(s)), min(k, len(s)))
    )
    assert float(topk_conjugate(s, k, gamma)) == pytest.approx(best, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_no_limit_is_the_simplex_and_dimensions_agree(dim: int) -> None:
    v = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    along = v if dim != 0 else v.mT
    expected = Simplex(1.0).project(along)
    torch.testing.assert_close(project_sparse_simplex(v, dim=dim), expected if dim != 0 else expected.mT)
    torch.testing.assert_close(project_sparse_simplex(v, 99, dim=dim), project_sparse_simplex(v, 5, dim=dim))


def test_the_derivative_is_the_projection_of_the_support() -> None:
    v = torch.tensor([0.9, 0.2, 0.7, -1.0, 0.65], dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda x: project_sparse_simplex(x, 3), v)
    support = (project_sparse_simplex(v, 3) > 0).double().detach()
    torch.testing.assert_close(jacobian, support.diag() - torch.outer(support, support) / support.sum())
    total = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: project_sparse_simplex(x, 3, t), (v, total))
    assert torch.autograd.gradcheck(lambda x: topk_conjugate(x, 2, 0.7), (v,))
    (gradient,) = torch.autograd.grad(topk_conjugate(v, 2, 0.5), v)
    torch.testing.assert_close(gradient, torch.tensor([1.8, 0.0, 1.4, 0.0, 0.0], dtype=torch.float64))


def test_equal_values_keep_the_first_and_forbidden_entries_stay_empty() -> None:
    assert largest(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False]
    assert project_sparse_simplex(torch.ones(4), 2).tolist() == [0.5, 0.5, 0.0, 0.0]
    assert project_sparse_simplex(torch.tensor([-torch.inf, 1.0, -torch.inf]), 2).tolist() == [0.0, 1.0, 0.0]
    assert project_sparse_simplex(torch.tensor([1.0, 1.0]), 2, 0.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_totals_may_differ_by_row_and_dtypes_stay(dtype: torch.dtype) -> None:
    v = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    p = project_sparse_simplex(v, 2, torch.tensor([0.5, 1.0, 2.0], dtype=dtype))
    assert p.dtype == dtype
    torch.testing.assert_close(p.sum(-1), torch.tensor([0.5, 1.0, 2.0], dtype=dtype))


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_k_counts_entries(k: object) -> None:
    with pytest.raises(InputError, match="project_sparse_simplex: k counts entries"):
        project_sparse_simplex(torch.ones(3), k)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="topk_conjugate: k counts entries"):
        topk_conjugate(torch.ones(3), k)  # type: ignore[arg-type]


def test_strengths_and_totals_have_a_sign() -> None:
    with pytest.raises(InputError, match="total must not be negative"):
        project_sparse_simplex(torch.ones(3), 1, -1.0)
    with pytest.raises(InputError, match="gamma must be positive"):
        topk_conjugate(torch.ones(3), 1, 0.0)


@pytest.mark.peer
def test_peer_projections_agree(capsys: pytest.CaptureFixture[str]) -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed (extra 'peers')")
    v = torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in (1, 3, 7):
        theirs = torch.as_tensor(ot.utils.projection_sparse_simplex(v.numpy(), k, axis=0))
        torch.testing.assert_close(project_sparse_simplex(v, k, dim=0), theirs)
