"""Balancers beside `torchjd`, within what that peer reaches itself."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from random_gradients import gram, make

from poise.weights.pareto.baselines import RandomWeights
from poise.weights.pareto.cagrad import CAGrad
from poise.weights.pareto.imtl import IMTLG
from poise.weights.pareto.mgda import MGDA
from poise.weights.pareto.nash_mtl import NashMTL
from poise.weights.pareto.pcgrad import PCGrad
from poise.weights.pareto.upgrad import UPGrad

pytestmark = pytest.mark.peer
NONE = torch.zeros(0)
CASES = [make(seed, m, m, 0.5, flaw) for seed, m in enumerate((2, 3, 5, 10)) for flaw in ("none", "agree", "copy")]


@pytest.fixture(scope="module")
def torchjd() -> Any:
    return pytest.importorskip("torchjd.aggregation")


def test_mgda_is_never_longer_than_the_peer_and_meets_it_within_its_percent(torchjd: Any) -> None:
    for j in CASES:
        ours = MGDA().weigh(gram(j), NONE).numpy() @ j
        theirs = torchjd.MGDA(epsilon=1e-3, max_iters=1000)(torch.from_numpy(j)).numpy()
        assert np.linalg.norm(ours) <= np.linalg.norm(theirs) + 1e-12
        # Its Frank-Wolfe steps leave an error of the order of the largest gradient over their number.
        np.testing.assert_allclose(ours, theirs, atol=0.03 * np.linalg.norm(j, axis=1).max())


def test_pcgrad_equals_the_peer_with_the_same_random_orders(torchjd: Any) -> None:
    for j in CASES:
        generator = torch.Generator().manual_seed(7)
        ours = PCGrad(order="random", generator=generator).weigh(gram(j), NONE).numpy() @ j
        torch.manual_seed(7)
        np.testing.assert_allclose(ours, torchjd.PCGrad()(torch.from_numpy(j)).numpy(), atol=1e-9)


def test_cagrad_equals_the_peer(torchjd: Any) -> None:
    for j in CASES:
        for c in (0.2, 0.7):
            try:
                peer = torchjd.CAGrad(c=c, norm_eps=1e-12)
            except ImportError:
                pytest.skip("torchjd's CAGrad needs cvxpy and clarabel")
            theirs = peer(torch.from_numpy(j)).numpy()
            ours = CAGrad(c=c).weigh(gram(j), NONE).numpy() @ j
            # Clarabel stops at 1e-8 of the value, which leaves 1e-4 in the argument.
            np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.linalg.norm(j, axis=1).max())


def test_upgrad_equals_the_peer(torchjd: Any) -> None:
    for j in CASES:
        try:
            from torchjd.linalg import QuadprogProjector

            peer = torchjd.UPGrad(projector=QuadprogProjector(reg_eps=1e-10))
        except ImportError:
            pytest.skip("torchjd's UPGrad needs quadprog and qpsolvers")
        theirs = peer(torch.from_numpy(j)).numpy()
        ours = UPGrad().weigh(gram(j), NONE).numpy() @ j
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.linalg.norm(j, axis=1).max())


def test_nash_mtl_meets_the_equation_better_than_the_peer_and_points_where_it_does(torchjd: Any) -> None:
    for seed, m in ((0, 2), (1, 3), (2, 5)):
        j = make(seed, m, m, 0.0, "agree")
        try:
            peer = torchjd.NashMTL(n_tasks=m, max_norm=0)
        except ImportError:
            pytest.skip("torchjd's NashMTL needs cvxpy and ecos")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peer(torch.from_numpy(j)).numpy()
        ours = NashMTL(max_norm=0).weigh(gram(j), NONE).numpy() @ j
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        # The peer stops at a residual of 1e-3 or after 20 rounds.
        assert cosine > 0.999
        assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(theirs), rel=2e-2)


def test_imtl_g_equals_the_peer_where_gradients_are_independent(torchjd: Any) -> None:
    for seed, m in enumerate((2, 3, 5, 10)):
        j = make(seed, m, m, 0.5, "none")
        ours = IMTLG().weigh(gram(j), NONE).numpy() @ j
        theirs = torchjd.IMTLG()(torch.from_numpy(j)).numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())


def test_random_weights_equal_the_peer_from_the_same_generator(torchjd: Any) -> None:
    j = CASES[2]
    ours = RandomWeights(generator=torch.Generator().manual_seed(3)).weigh(gram(j), torch.zeros(len(j))).numpy() @ j
    torch.manual_seed(3)
    np.testing.assert_allclose(ours, torchjd.Random()(torch.from_numpy(j)).numpy(), atol=1e-12)
