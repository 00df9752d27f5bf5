"""Streams of a model's activations: what is taken, in which order, and how they resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import IncompatibleError, InputError
from poise.parts import SparseAutoencoder
from poise.readouts import ActivationStream, Autoencoding, activations_of


class Tokens(nn.Module):
    """A small model of token sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(20, 6), nn.Linear(6, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(self.embed(input_ids)).tanh() * attention_mask[..., None]


def inputs(rows: int = 30) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.randint(1, 8, (rows, 1), generator=g)
    return {"input_ids": torch.randint(20, (rows, 7), generator=g), "attention_mask": mask}


def drawn(stream: ActivationStream, steps: int) -> list[Tensor]:
    draw = stream.iterate(0)
    return [next(draw)[0]["input"] for _ in range(steps)]


def stream(**options: object) -> ActivationStream:
    given = {"batch_size": 16, "buffer": 48, "inputs_a_pass": 4, **options}
    made = ActivationStream(Tokens(), "layer", inputs(), **given)
    return made.prepare("main", 0, torch.device("cpu"))


def test_padding_is_left_out_and_nothing_else() -> None:
    model, batch = Tokens(), inputs()
    found = activations_of(model, "layer", batch, batch_size=7)
    whole = model.layer(model.embed(batch["input_ids"]))
    torch.testing.assert_close(found, whole[batch["attention_mask"]])
    assert not found.requires_grad
    assert model.training


def test_in_order_a_pass_serves_every_activation_but_the_last_few() -> None:
    many = int(inputs()["attention_mask"].sum())
    served = stream(shuffle=False, buffer=10**3 if many < 1000 else many, batch_size=16)
    every = activations_of(served.model, "layer", inputs())
    torch.testing.assert_close(torch.cat(drawn(served, many // 16)), every[: many // 16 * 16])


def test_the_order_is_that_of_the_seed_and_mixes_inputs() -> None:
    one, same = drawn(stream(), 8), drawn(stream(), 8)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    other = ActivationStream(Tokens(), "layer", inputs(), batch_size=16, buffer=48, inputs_a_pass=4)
    other.prepare("main", 1, torch.device("cpu"))
    assert not torch.equal(drawn(other, 1)[0], one[0])
    cut = stream()
    cut.prepare("main", 0, torch.device("cpu"), accumulate=3)
    micros = next(cut.iterate(0))
    torch.testing.assert_close(torch.cat([m["input"] for m in micros]), one[0])


def test_a_stream_resumes_at_the_batch_where_it_was() -> None:
    whole = drawn(stream(), 9)
    for stop in range(9):
        first = stream()
        drawn(first, stop)
        later = stream()
        later.load_state_dict(first.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(drawn(later, 9 - stop), whole[stop:], strict=True))


def test_a_selection_takes_part_of_a_pass() -> None:
    kept = torch.cat(drawn(stream(select=lambda a: a[a[:, 0] > 0]), 4))
    assert bool((kept[:, 0] > 0).all())


def test_a_fit_on_a_stream_resumes(tmp_path: Path) -> None:
    def run(steps_checkpoint: Path | None, stop: int | None) -> SparseAutoencoder:
        sae = SparseAutoencoder(6, 24, "top_k(k=3)")
        halt = type("Halt", (), {"on_step_end": lambda self, state: _halt(state.step, stop)})()
        poise.fit(
            sae, "reconstruction", stream(), readout=Autoencoding(), solver="adam", lr=1e-2, steps=7, callbacks=[halt],
            checkpoint=steps_checkpoint, checkpoint_steps=2,
        )  # fmt: skip
        return sae

    def _halt(step: int, stop: int | None) -> None:
        if step == stop:
            raise KeyboardInterrupt

    whole = run(None, None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 5)
    resumed = run(tmp_path, None)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="no module 'nought'"):
        activations_of(Tokens(), "nought", inputs())
    with pytest.raises(InputError, match="buffer at least a batch"):
        stream(buffer=8)
    with pytest.raises(InputError, match="two passes over the inputs"):
        drawn(stream(batch_size=1000, buffer=1000), 1)
    silent = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    silent.forward = silent["a"].forward  # type: ignore[method-assign]
    with pytest.raises(IncompatibleError, match="gave nothing"):
        activations_of(silent, "b", torch.ones(3, 2))
