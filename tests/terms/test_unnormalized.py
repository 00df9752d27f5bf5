"""Unnormalised likelihoods and noise contrast: exact where the normaliser is known, steady where it is not."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import IncompatibleError, InputError, PoiseWarning, QuantityError
from poise.objective import Objective, Summand
from poise.parts.noise import EnumerationNoise, GaussianNoise, GridNoise, KDENoise
from poise.readouts import Unnormalized
from poise.terms import NCE, EnergyL2, UnnormalizedNLL
from poise.weights.schedule import cosine
from two_processes import on_two


class Energy(nn.Module):
    """log p~ of points [n, d] by a small network; `shift` adds a constant that is not trained."""

    def __init__(self, d: int = 2, seed: int = 0, shift: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, 1))
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x).squeeze(-1) - 0.5 * x.square().sum(-1) + self.shift
        return out


class Location(nn.Module):
    """log p~ = -(x - theta)^2 / 2, whose normaliser is sqrt(2 pi)."""

    def __init__(self, theta: float = 0.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, x: Tensor) -> Tensor:
        return -0.5 * (x - self.theta).square().sum(-1)


def objective(term: Any) -> Objective:
    return Objective([Summand(term)])


def quantities(model: nn.Module, x: Tensor, z: Tensor, noise: Any) -> dict[str, Tensor]:
    return {
        "log_density": model(x), "log_noise": noise.log_prob(x), "drawn_log_density": model(z), "drawn_log_noise": noise.log_prob(z),
    }  # fmt: skip


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def setting(dtype: torch.dtype = torch.float64, shift: float = 0.0) -> tuple[Energy, Tensor, Tensor, GaussianNoise]:
    g = torch.Generator().manual_seed(0)
    x, z = (torch.randn(n, 2, generator=g).to(dtype) for n in (7, 9))
    noise = GaussianNoise(torch.zeros(2, dtype=dtype), 1.5)
    return Energy(shift=shift).to(dtype), x, 1.5 * z, noise


# ---- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_gamma_one_the_gradient_is_that_of_the_plug_in_likelihood(dtype: torch.dtype) -> None:
    model, x, z, noise = setting(dtype)
    loss = objective(UnnormalizedNLL(gamma=1.0))(**quantities(model, x, z, noise))
    log_r = model(z) - noise.log_prob(z)
    plain = -model(x).mean() + torch.logsumexp(log_r, 0) - math.log(len(z))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(loss, plain, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients(loss, model), gradients(plain, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gamma", [0.2, 1.0])
def test_noise_that_is_the_model_makes_every_weight_equal_and_the_normaliser_exact(gamma: float) -> None:
    g = torch.Generator().manual_seed(0)
    model = Location(0.7).double()
    x, noise = torch.randn(5, 1, generator=g).double(), GaussianNoise(torch.tensor([0.7]).double(), 1.0)
    term = UnnormalizedNLL(gamma=gamma)
    for _ in range(3):
        z = noise.sample(11)
        q = quantities(model, x, z, noise)
        value = term(q["log_density"], q["drawn_log_density"], q["drawn_log_noise"])
        exact = -model(x) + 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(value.values, exact)
        torch.testing.assert_close(value.extras["noise_weights"], torch.full((11,), 1 / 11).double())
        (slope,) = gradients(value.surrogate.mean(), model)
        # d/dtheta of -mean log p~ + mean_j log p~(z_j): nothing but the draws themselves is random.
        torch.testing.assert_close(slope, -(x - 0.7).mean() + (z - 0.7).mean())
        term.advance(q["drawn_log_density"].detach(), q["drawn_log_noise"])
    torch.testing.assert_close(float(term.log_normalizer), 0.5 * math.log(2 * math.pi), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_on_all_points_of_a_finite_space_it_is_exact_maximum_likelihood(gamma: float) -> None:
    points = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).double()
    model, data = Energy(3).double(), points[[0, 3, 3, 7]]
    everything = EnumerationNoise(points)
    loss = objective(UnnormalizedNLL(gamma=gamma))(**quantities(model, data, everything.sample(1), everything))
    exact = -model(data).mean() + torch.logsumexp(model(points), 0)
    torch.testing.assert_close(loss, exact)
    for ours, theirs in zip(gradients(loss, model), gradients(exact, model), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_of_a_thousand_changes_no_gradient_and_overflows_nowhere(dtype: torch.dtype) -> None:
    found = []
    for shift in (0.0, 1000.0, -1000.0):
        model, x, z, noise = setting(dtype, shift)
        term, steps = UnnormalizedNLL(gamma=0.3), []
        for step in range(4):
            q = quantities(model, x, z + 0.1 * step, noise)
            value = term(q["log_density"], q["drawn_log_density"], q["drawn_log_noise"])
            steps += [g.flatten() for g in gradients(value.surrogate.mean(), model)]
            term.advance(q["drawn_log_density"].detach(), q["drawn_log_noise"])
        found.append(torch.cat(steps))
        assert bool(torch.isfinite(found[-1]).all())
    # A thousand in float32 leaves 6e-5 of a ratio's logarithm.
    tolerance = 5e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[2], found[0], rtol=tolerance, atol=tolerance)


def test_at_the_optimum_of_an_exponential_family_the_moments_of_model_and_data_agree() -> None:
    class Family(nn.Module):
        """log p~ = theta' T(x), T = (x, x^2, x^3, x^4), on [-2, 2]."""

        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(4).double())

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x**k for k in range(1, 5)], 1) @ self.theta

    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).double().clamp(-1.9, 1.9)
    grid, model = GridNoise(torch.tensor([-2.0]).double(), torch.tensor([2.0]).double(), 400), Family()
    poise.fit(
        model, "unnormalized_nll(gamma=1.0)", {"input": x}, readout=Unnormalized(grid), solver="adam", lr=0.1, steps=1000,
        lr_schedule=cosine(1, 0), batch_size=200, device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        p = model(grid.points).softmax(0)
        expected = torch.stack([(p * grid.points[:, 0] ** k).sum() for k in range(1, 5)])
        observed = torch.stack([(x[:, 0] ** k).mean() for k in range(1, 5)])
    torch.testing.assert_close(expected, observed, rtol=1e-3, atol=1e-4)


def test_the_learned_constant_of_nce_is_the_normaliser_of_a_gaussian() -> None:
    x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)) + 1.0
    model, term = Location(), NCE()
    noise = GaussianNoise.fit(x, scale=1.5)
    made = objective(term)
    poise.fit(
        model,
        made,
        {"input": x},
        readout=Unnormalized(noise),
        solver="adam",
        lr=0.02,
        steps=1200,
        batch_size=500,
        device="cpu",
    )
    assert model.theta.item() == pytest.approx(float(x.mean()), abs=0.05)
    assert term.log_normalizer.item() == pytest.approx(0.5 * math.log(2 * math.pi), abs=0.05)


def test_nce_is_written_as_its_authors_have_it() -> None:
    model, x, z, noise = setting()
    nu, c = 2.5, 0.3
    loss = objective(NCE(ratio=nu, initial=c))(**quantities(model, x, z, noise))
    h = [model(p) - c - noise.log_prob(p) - math.log(nu) for p in (x, z)]
    plain = -nn.functional.logsigmoid(h[0]).mean() - nu * nn.functional.logsigmoid(-h[1]).mean()
    torch.testing.assert_close(loss, plain, rtol=1e-7, atol=1e-7)


# ---- the average ----------------------------------------------------------------------------------------------------


def test_the_first_batch_is_the_first_average_and_the_weights_sum_to_at_most_the_inverse_rate() -> None:
    term, zero = UnnormalizedNLL(gamma=0.25), torch.zeros(4)
    means = [2.0, 4.0, 1e6, 1.0]
    u = means[0]
    for mean in means:
        log_r = torch.full((4,), mean).log()
        u = 0.75 * u + 0.25 * mean
        value = term(torch.zeros(1), log_r, zero)
        assert float(value.extras["log_normalizer"]) == pytest.approx(math.log(u), rel=1e-6)
        assert float(value.extras["noise_weights"].sum()) == pytest.approx(mean / u, rel=1e-4)
        assert float(value.extras["weight_sum"]) <= 4.0 + 1e-9
        term.advance(log_r, zero)


def test_forward_is_pure_and_a_step_moves_the_average_once() -> None:
    model, x, z, noise = setting()
    term = UnnormalizedNLL(gamma=0.5)
    made = objective(term)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made.follow(optimizer)
    for step in range(3):
        before = term.log_normalizer.clone()
        for _ in range(3):  # a closure that is called again
            optimizer.zero_grad()
            made(**quantities(model, x, z, noise)).backward()
        assert torch.equal(term.log_normalizer, before)
        optimizer.step()
        assert int(term.average.steps) == step + 1


def test_use_then_update_decomposes_over_micro_batches() -> None:
    """With ahead=False the coefficients come from the step before, so halves add up to the whole."""
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).double()
    points = GridNoise(torch.full((2,), -4.0).double(), torch.full((2,), 4.0).double(), 12)
    found = []
    for accumulate in (1, 2):
        model = Energy().double()
        made = poise.parse("unnormalized_nll(gamma=0.3, ahead=False)")
        run = poise.fit(
            model,
            made,
            {"input": x},
            readout=Unnormalized(points),
            lr=0.05,
            steps=5,
            batch_size=20,
            accumulate=accumulate,
            device="cpu",
        )
        found.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_a_look_ahead_refuses_micro_batches() -> None:
    x = torch.randn(40, 2)
    with pytest.raises(IncompatibleError, match=r"unnormalized_nll.*accumulate=1.*ahead=False"):
        poise.fit(
            Energy(), "unnormalized_nll", {"input": x}, readout=Unnormalized(GaussianNoise.fit(x)), steps=2, batch_size=20, accumulate=2,
            device="cpu",
        )  # fmt: skip


def test_shifting_the_energy_and_the_average_alike_changes_nothing() -> None:
    model, x, z, noise = setting()
    term = UnnormalizedNLL(gamma=0.4)
    q = quantities(model, x, z, noise)
    term.advance(q["drawn_log_density"].detach(), q["drawn_log_noise"])

    def weights() -> Tensor:
        again = quantities(model, x, z + 0.3, noise)
        out: Tensor = (
            term(again["log_density"], again["drawn_log_density"], again["drawn_log_noise"])
            .extras["noise_weights"]
            .detach()
        )
        return out

    before = weights()
    term.recenter(model.layers[-1].bias)
    torch.testing.assert_close(weights(), before)
    assert float(term.log_normalizer) == 0


def test_a_ratio_beyond_the_clip_is_cut_and_counted() -> None:
    log_r = torch.tensor([0.0, 0.0, 0.0, math.log(29.0)])
    value = UnnormalizedNLL(gamma=1.0, clip=2.0)(torch.zeros(1), log_r, torch.zeros(4))
    torch.testing.assert_close(value.extras["noise_weights"], torch.tensor([1 / 32, 1 / 32, 1 / 32, 2 / 4]))
    assert float(value.extras["clipped"]) == 0.25
    assert float(value.extras["ess"]) == pytest.approx(32**2 / (3 + 29**2))


def test_a_point_without_mass_counts_nothing_and_leaves_the_gradient_finite() -> None:
    theta = torch.tensor(1.0, requires_grad=True)
    drawn = torch.stack([theta, theta * 2, theta.detach() * -torch.inf])
    value = UnnormalizedNLL()(theta[None], drawn, torch.zeros(3))
    value.surrogate.mean().backward()
    assert math.isfinite(float(theta.grad))
    assert float(value.extras["noise_weights"][2]) == 0


def test_half_precision_is_weighed_in_single() -> None:
    log_r = torch.tensor([40.0, 39.0], dtype=torch.bfloat16)
    value = UnnormalizedNLL(gamma=1.0)(torch.zeros(1, dtype=torch.bfloat16), log_r, torch.zeros(2))
    assert value.values.dtype == torch.float32
    torch.testing.assert_close(value.extras["noise_weights"], torch.tensor([40.0, 39.0]).softmax(0))


# ---- state ----------------------------------------------------------------------------------------------------------


def moved() -> UnnormalizedNLL:
    term = UnnormalizedNLL(gamma=0.3)
    for mean in (2.0, 5.0):
        term.advance(torch.full((3,), mean).log(), torch.zeros(3))
    return term


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_state_survives(way: str) -> None:
    term = moved()
    if way == "state_dict":
        other = UnnormalizedNLL(gamma=0.3)
        other.load_state_dict(term.state_dict())
    else:
        other = copy.deepcopy(term) if way == "deepcopy" else pickle.loads(pickle.dumps(term))
    assert torch.equal(other.log_normalizer, term.log_normalizer)
    assert torch.equal(other.average.steps, term.average.steps)


def test_the_average_stays_float64() -> None:
    term = moved()
    exact = term.log_normalizer.clone()
    assert torch.equal(term.half().log_normalizer, exact)


FORMULAS = ["unnormalized_nll(gamma=0.3)", "unnormalized_nll(gamma=0.3, variance_reduction=True)", "nce"]


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(formula: str, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=g)
    solver = "compositional(grad_momentum=0.3, variance_reduction=True, stage_steps=3, optimizer='adam')"

    def run(folder: Path | None, callbacks: list[Any]) -> tuple[list[Tensor], dict[str, Any]]:
        model, made = Energy(), poise.parse(formula)
        poise.fit(
            model, made, {"input": x}, readout=Unnormalized(KDENoise.fit(x)), solver=solver, lr=0.01, steps=13, batch_size=16,
            device="cpu", checkpoint=folder, checkpoint_steps=7, checkpoint_seconds=None, callbacks=callbacks,
        )  # fmt: skip
        return [p.detach() for p in model.parameters()], made.state_dict()

    whole, state = run(None, [])
    interrupted(run, tmp_path)
    again, resumed = run(tmp_path, [])
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for name, value in state.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, resumed[name]) or bool(torch.isnan(value).all()), name


def interrupted(run: Any, folder: Path) -> None:
    class Fail(Exception):
        pass

    class AfterSeven:
        def on_step_end(self, state: Any) -> None:
            if state.step == 8:
                raise Fail

    with pytest.raises(Fail):
        run(folder, [AfterSeven()])


def train_together(formula: str) -> dict[str, Tensor]:
    x = torch.randn(24, 2, generator=torch.Generator().manual_seed(0)).double()
    # Every process draws the whole grid, so that two draw what one draws.
    grid = GridNoise(torch.full((2,), -4.0).double(), torch.full((2,), 4.0).double(), 12)
    model, made = Energy().double(), poise.parse(formula)
    run = poise.fit(
        model, made, {"input": x}, readout=Unnormalized(grid), lr=0.05, steps=6, batch_size=8, device="cpu", log_every=1,
        solver="compositional(grad_momentum=0.5, variance_reduction=True)",
    )  # fmt: skip
    state = {k: v for k, v in made.state_dict().items() if isinstance(v, Tensor)}
    return {**model.state_dict(), **state, "loss": torch.tensor(run.history["loss"])}


@pytest.mark.parametrize("formula", ["unnormalized_nll(gamma=0.3, variance_reduction=True) + 0.1*nce"])
def test_two_processes_train_as_one(formula: str, tmp_path: Path) -> None:
    first, second = on_two(train_together, tmp_path, formula)
    one = train_together(formula)
    for name, value in one.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        if name.endswith("ess"):
            value = 2 * value  # two processes draw twice as many points
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def look() -> list[float]:
    """The normaliser after one step on noise that differs by process."""
    from poise import processes

    term = UnnormalizedNLL(gamma=0.5)
    made = objective(term)
    mean = torch.tensor(
        [[2.0, 6.0, 4.0], [10.0, 0.0, 0.0]][processes.rank()][: 3 - 2 * processes.rank()], requires_grad=True
    )
    value = term(torch.zeros(1, requires_grad=True), mean.log(), torch.zeros(len(mean)))
    optimizer = torch.optim.SGD([mean], lr=0.0)
    made.follow(optimizer)
    made(
        log_density=torch.zeros(1, requires_grad=True) + 0 * mean[0],
        drawn_log_density=mean.log(),
        drawn_log_noise=torch.zeros(len(mean)),
    ).backward()
    optimizer.step()
    return [float(value.extras["log_normalizer"]), float(term.log_normalizer)]


def test_processes_agree_on_the_normaliser_by_the_mean_of_all_their_noise(tmp_path: Path) -> None:
    for ahead, stored in on_two(look, tmp_path):
        assert ahead == pytest.approx(math.log((2 + 6 + 4 + 10) / 4))
        assert stored == pytest.approx(ahead)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnnormalizedNLL(gamma=0.0), r"unnormalized_nll: gamma"),
        (lambda: UnnormalizedNLL(gamma=1.5), r"unnormalized_nll: gamma"),
        (lambda: UnnormalizedNLL(clip=0.0), r"unnormalized_nll: clip"),
        (lambda: UnnormalizedNLL().recenter(torch.zeros(2)), r"unnormalized_nll: recenter"),
        (lambda: NCE(ratio=0.0), r"nce: ratio"),
    ],
)
def test_arguments_out_of_range_are_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_noise_that_denies_its_own_points_is_named() -> None:
    for term in (UnnormalizedNLL(), NCE()):
        with pytest.raises(QuantityError, match=r"drawn_log_noise is -inf at 1 of 2 points that the noise itself drew"):
            objective(term)(
                log_density=torch.zeros(1), log_noise=torch.zeros(1), drawn_log_density=torch.zeros(2),
                drawn_log_noise=torch.tensor([0.0, -torch.inf]),
            )  # fmt: skip


def test_noise_where_the_model_has_no_mass_is_named() -> None:
    with pytest.raises(QuantityError, match=r"unnormalized_nll: drawn_log_density is -inf at all 2 points"):
        UnnormalizedNLL()(torch.zeros(1), torch.full((2,), -torch.inf), torch.zeros(2))


def test_a_column_in_the_place_of_a_vector_is_named() -> None:
    with pytest.raises(
        QuantityError, match=r"unnormalized_nll reads 'log_density' as float \[batch\].*float32 \[4, 1\]"
    ):
        objective(UnnormalizedNLL())(
            log_density=torch.zeros(4, 1), drawn_log_density=torch.zeros(4), drawn_log_noise=torch.zeros(4)
        )


def test_a_hundred_steps_on_two_points_warn_and_name_the_noise() -> None:
    term, lone = UnnormalizedNLL(), torch.tensor([100.0, 0.0, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            term.advance(lone, torch.zeros(3), noise_name="GaussianNoise(3)")
    with pytest.warns(PoiseWarning, match=r"100 steps in a row.*GaussianNoise\(3\)"):
        term.advance(lone, torch.zeros(3), noise_name="GaussianNoise(3)")


def test_the_warning_of_a_run_names_its_noise() -> None:
    x = torch.randn(64, 1) * 0.01 + 1000.0
    with pytest.warns(PoiseWarning, match=r"fewer than 2 points of the noise GaussianNoise\(1\)"):
        poise.fit(
            Location(1000.0), "unnormalized_nll", {"input": x}, readout=Unnormalized(GaussianNoise(torch.zeros(1), 1.0)), steps=120,
            lr=1e-6, device="cpu",
        )  # fmt: skip


def test_squared_energies_are_those_of_data_and_noise() -> None:
    torch.testing.assert_close(EnergyL2()(torch.tensor([2.0]), torch.tensor([1.0, 3.0])), torch.tensor([9.0]))
    assert float(EnergyL2()(torch.tensor([2.0]))) == 4.0
