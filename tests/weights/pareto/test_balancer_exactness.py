"""Balancers against independent solutions: faces by brute force, conditions of optimality, general solvers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_gradients import Array, gradients, gram, make
from scipy.optimize import LinearConstraint, minimize

from poise.weights.pareto.cagrad import CAGrad
from poise.weights.pareto.imtl import IMTLG
from poise.weights.pareto.mgda import MGDA
from poise.weights.pareto.nash_mtl import NashMTL
from poise.weights.pareto.upgrad import UPGrad

NONE = torch.zeros(0)
EXACT = settings(max_examples=60, deadline=None)
SLOWER = settings(max_examples=20, deadline=None)


def supports(m: int) -> list[tuple[int, ...]]:
    return [s for k in range(1, m + 1) for s in combinations(range(m), k)]


def shortest_by_faces(j: Array) -> Array:
    """Return the shortest vector of the hull: the best over all faces, each solved by least squares on the gradients themselves."""
    best: Array | None = None
    for s in supports(len(j)):
        first, rest = j[s[0]], j[list(s[1:])] - j[s[0]]
        along = np.linalg.lstsq(rest.T, -first, rcond=None)[0] if len(rest) else np.zeros(0)
        w = np.concatenate([[1 - along.sum()], along])
        d = w @ j[list(s)]
        if (w >= -1e-12).all() and (best is None or np.linalg.norm(d) < np.linalg.norm(best)):
            best = d
    assert best is not None
    return best


def projection_by_faces(p: Array, j: Array) -> Array:
    """Return the point nearest to `p` with `<d, g_i> >= 0`: the nearest feasible one among projections on subspaces."""
    size = np.linalg.norm(j, axis=1)
    unit = j[size > 0] / size[size > 0, None]
    best, distance = np.zeros_like(p), np.linalg.norm(p)
    for s in [(), *supports(len(unit))]:
        rows = unit[list(s)]
        d = p - rows.T @ np.linalg.lstsq(rows.T, p, rcond=None)[0] if s else p
        if (unit @ d >= -1e-9 * np.linalg.norm(p)).all() and np.linalg.norm(p - d) < distance:
            best, distance = d, np.linalg.norm(p - d)
    return best


@given(gradients(most=5))
@EXACT
def test_mgda_is_the_shortest_vector_of_the_hull(j: Array) -> None:
    w = MGDA().weigh(gram(j), NONE).numpy()
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1, abs=1e-12)
    # In units of the shortest gradient: where lengths differ by 1e4, the digits of the small one must not be lost.
    unit = np.linalg.norm(j, axis=1).min() or 1.0
    np.testing.assert_allclose(w @ j, shortest_by_faces(j), atol=1e-6 * unit)


@given(gradients(most=12, flaws="none agree copy opposite"))
@EXACT
def test_mgda_meets_the_conditions_of_its_minimum_to_1e_10(j: Array) -> None:
    """`<d, g_i> >= |d|^2` for all i, with equality on the support."""
    w = MGDA().weigh(gram(j), NONE).numpy()
    # From d itself: opposite rows cancel in the Gram matrix's products, and the conditions would be rounding.
    d, lengths = w @ j, np.linalg.norm(j, axis=1)
    gap = (j @ d - d @ d) / (lengths * lengths.min())
    assert gap.min() >= -1e-10
    assert (w * lengths * gap).max() <= 1e-10 * lengths.max()


@pytest.mark.parametrize(("a", "b", "c"), [(1.0, 0.3, 2.0), (1.0, 1.5, 4.0), (1.0, -0.7, 1.0), (3.0, 0.0, 3.0)])
def test_mgda_of_two_terms_is_the_clipped_closed_form(a: float, b: float, c: float) -> None:
    w = MGDA().weigh(torch.tensor([[a, b], [b, c]], dtype=torch.float64), NONE)
    share = min(max((c - b) / (a + c - 2 * b), 0.0), 1.0)
    torch.testing.assert_close(w, torch.tensor([share, 1 - share], dtype=torch.float64), atol=1e-12, rtol=0)


def test_mgda_does_not_lose_the_small_gradient_at_a_ratio_of_a_million() -> None:
    j = np.array([[1e-6, 0.0], [0.3, 1.0]])
    w = MGDA().weigh(gram(j), NONE).numpy()
    d = shortest_by_faces(j)
    np.testing.assert_allclose(w @ j, d, atol=1e-12 * 1e-6 + 1e-9 * np.linalg.norm(d))


def test_mgda_on_normalised_gradients_does_not_depend_on_their_lengths() -> None:
    j = make(3, 3, 3, 0.0, "none")
    w = MGDA(normalize="l2").weigh(gram(j), NONE)
    lengths = torch.tensor([1.0, 50.0, 1e3], dtype=torch.float64)
    scaled = MGDA(normalize="l2").weigh(gram(j * lengths.numpy()[:, None]), NONE) * lengths
    torch.testing.assert_close(scaled / scaled.sum(), w, atol=1e-9, rtol=0)


@given(gradients(most=5))
@EXACT
def test_upgrad_sums_the_projections_on_the_dual_cone(j: Array) -> None:
    m = len(j)
    u = np.linspace(0.5, 2.0, m)
    w = UPGrad(preference=u.tolist()).weigh(gram(j), NONE).numpy()
    assert (w >= u).all()
    expected = sum(ui * projection_by_faces(gi, j) for ui, gi in zip(u, j, strict=True))
    scale = float((u * np.linalg.norm(j, axis=1)).sum()) or 1.0
    np.testing.assert_allclose(w @ j, expected, atol=1e-6 * scale)


@given(gradients(most=12))
@EXACT
def test_upgrad_raises_no_term(j: Array) -> None:
    d = UPGrad().weigh(gram(j), NONE).numpy() @ j
    lengths = np.linalg.norm(j, axis=1)
    # Cosines of the Gram matrix carry an error of 1e-16, so its square root along a dependent direction one of 1e-8.
    assert (j @ d >= -1e-7 * lengths * lengths.sum()).all()


@given(gradients(most=5, spread=1.0, flaws="none agree copy opposite"), st.sampled_from([0.1, 0.4, 0.9, 2.0]))
@SLOWER
def test_cagrad_solves_its_dual_as_well_as_a_general_solver(j: Array, c: float) -> None:
    j = j / np.linalg.norm(j, axis=1).max()
    g0, m = j.mean(0), len(j)
    radius = c * np.linalg.norm(g0)

    def dual(w: Array) -> float:
        return float(w @ j @ g0 + radius * np.linalg.norm(w @ j))

    answers = [
        minimize(dual, start, bounds=[(0, 1)] * m, constraints=LinearConstraint(np.ones(m), 1, 1), method="SLSQP",
                 options={"ftol": 1e-15, "maxiter": 500}).fun
        for start in (np.full(m, 1 / m), *np.eye(m))
    ]  # fmt: skip
    weights = CAGrad(c=c).weigh(gram(j), NONE).numpy()
    assert (weights >= 0).all()
    if not weights.any():
        # The stationary case: the dual is at least 0, so no direction in the ball lowers every term.
        assert min(answers) >= -1e-6
        return
    d = weights @ j
    assert np.linalg.norm(d - g0) <= radius * (1 + 1e-9) + 1e-12
    # Strong duality: the worst term's rate equals the dual's minimum.
    assert (j @ d).min() >= min(answers) - 1e-6


@given(gradients(most=6, flaws="none agree"))
@EXACT
def test_nash_mtl_meets_its_equation(j: Array) -> None:
    g = gram(j).numpy()
    a = NashMTL(max_norm=0).weigh(torch.from_numpy(g), NONE).numpy()
    lengths = np.linalg.norm(j, axis=1)
    if np.linalg.norm(shortest_by_faces(j / lengths[:, None])) < 1e-4:
        return  # Pareto stationary: the equation has no solution
    np.testing.assert_allclose(a * (g @ a), np.ones(len(j)), atol=1e-6)


def test_nash_mtl_of_two_terms_is_inverse_to_their_lengths() -> None:
    """For m = 2 the equation has the solution a_i ~ 1/|g_i|, whatever the angle."""
    for cosine in (-0.9, 0.0, 0.8):
        n = torch.tensor([2.0, 5.0], dtype=torch.float64)
        g = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64) * n * n[:, None]
        a = NashMTL(max_norm=0).weigh(g, NONE) * n
        assert float(a[0] / a[1]) == pytest.approx(1, abs=1e-10)


def test_nash_mtl_shortens_the_step_to_its_longest() -> None:
    g = gram(make(1, 3, 3, 1.0, "agree"))
    free, short = NashMTL(max_norm=0).weigh(g, NONE), NashMTL(max_norm=0.5).weigh(g, NONE)
    assert float(short @ g @ short) == pytest.approx(0.25)
    torch.testing.assert_close(short / short.sum(), free / free.sum())


@given(gradients(most=6, flaws="none agree"))
@EXACT
def test_imtl_g_has_equal_projections_on_all_gradients(j: Array) -> None:
    if np.linalg.matrix_rank(j / np.linalg.norm(j, axis=1, keepdims=True), tol=1e-3) < len(j):
        return
    w = IMTLG().weigh(gram(j), NONE).numpy()
    d = w @ j
    along = j @ d / np.linalg.norm(j, axis=1)
    assert w.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(along, along.mean(), atol=1e-6 * np.abs(w) @ np.linalg.norm(j, axis=1))


def test_imtl_g_weighs_copies_alike_and_leaves_out_what_vanishes() -> None:
    j = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    w = IMTLG().weigh(gram(j), NONE)
    torch.testing.assert_close(w, torch.tensor([0.25, 0.25, 0.25, 0.0], dtype=torch.float64) / 0.75)


def test_upgrad_does_not_multiply_the_rounding_of_a_row_that_vanishes() -> None:
    for seed in range(200):
        j = make(seed, 4, 3, 1.0, "zero")
        lengths = np.linalg.norm(j, axis=1)
        w = UPGrad().weigh(gram(j), NONE).numpy()
        expected = sum(projection_by_faces(g, j) for g in j) / 4
        assert w[lengths == 0] == pytest.approx(0.25)
        np.testing.assert_allclose(w @ j, expected, atol=1e-6 * lengths.max())
