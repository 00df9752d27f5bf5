"""Tables of gradients: on parameters and on features they give the Gram matrix and the update that plain autograd gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.errors import InputError, StateError
from poise.weights.feature_table import FeatureTable, features_of
from poise.weights.gradient_table import GradientTable, products
from two_processes import on_two

F64 = torch.float64


class Net(nn.Module):
    """A trunk, a head for each term, and a layer that all heads pass where `common` says so."""

    def __init__(self, terms: int = 3, common: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
        self.common = nn.Linear(4, 4) if common else nn.Identity()
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(terms)])
        self.double()

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.common(torch.tanh(self.trunk(x)))
        return [head(z).squeeze(-1) for head in self.heads]


def data(rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 5, generator=generator, dtype=F64), torch.randn(rows, generator=generator, dtype=F64)


def losses_of(model: Net, x: Tensor, y: Tensor, share: float = 1.0) -> list[Tensor]:
    return [share * F.mse_loss(out, (i + 1) * y) for i, out in enumerate(model(x))]


def test_a_table_of_losses_holds_the_gradients_of_autograd() -> None:
    model, (x, y) = Net(), data()
    parameters = dict(model.named_parameters())
    losses = losses_of(model, x, y)
    table = GradientTable.of(dict(zip("abc", losses, strict=True)), parameters)
    assert set(table.shared) == {n for n in parameters if n.startswith("trunk")}
    again, shared = losses_of(model, x, y), [parameters[n] for n in table.shared]
    rows = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(v, shared, retain_graph=True)]) for v in again]
    )
    torch.testing.assert_close(table.gram, rows @ rows.T)
    torch.testing.assert_close(table.values, torch.stack(losses).detach())


def test_a_combination_weighs_the_trunk_and_leaves_the_heads() -> None:
    model, (x, y) = Net(), data()
    parameters = dict(model.named_parameters())
    weights = torch.tensor([0.5, 2.0, -1.0], dtype=F64)
    found = GradientTable.of(dict(zip("abc", losses_of(model, x, y), strict=True)), parameters).combine(weights)
    losses = losses_of(model, x, y)
    total = sum(w * v for w, v in zip(weights, losses, strict=True))
    for name, p in parameters.items():
        (expected,) = torch.autograd.grad(sum(losses) if "heads" in name else total, p, retain_graph=True)  # type: ignore[arg-type]
        torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize("entries", [10, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inner_products_do_not_depend_on_how_they_are_gathered(entries: int, dtype: torch.dtype) -> None:
    rows = [torch.randn(entries, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4)]
    exact = torch.stack(rows).double() @ torch.stack(rows).double().T
    # Rounding of a sum of n products of size 1 in float32.
    torch.testing.assert_close(products(rows).double(), exact, atol=1e-6 * entries**0.5 * 10, rtol=1e-5)


@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_feature_table_has_the_gram_matrix_and_the_update_of_the_features(common: bool, parts: int) -> None:
    model, (x, y) = Net(common=common), data()
    parameters = dict(model.named_parameters())
    table = FeatureTable(("a", "b", "c"), parameters)
    for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
        with features_of(model, "trunk") as seen:
            losses = losses_of(model, xs, ys, share=1 / parts)
        table.add(losses, seen)
    z = model.trunk(x).detach().requires_grad_()
    outs = [head(model.common(torch.tanh(z))).squeeze(-1) for head in model.heads]
    whole = [F.mse_loss(out, (i + 1) * y) for i, out in enumerate(outs)]
    rows = torch.stack([torch.autograd.grad(v, z, retain_graph=True)[0].flatten() for v in whole])
    torch.testing.assert_close(table.gram, rows @ rows.T)
    torch.testing.assert_close(table.values, torch.stack(whole).detach())
    weights = torch.tensor([0.5, 2.0, 1.5], dtype=F64)
    found = table.combine(weights)
    losses = losses_of(model, x, y)
    total = sum(w * v for w, v in zip(weights, losses, strict=True))
    assert set(found) == set(parameters)
    for name, p in parameters.items():
        (expected,) = torch.autograd.grad(sum(losses) if "heads" in name else total, p, retain_graph=True)  # type: ignore[arg-type]
        torch.testing.assert_close(found[name], expected)


def test_what_is_not_weighed_adds_its_whole_gradient() -> None:
    model, (x, y) = Net(), data()
    parameters = dict(model.named_parameters())

    def rest(losses: list[Tensor]) -> Tensor:
        return 0.1 * losses[2] + 0.01 * sum((p * p).sum() for p in parameters.values())

    table = FeatureTable(("a", "b"), parameters)
    with features_of(model, "trunk") as seen:
        losses = losses_of(model, x, y)
    table.add(losses[:2], seen, rest=rest(losses))
    found = table.combine(torch.tensor([1.0, 3.0], dtype=F64))
    losses = losses_of(model, x, y)
    for name, p in parameters.items():
        weighted = losses[0] + (1.0 if "heads" in name else 3.0) * losses[1] + rest(losses)
        (expected,) = torch.autograd.grad(weighted, p, retain_graph=True)
        torch.testing.assert_close(found[name], expected)


def test_a_trunk_is_passed_once_whatever_the_number_of_terms() -> None:
    for terms in (2, 8):
        model, (x, y), passes = Net(terms), data(), []
        model.trunk[2].register_full_backward_hook(lambda *_, seen=passes: seen.append(1))
        table = FeatureTable([str(i) for i in range(terms)], dict(model.named_parameters()))
        with features_of(model, "trunk") as seen:
            losses = losses_of(model, x, y)
        table.add(losses, seen)
        table.combine(torch.ones(terms))
        assert len(passes) == 1


def test_a_term_that_does_not_act_on_a_micro_batch_has_a_zero_row_there() -> None:
    model, (x, y) = Net(), data()
    table = FeatureTable(("a", "b", "c"), dict(model.named_parameters()))
    for number in range(2):
        with features_of(model, "trunk") as seen:
            losses: list[Tensor | None] = list(losses_of(model, x, y))
        if number == 0:
            losses[1] = None
        table.add(losses, seen)
    assert float(table.gram[0, 0] / table.gram[1, 1]) > 0
    torch.testing.assert_close(table.values[0], 2 * torch.as_tensor(losses_of(model, x, y)[0]).detach())
    torch.testing.assert_close(table.values[1], torch.as_tensor(losses_of(model, x, y)[1]).detach())


def _other_way(model: Net, x: Tensor, y: Tensor) -> None:
    table = FeatureTable(("a", "b"), dict(model.named_parameters()))
    with features_of(model, "trunk") as seen:
        losses = losses_of(model, x, y)
    table.add([losses[0], losses[1] + model.trunk[0].weight.square().sum()], seen)


def _behind(model: Net, x: Tensor, y: Tensor) -> None:
    table = FeatureTable(("a", "b"), dict(model.named_parameters()))
    with features_of(model, "trunk.0") as first, features_of(model, "trunk.2") as second:
        losses = losses_of(model, x, y)
    table.add(losses[:2], [*first, *second])


def _detached(model: Net, x: Tensor, y: Tensor) -> None:
    losses = losses_of(model, x, y)
    FeatureTable(("a", "b"), dict(model.named_parameters())).add(losses[:2], [model.trunk(x).detach()])


def _independent(model: Net, x: Tensor, y: Tensor) -> None:
    table = FeatureTable(("a", "b"), dict(model.named_parameters()))
    with features_of(model, "trunk") as seen:
        losses = losses_of(model, x, y)
    table.add([losses[0], model.heads[1].weight.square().sum()], seen)
    _ = table.gram


def _nowhere(model: Net, x: Tensor, y: Tensor) -> None:
    with features_of(model, "body"):
        pass


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (_other_way, "b reaches trunk.0.weight of the trunk on a way around"),
        (_behind, "lies behind another"),
        (_detached, "do not detach"),
        (_independent, "b does not depend on the features"),
        (_nowhere, "no submodule 'body'"),
    ],
)
def test_features_that_cannot_be_balanced_are_refused(
    mistake: Callable[[Net, Tensor, Tensor], None], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        mistake(Net(), *data())


def test_the_features_are_pulled_back_once() -> None:
    model, (x, y) = Net(), data()
    table = FeatureTable(("a", "b", "c"), dict(model.named_parameters()))
    with features_of(model, "trunk") as seen:
        losses = losses_of(model, x, y)
    table.add(losses, seen)
    table.combine(torch.ones(3))
    with pytest.raises(StateError, match="pulled back already"):
        table.combine(torch.ones(3))


def test_terms_that_share_nothing_are_refused() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(InputError, match="nothing to balance"):
        GradientTable.of({"a": a.sum(), "b": b.sum()}, {"a": a, "b": b})


def _features_here(accumulate: int) -> dict[str, Tensor]:
    from poise import processes

    model, (x, y) = Net(), data()
    table = FeatureTable(("a", "b", "c"), dict(model.named_parameters()))
    size, rank = processes.size(), processes.rank()
    share = 1 / size / accumulate
    for xs, ys in list(zip(x.chunk(size * accumulate), y.chunk(size * accumulate), strict=True))[rank::size]:
        with features_of(model, "trunk") as seen:
            losses: list[Tensor | None] = list(losses_of(model, xs, ys, share))
        if size > 1 and rank == 1:
            losses[2] = None  # a term with no example here
        table.add(losses, seen)
    weights = torch.tensor([0.5, 2.0, 1.5], dtype=F64)
    return {"gram": table.gram, "values": table.values, **table.combine(weights)}


def test_two_processes_have_the_gram_matrix_of_one(tmp_path: Path) -> None:
    first, second = on_two(_features_here, tmp_path, 2)
    one = _features_here(1)
    assert first.keys() == second.keys() == one.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value)
    torch.testing.assert_close(first["gram"][:2, :2], one["gram"][:2, :2])
    torch.testing.assert_close(first["values"][:2], one["values"][:2])
    torch.testing.assert_close(first["heads.0.weight"], one["heads.0.weight"])
