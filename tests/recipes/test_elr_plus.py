"""Laws of ELR+: two networks, averaged weights, crossed targets, mixed inputs."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import poise
from poise.data.augmentations import GaussianNoise, Mixup
from poise.errors import InputError
from poise.insight import suspect_labels
from poise.recipes.elr_plus import CoTrained, ELRPlus, WeightAveraging
from poise.streams import Stream

CLASSES, WIDTH, EXAMPLES = 3, 5, 20


def networks(count: int = 2) -> list[nn.Module]:
    made = []
    with torch.random.fork_rng():
        for seed in range(count):
            torch.manual_seed(seed)
            made.append(nn.Linear(WIDTH, CLASSES).double())
    return made


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return {"input": x, "target": torch.randint(CLASSES, (EXAMPLES,), generator=generator)}


def first_batches(seed: int, batch_size: int, mixup: float) -> list[dict[str, Tensor]]:
    """The first batch of each stream: a pure function of seed and name."""
    given = data()
    given["target"] = functional.one_hot(given["target"], CLASSES).double()
    found = []
    for name in ("first", "second"):

        def keep(batch: dict, generator: torch.Generator) -> dict:
            plain = {**batch, "plain": batch["input"]}
            return Mixup(mixup, CLASSES, dominant=True)(plain, generator)

        stream = Stream(dict(given), batch_size, transform=keep).prepare(name, seed, torch.device("cpu"))
        found.append(next(stream.iterate(0))[0])
    return found


@pytest.mark.parametrize("refine", [False, True])
def test_one_step_is_the_published_step_for_both_networks(refine: bool) -> None:
    nets, lr, beta, weight = networks(), 0.1, 0.7, 3.0
    by_hand = copy.deepcopy(nets)
    averages = copy.deepcopy(nets)
    recipe = ELRPlus(beta=beta, weight=weight, refine_labels=refine, dtype="float64", average=0.9, average_steps=10)
    run = recipe.fit(nets, data(), batch_size=8, steps=1, solver=torch.optim.SGD(_parameters(nets), lr=lr), seed=3)

    for own, batch in enumerate(first_batches(3, 8, mixup=1.0)):
        l, partner = batch["share"][:, None], batch["partner"]
        target = (1 - beta) * torch.softmax(averages[1 - own](batch["plain"]), 1).detach()
        q = l * target + (1 - l) * target[partner]
        label = batch["target"]
        if refine:
            label = label * q / (label * q).sum(1, keepdim=True)
        logits = by_hand[own](batch["input"])
        p = torch.softmax(logits, 1).clamp(1e-4, 1 - 1e-4)
        loss = -(label * torch.log_softmax(logits, 1)).sum(1).mean() + weight * torch.log(1 - (q * p).sum(1)).mean()
        gradients = torch.autograd.grad(loss, list(by_hand[own].parameters()))
        keep = 0.9 * math.exp(-5 * (1 - 2 / 10) ** 2)
        for parameter, gradient, trained, average, start in zip(
            by_hand[own].parameters(),
            gradients,
            run.model.networks[own].parameters(),
            run.model.averages[own].parameters(),
            averages[own].parameters(),
            strict=True,
        ):
            stepped = parameter.detach() - lr * gradient
            torch.testing.assert_close(trained.detach(), stepped, rtol=1e-10, atol=1e-12)  # float64 rounding
            torch.testing.assert_close(
                average.detach(), keep * start.detach() + (1 - keep) * stepped, rtol=1e-10, atol=1e-12
            )
        memory = run.objective.terms[f"early_learning@{('first', 'second')[own]}"].targets()
        torch.testing.assert_close(memory[batch["index"]], target, rtol=1e-10, atol=1e-12)


def _parameters(nets: list[nn.Module]) -> list[nn.Parameter]:
    return [parameter for net in nets for parameter in net.parameters()]


def test_predictions_are_the_mean_of_the_plain_networks_logits() -> None:
    nets = networks()
    run = ELRPlus().fit(nets, data(), data(), batch_size=8, steps=4)
    x = data()["input"]
    expected = 0.5 * (run.model.networks[0](x) + run.model.networks[1](x))
    torch.testing.assert_close(run.predict(x), expected.detach(), rtol=1e-12, atol=1e-12)
    assert run.history["valid/accuracy"][-1] == (run.predict(x).argmax(1) == data()["target"]).double().mean()


def test_the_average_ramps_up_as_published() -> None:
    ramped = WeightAveraging(0.997, ramp=40_000)
    assert ramped.keep(1, 100_000) == pytest.approx(0.997 * math.exp(-5 * (1 - 2 / 40_000) ** 2))
    assert ramped.keep(50_000, 100_000) == 0.997
    assert WeightAveraging(0.997).keep(49_999, 100_000) == 0.997  # half of the run
    counted = WeightAveraging(0.9999, rule="count")
    assert counted.keep(1, 10) == 0.5
    assert counted.keep(10**6, 10**6) == 0.9999
    assert WeightAveraging(0.5, ramp=0).keep(1, 10) == 0.5


def test_averages_are_not_trained_and_keep_batch_statistics_of_their_own() -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).double()

    with torch.random.fork_rng():
        model = CoTrained([make(0), make(1)])
    assert len([p for p in model.parameters() if p.requires_grad]) == len(list(model.networks.parameters()))
    model.train()
    model(data()["input"], network=0, averaged=True)
    statistics = [net[1].running_mean.clone() for net in (*model.networks, *model.averages)]
    assert bool((statistics[2] != 0).any())  # it was in training mode
    assert bool((statistics[0] == 0).all())
    model.average(0.5)
    assert torch.equal(model.averages[0][1].running_mean, statistics[2])


def test_each_network_sees_the_data_in_an_order_of_its_own() -> None:
    first, second = first_batches(0, 8, mixup=1.0)
    assert first["index"].tolist() != second["index"].tolist()


def test_an_augmentation_reaches_network_and_teacher_before_mixing() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if self.training and not self.weight.requires_grad:
                seen.append(input.detach().clone())
            return super().forward(input)

    with torch.random.fork_rng():
        nets = [Spy(WIDTH, CLASSES).double(), Spy(WIDTH, CLASSES).double()]
    ELRPlus().fit(nets, data(), batch_size=EXAMPLES, steps=1, transform=GaussianNoise(0.5))
    rows = data()["input"]
    assert len(seen) == 2
    for noisy in seen:
        # Noise was added to every entry, and nothing was mixed: each row is near exactly one row of the data.
        distance = torch.cdist(noisy, rows).min(1).values
        assert bool((distance > 0).all())
        assert bool((distance < 0.5 * math.sqrt(WIDTH) * 4).all())


def test_one_network_is_taught_by_its_own_average_and_nothing_need_be_mixed() -> None:
    nets = networks(1)
    start = copy.deepcopy(nets[0])
    run = ELRPlus(mixup=0, dtype="float64").fit(nets, data(), batch_size=EXAMPLES, steps=1, seed=1)
    target = run.objective.terms["early_learning@first"].targets()
    expected = 0.3 * torch.softmax(start(data()["input"]), 1).detach()
    torch.testing.assert_close(target, expected, rtol=1e-10, atol=1e-12)


def test_the_objective_is_a_formula() -> None:
    for recipe in (ELRPlus(), ELRPlus(weight=7.0, beta=0.9, ramp_steps=40_000, refine_labels=True)):
        objective = recipe.objective()
        assert poise.parse(str(objective)).equals(objective)
    assert str(ELRPlus(ramp_steps=100).objective(1)) == (
        "cross_entropy.on('first') + rampup(3, steps=100)*early_learning(teacher=True).on('first')"
    )


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    recipe = ELRPlus(dtype="float64", average_steps=6)
    options = {"batch_size": 8, "steps": 6, "seed": 2, "checkpoint": tmp_path, "checkpoint_steps": 2}
    whole = recipe.fit(networks(), data(), **{**options, "checkpoint": None})

    class Stop:
        def on_step_end(self, state: SimpleNamespace) -> None:
            if state.step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.fit(networks(), data(), callbacks=[Stop()], **options)
    resumed = recipe.fit(networks(), data(), **options)
    assert resumed.steps == 6
    for (name, one), (_, two) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    for one, two in zip(whole.objective.buffers(), resumed.objective.buffers(), strict=True):
        assert torch.equal(one, two)


def test_its_memories_name_suspects() -> None:
    run = ELRPlus().fit(networks(), data(), batch_size=8, steps=9)
    assert suspect_labels(run.objective, data()["target"]).suspect.shape == (EXAMPLES,)


def test_what_does_not_fit_is_refused_in_words() -> None:
    one, two = networks()
    cases = [
        (lambda: ELRPlus().fit([one, one], data()), "weights of their own"),
        (lambda: ELRPlus().fit([one, two, one], data()), "got 3"),
        (lambda: ELRPlus().fit([one, nn.Linear(WIDTH, 4).double()], data()), "3 and 4 classes"),
        (lambda: ELRPlus().fit([one, two], {**data(), "target": torch.full((EXAMPLES,), 3)}), "class 3"),
        (lambda: ELRPlus().fit([one, two], [1, 2, 3]), "trains on tensors"),
        (lambda: ELRPlus(mixup=-1), "Beta"),
        (lambda: ELRPlus(average=1.0), "average"),
        (lambda: ELRPlus(average_steps=-1), "ramp"),
        (lambda: ELRPlus(average_rule="sometimes"), "rule"),  # type: ignore[arg-type]
        (lambda: ELRPlus(beta=1.0), "beta"),
        (lambda: ELRPlus(ramp_steps=-1), "ramp_steps"),
        (lambda: ELRPlus(weight=poise.linear(0, 3), ramp_steps=5), "schedule already"),
        (
            lambda: WeightAveraging().on_step_end(SimpleNamespace(model=one, step=1, steps=1)),  # type: ignore[arg-type]
            "CoTrained",
        ),
    ]
    for call, words in cases:
        with pytest.raises(InputError, match=words):
            call()
