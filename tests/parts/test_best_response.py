"""Gated layers: equal to the plain layer where gates are shut, and to explicit weights W(h_i) example by example."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from poise.errors import IncompatibleError, InputError
from poise.parts import (
    BestResponse,
    BestResponseConv2d,
    BestResponseEmbedding,
    BestResponseLinear,
    BestResponseLSTM,
    fold_best_response,
    make_best_response,
)
from poise.response_input import ResponseInput, response_input_of

N = 3


def opened(layer: Any) -> Any:
    """A layer in float64 whose gates are wide open, so that a wrong gate shows."""
    layer = layer.double()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith("gate"):
                p.normal_()
    return layer


def layers() -> dict[str, tuple[Any, Tensor]]:
    torch.manual_seed(0)
    return {
        "linear": (opened(BestResponseLinear(5, 4, N)), torch.randn(6, 5).double()),
        "linear without bias": (opened(BestResponseLinear(5, 4, N, bias=False)), torch.randn(6, 5).double()),
        "linear over time": (opened(BestResponseLinear(5, 4, N)), torch.randn(6, 2, 5).double()),
        "conv": (opened(BestResponseConv2d(4, 6, 3, N, padding=1)), torch.randn(6, 4, 5, 5).double()),
        "conv without bias": (opened(BestResponseConv2d(4, 6, 3, N, bias=False)), torch.randn(6, 4, 5, 5).double()),
        "conv in groups": (
            opened(BestResponseConv2d(4, 6, 3, N, stride=2, groups=2, padding=1, padding_mode="reflect")),
            torch.randn(6, 4, 5, 5).double(),
        ),
        "embedding": (opened(BestResponseEmbedding(7, 4, N)), torch.randint(7, (6, 3))),
        "lstm": (opened(BestResponseLSTM(5, 4, N, num_layers=2, batch_first=True)), torch.randn(6, 3, 5).double()),
        "lstm without bias": (opened(BestResponseLSTM(5, 4, N, bias=False, batch_first=True)), torch.randn(6, 3, 5).double()),
    }  # fmt: skip


def output(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize("kind", layers())
def test_each_example_goes_through_weights_of_its_own(kind: str) -> None:
    layer, x = layers()[kind]
    h = torch.randn(len(x), N, dtype=torch.float64)
    one_by_one = torch.cat([output(layer.plain(h[i])(x[i : i + 1])) for i in range(len(x))])
    torch.testing.assert_close(output(layer(x, h=h)), one_by_one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", layers())
def test_shut_gates_give_the_plain_layer_bit_for_bit(kind: str) -> None:
    layer, x = layers()[kind]
    plain = layer.plain(torch.zeros(N))
    if isinstance(layer, BestResponseLSTM):  # another order of summation inside PyTorch's fused kernel
        torch.testing.assert_close(output(layer(x)), output(plain(x)), rtol=1e-12, atol=1e-12)
        return
    assert torch.equal(output(layer(x)), output(plain(x)))


@pytest.mark.parametrize("sizes", [(64, 256, 50), (256, 256, 128), (17, 33, 9)])
def test_zero_gate_weights_give_the_plain_layer_bit_for_bit_at_any_hyperparameters(sizes: tuple[int, int, int]) -> None:
    wide, out, batch = sizes
    layer = BestResponseLinear(wide, out, N)
    with torch.no_grad():
        layer.gate.zero_()
    x = torch.randn(batch, wide)
    plain = functional.linear(x, layer.weight[:out], None) + layer.bias
    assert torch.equal(layer(x, h=torch.randn(batch, N)), plain)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 5), wide=st.integers(1, 5), out=st.integers(1, 5), n=st.integers(1, 4))
def test_the_formula_of_the_layer_holds_for_every_size(batch: int, wide: int, out: int, n: int) -> None:
    layer = opened(BestResponseLinear(wide, out, n))
    x, h = torch.randn(batch, wide, dtype=torch.float64), torch.randn(batch, n, dtype=torch.float64)
    elementary, answering = layer.weight[:out], layer.weight[out:]
    v, c = layer.gate[:out], layer.gate[out:]
    expected = x @ elementary.T + layer.bias + (h @ v.T) * (x @ answering.T) + (h @ c.T) * layer.bias_hyper
    torch.testing.assert_close(layer(x, h=h), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", layers())
def test_gradients_of_inputs_weights_and_hyperparameters_are_difference_quotients(kind: str) -> None:
    layer, x = layers()[kind]
    h = torch.randn(len(x), N, dtype=torch.float64, requires_grad=True)
    names = [name for name, p in layer.named_parameters()]

    def run(h: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return output(torch.func.functional_call(layer, values, (x,), {"h": h})).sin().sum()

    assert torch.autograd.gradcheck(run, (h, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("kind", layers())
def test_what_answers_has_no_effect_where_gates_are_shut_and_the_rest_has(kind: str) -> None:
    layer, x = layers()[kind]
    layer(x, h=torch.zeros(1, N, dtype=torch.float64))
    output(layer(x, h=torch.zeros(1, N, dtype=torch.float64))).sin().sum().backward()
    answering = layer.answering()
    assert set(answering) == {name for name, _ in layer.named_parameters()}
    for name, p in layer.named_parameters():
        mask = answering[name].expand_as(p)
        assert not p.grad[mask].any()
        assert (p.grad[~mask] != 0).all() or "embedding" in kind


def test_examples_may_lie_along_another_axis() -> None:
    layer = opened(BestResponseLinear(5, 4, N, batch_axis=1))
    x, h = torch.randn(3, 6, 5, dtype=torch.float64), torch.randn(6, N, dtype=torch.float64)
    first = opened(BestResponseLinear(5, 4, N))
    first.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, h=h).transpose(0, 1), first(x.transpose(0, 1), h=h))


def test_an_lstm_of_pytorch_is_taken_over_with_its_state() -> None:
    plain = nn.LSTM(5, 4, num_layers=2, batch_first=False)
    gated = BestResponseLSTM.of(plain, N)
    x, state = torch.randn(3, 6, 5), (torch.randn(2, 6, 4), torch.randn(2, 6, 4))
    for got, expected in zip(_flat(gated(x, state)), _flat(plain(x, state)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def _flat(result: Any) -> tuple[Tensor, Tensor, Tensor]:
    return result[0], *result[1]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.conv = nn.Conv2d(1, 2, 3, padding=1, groups=1)
        self.head = nn.Sequential(nn.Linear(2 * 3 * 5, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.rnn(self.embed(tokens))[0]
        return self.head(self.conv(features[:, None]).flatten(1))


def test_the_converter_keeps_the_outputs_and_one_input_serves_all_layers() -> None:
    model, tokens = Small(), torch.randint(7, (4, 3))
    before = model(tokens)
    inputs = make_best_response(model, N)
    torch.testing.assert_close(model(tokens), before, rtol=1e-5, atol=1e-6)
    assert response_input_of(model) is inputs
    assert sum(isinstance(m, BestResponse) for m in model.modules()) == 5
    inputs.place(torch.randn(4, N))
    assert not torch.allclose(model(tokens), before)
    inputs.place(None)
    torch.testing.assert_close(model(tokens), before, rtol=1e-5, atol=1e-6)


def test_a_model_stands_where_its_gates_were_settled_after_saving_copying_and_folding() -> None:
    model, tokens = Small(), torch.randint(7, (4, 3))
    inputs = make_best_response(model, N)
    inputs.settle(torch.tensor([1.0, -2.0, 0.5]))
    inputs.place(torch.randn(4, N, requires_grad=True) * 1)
    twin = copy.deepcopy(model)  # what is placed is not copied
    inputs.place(None)
    after = model(tokens)
    assert torch.equal(twin(tokens), after)
    fresh = Small()
    make_best_response(fresh, N)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(tokens), after)
    folded = fold_best_response(model)
    assert not any(isinstance(m, BestResponse) for m in folded.modules())
    assert isinstance(folded.rnn, nn.LSTM)  # type: ignore[union-attr]
    torch.testing.assert_close(folded(tokens), after, rtol=1e-5, atol=1e-6)


def test_layers_are_chosen_by_name_and_bad_choices_are_refused() -> None:
    model = Small()
    make_best_response(model, 1, include=["head.*"], exclude=["head.2"])
    assert [n for n, m in model.named_modules() if isinstance(m, BestResponse)] == ["head.0"]
    with pytest.raises(InputError, match="already"):
        make_best_response(model, 1)
    with pytest.raises(InputError, match="no linear"):
        make_best_response(Small(), 1, include=["tail"])
    with pytest.raises(InputError, match="wrap it"):
        make_best_response(nn.Linear(2, 2), 1)
    with pytest.raises(InputError, match="at least 1"):
        make_best_response(Small(), 0)
    with pytest.raises(InputError, match="two directions"):
        make_best_response(nn.Sequential(nn.LSTM(2, 2, bidirectional=True)), 1)
    with pytest.raises(InputError, match="sparse"):
        make_best_response(nn.Sequential(nn.Embedding(2, 2, sparse=True)), 1)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match="are one weight"):
        make_best_response(tied, 1)


def test_rows_for_other_examples_and_another_number_of_hyperparameters_are_refused() -> None:
    layer = BestResponseLinear(5, 4, N)
    with pytest.raises(InputError, match="rows for 2 examples"):
        layer(torch.zeros(3, 5), h=torch.ones(2, N))
    with pytest.raises(InputError, match="3 inputs"):
        layer.inputs.place(torch.zeros(3, N + 1))
    with pytest.raises(InputError, match=r"\[time, batch, in\]"):
        BestResponseLSTM(2, 2, N)(torch.zeros(3, 2))
    with pytest.raises(InputError, match="n_hyper is 3"):
        BestResponseLinear(2, 2, 3, inputs=ResponseInput(2))


def test_a_model_without_gates_or_with_several_inputs_is_told_so() -> None:
    with pytest.raises(IncompatibleError, match="identically zero"):
        response_input_of(nn.Linear(2, 2))
    with pytest.raises(IncompatibleError, match="2 inputs of their own"):
        response_input_of(nn.Sequential(BestResponseLinear(2, 2, 1), BestResponseLinear(2, 2, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers_run_in_the_dtype_of_their_weights_and_the_point_stays_in_float64(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    inputs = make_best_response(model, 1)
    inputs.settle(torch.ones(1))
    model.to(dtype)
    assert model(torch.zeros(2, 3, dtype=dtype)).dtype == dtype
    assert inputs.point.dtype == torch.float64
