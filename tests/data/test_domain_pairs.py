"""Source and target in one batch, and a guide that has never been trained on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.data.domain_pairs import DomainPairs, HeldOut, hold_out
from poise.errors import CheckpointError, InputError, PoiseWarning

CPU = torch.device("cpu")


def domains(source: int = 21, target: int = 40) -> tuple[tuple[Tensor, Tensor], Tensor]:
    x = torch.arange(source, dtype=torch.float32)[:, None].repeat(1, 2)
    y = torch.arange(source) % 3
    return (x, y), 1000 + torch.arange(target, dtype=torch.float32)[:, None].repeat(1, 2)


def test_a_batch_holds_both_domains_and_no_label_of_the_target() -> None:
    source, target = domains()
    pairs = DomainPairs(source, {"input": target, "target": torch.zeros(40).long()}, 4).prepare("main", 0, CPU)
    draw = pairs.iterate(0)
    for _ in range(30):
        [b] = next(draw)
        assert b["domain"].tolist() == [0] * 4 + [-1] * 4
        assert torch.equal(b["input"][:4, 0].long(), b["index"][:4])
        assert torch.equal(b["target"][:4], b["index"][:4] % 3)
        assert b["target"][4:].tolist() == [-1] * 4
        assert torch.equal(b["input"][4:, 0].long() - 1000, b["index"][4:] - 21)
        assert int(b["index"].max()) < pairs.examples == 61  # type: ignore[operator]
    assert pairs.steps_per_epoch == 5
    assert pairs.classes == 3


def test_the_guide_is_never_drawn_for_training() -> None:
    source, target = domains()
    pairs = DomainPairs(source, target, 4, held_out=0.25).prepare("main", 3, CPU)
    guide = set(pairs.guide["index"].tolist())
    assert len(guide) == 10
    draw = pairs.iterate(0)
    drawn = {i for _ in range(60) for i in next(draw)[0]["index"][4:].tolist()}
    assert not drawn & guide
    assert drawn | guide == set(range(21, 61))
    assert set(pairs.guide["domain"].tolist()) == set(pairs.guide["target"].tolist()) == {-1}
    [b] = next(pairs.guide_stream(4).prepare("guide", 0, CPU).iterate(0))
    assert len(b["input"]) == 4
    assert set(b["index"].tolist()) <= guide


def test_a_run_that_begins_in_the_middle_draws_what_the_whole_run_draws() -> None:
    source, target = domains()
    whole = DomainPairs(source, target, 4).prepare("main", 1, CPU).iterate(0)
    later = DomainPairs(source, target, 4).prepare("main", 1, CPU).iterate(7)
    for _ in range(7):
        next(whole)
    for _ in range(9):
        [a], [b] = next(whole), next(later)
        assert torch.equal(a["index"], b["index"])


def test_micro_batches_share_out_both_domains() -> None:
    source, target = domains()
    one = DomainPairs(source, target, 4).prepare("main", 1, CPU)
    two = DomainPairs(source, target, 4).prepare("main", 1, CPU, accumulate=2)
    [a], parts = next(one.iterate(0)), next(two.iterate(0))
    assert len(parts) == 2
    assert sorted(a["index"].tolist()) == sorted(i for p in parts for i in p["index"].tolist())
    assert all(p["domain"].tolist() == [0, 0, -1, -1] for p in parts)


def test_other_sizes_other_domains_and_a_transform() -> None:
    (x, y), target = domains()
    seen = []

    def transform(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        seen.append(len(batch["input"]))
        return batch

    pairs = DomainPairs(
        {"input": x, "target": y, "domain": y}, target, 4, target_batch_size=6, held_out=None, transform=transform
    ).prepare("main", 0, CPU)
    [b] = next(pairs.iterate(0))
    assert seen == [10]
    assert torch.equal(b["domain"][:4], b["target"][:4])
    assert pairs.state_dict() == {}
    with pytest.raises(InputError, match="Nothing was held out"):
        _ = pairs.guide


def test_fit_trains_on_both_domains() -> None:
    source, target = domains()
    run = poise.fit(
        nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)),
        "source_classification + domain_adversarial(dim=4, hidden=(4,)) + target_classification(classes=3, dim=4, hidden=(4,))",
        DomainPairs(source, target / 1000, 4),
        readout=poise.readouts.DomainFeatures(),
        lr=1e-3,
        steps=4,
        device="cpu",
    )
    assert run.steps == 4
    assert all(torch.isfinite(torch.tensor(run.history["loss"])))


# ---- the leakage guard ----------------------------------------------------------------------------------------------


def test_hold_out_takes_a_share_that_the_seed_decides() -> None:
    a, b, c = hold_out(100, 0.1, 0), hold_out(100, 0.1, 0), hold_out(100, 0.1, 1)
    assert len(a.guide) == 10
    assert torch.equal(a.guide, b.guide)
    assert not torch.equal(a.guide, c.guide)
    assert torch.equal(torch.cat([a.train, a.guide]).sort().values, torch.arange(100))
    assert len(hold_out(3, 0.01).guide) == 1


def test_a_guide_that_overlaps_the_training_rows_is_refused() -> None:
    with pytest.raises(InputError, match="2 of its 3 rows are training rows"):
        HeldOut(torch.arange(5), torch.tensor([3, 4, 9]))
    with pytest.raises(InputError, match=r"guide part .* must not be empty"):
        HeldOut(torch.arange(5), torch.arange(0))
    with pytest.raises(InputError, match="names a row twice"):
        HeldOut(torch.tensor([0, 0]), torch.tensor([1]))
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(InputError, match=r"share in \(0, 1\)"):
            hold_out(10, share)


def test_a_held_out_row_that_copies_a_training_row_is_warned_of() -> None:
    source, target = domains()
    target[0] = target[1]
    with pytest.warns(PoiseWarning, match="1 of the 1 held-out rows are exact copies"):
        DomainPairs(source, target, 4, held_out=HeldOut(torch.arange(1, 40), torch.tensor([0])))


def test_a_resumed_run_must_hold_out_the_same_rows() -> None:
    source, target = domains()
    saved = DomainPairs(source, target, 4, seed=0).state_dict()
    DomainPairs(source, target, 4, seed=0).load_state_dict(saved)
    for other in (DomainPairs(source, target, 4, seed=1), DomainPairs(source, target, 4, held_out=None)):
        with pytest.raises(CheckpointError, match="held out other rows"):
            other.load_state_dict(saved)


def test_data_that_do_not_fit_are_refused() -> None:
    (x, y), target = domains()
    for source, aim, said in (
        ((x, y), target[:, :1], "inputs of one form"),
        (x, target, r"The source domain is \(input, target\)"),
        ((x, y.float()), target, "class indices int64"),
        ((x, y - 1), target, "class indices int64"),
        ({"input": x, "target": y, "domain": y - 1}, target, "domain numbers are >= 0"),
        ((x, y), torch.empty(0, 2), "must not be empty"),
    ):
        with pytest.raises(InputError, match=said):
            DomainPairs(source, aim)
    with pytest.raises(InputError, match="names row 70, and the target has rows 0 to 39"):
        DomainPairs((x, y), target, held_out=HeldOut(torch.arange(5), torch.tensor([70])))
