"""Paper 60: learned and given masks, exactly."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import poise
from poise.errors import FormulaError, QuantityError
from poise.parts.token_mask import TokenMask
from poise.terms.preference import DPO, SparsePO

from .records import pairs

LAYERS, WIDTH = 3, 5
LEARNED = f"layers={LAYERS}, width={WIDTH}, dropout=0.0"
SIDES = ("chosen", "rejected")


def record(seed: int = 0) -> dict[str, Tensor]:
    q = pairs(seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    for side in SIDES:
        shape = q[f"{side}_kl"].shape
        q[f"{side}_states"] = torch.randn(LAYERS, *shape, WIDTH, generator=g, dtype=torch.float64)
    return q


def at_reference(q: dict[str, Tensor]) -> dict[str, Tensor]:
    same = {f"{s}_logps": q[f"reference_{s}_logps"] for s in SIDES}
    return {**q, **same, **{f"{s}_kl": torch.zeros_like(q[f"{s}_kl"]) for s in SIDES}}


def value(text: str, q: dict[str, Tensor]) -> Tensor:
    return poise.parse(text)(q)


def test_masks_of_one_are_tdpo_and_without_divergence_dpo() -> None:
    q = record()
    ones = {f"{s}_token_weight": torch.ones_like(q[f"{s}_kl"]) for s in SIDES}
    tdpo = value("tdpo(beta=0.3, version=1)", q).item()
    assert value("sparse_po(beta=0.3, reward='ones', kl='ones')", q).item() == pytest.approx(tdpo, abs=1e-14)
    assert value("sparse_po(beta=0.3, mask_from='data')", {**q, **ones}).item() == pytest.approx(tdpo, abs=1e-14)
    assert value("sparse_po(beta=0.3, reward='ones', kl='none')", q).item() == pytest.approx(
        value("dpo(beta=0.3)", q).item(), abs=1e-14
    )
    assert value("sparse_po(mask_from='data', kl='none')", q).item() == pytest.approx(
        value("preference_margin(token_weight='data')", q).item(), abs=1e-14
    )


@pytest.mark.parametrize("masks", ["common", "independent"])
@pytest.mark.parametrize("kind", ["all", "last", "mlp", "random", "binary"])
def test_at_the_reference_every_mask_gives_log_2_and_learns_nothing(masks: str, kind: str) -> None:
    objective = poise.parse(f"sparse_po({LEARNED}, masks='{masks}', kind='{kind}')")
    loss = objective(at_reference(record()))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    parameters = list(objective.parameters())
    if parameters and loss.requires_grad:
        for g in torch.autograd.grad(loss, parameters, allow_unused=True):
            assert g is None or g.abs().max() == 0


def test_scaling_both_masks_is_scaling_beta() -> None:
    q = record()
    scaled = {**q, **{f"{s}_token_weight": 2.5 * q[f"{s}_token_weight"] for s in SIDES}}
    one = value("sparse_po(beta=0.2, mask_from='data')", scaled).item()
    assert one == pytest.approx(value("sparse_po(beta=0.5, mask_from='data')", q).item(), abs=1e-13)


def test_the_order_of_tokens_with_their_masks_does_not_matter() -> None:
    q = record()
    flipped = {k: v.flip(2) if k.endswith("states") else v.flip(1) if v.ndim == 2 else v for k, v in q.items()}
    text = f"sparse_po({LEARNED})"
    assert value(text, flipped).item() == pytest.approx(value(text, q).item(), abs=1e-13)


def test_a_token_with_mask_0_has_no_gradient() -> None:
    q = record()
    for side in SIDES:
        q[f"{side}_token_weight"][:, 0] = 0
        q[f"{side}_logps"].requires_grad_()
        q[f"{side}_kl"].requires_grad_()
    value("sparse_po(mask_from='data')", q).backward()
    for side in SIDES:
        assert (q[f"{side}_logps"].grad[:, 0] == 0).all()
        assert (q[f"{side}_kl"].grad[:, 0] == 0).all()
        assert q[f"{side}_logps"].grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["all", "last", "mlp"])
@pytest.mark.parametrize("masks", ["common", "independent"])
def test_the_gradient_runs_through_the_mask_network(kind: str, masks: str) -> None:
    q = record()
    objective = poise.parse(f"sparse_po(beta=0.7, {LEARNED}, kind='{kind}', masks='{masks}')").double()
    for name, parameter in objective.named_parameters():
        (found,) = torch.autograd.grad(objective(q), parameter)
        flat, step = parameter.detach().view(-1), 1e-6
        place = int(found.abs().argmax())
        before = flat[place].item()
        ends = []
        for sign in (1, -1):
            flat[place] = before + sign * step
            ends.append(objective(q).item())
        flat[place] = before
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(found.view(-1)[place].item(), rel=1e-4, abs=1e-9), name


def test_states_and_reference_get_no_gradient() -> None:
    q = record()
    q["chosen_states"].requires_grad_()
    q["reference_chosen_logps"].requires_grad_()
    value(f"sparse_po({LEARNED})", q).backward()
    assert q["chosen_states"].grad is None
    assert q["reference_chosen_logps"].grad is None


def test_independent_masks_are_two_networks_and_parameters_descend_with_the_model() -> None:
    common, apart = (poise.parse(f"sparse_po({LEARNED}, masks='{m}')") for m in ("common", "independent"))
    counts = [sum(p.numel() for p in o.parameters()) for o in (common, apart)]
    assert counts[1] == 2 * counts[0] > 0
    assert [g["player"] for g in apart.parameter_groups()] == ["min"]
    assert not list(poise.parse(f"sparse_po({LEARNED}, reward='ones', kl='none')").parameters())


def test_the_size_of_a_mask_is_charged_by_a_term_of_its_own() -> None:
    q = record()
    objective = poise.parse(f"sparse_po({LEARNED}) + 0.1*mask_l1.on(size='sparse_po.reward_size')")
    assert poise.parse(str(objective)).equals(objective)
    report = objective.evaluate(q)
    term = objective.terms["sparse_po"]
    sizes = sum(term.networks[0](q[f"{s}_states"], q[f"{s}_mask"]).sum(-1) for s in SIDES)
    assert report.terms["mask_l1"].value.item() == pytest.approx(sizes.mean().item(), rel=1e-6)
    alone = poise.parse(f"sparse_po({LEARNED})")
    alone.load_state_dict({k: v for k, v in objective.state_dict().items() if "mask_l1" not in k}, strict=False)
    name = "terms.sparse_po.networks.0.bias"
    with_l1, without = (torch.autograd.grad(o(q), dict(o.named_parameters())[name])[0] for o in (objective, alone))
    assert not torch.equal(with_l1, without)


def test_it_publishes_sparsity_masks_and_masked_divergences() -> None:
    q = record()
    term = SparsePO(layers=LAYERS, width=WIDTH, dropout=0.0)
    found = term(**{k: q[k] for k in term.reads}).extras
    for name in ("sparsity", "kl_sparsity"):
        assert ((found[name] >= 0) & (found[name] <= 1)).all()
    m = found["chosen_reward_mask"]
    assert m.shape == q["chosen_kl"].shape
    assert (m[~q["chosen_mask"]] == 0).all()
    assert (m >= 0).all()
    torch.testing.assert_close(found["chosen_kl"], (m * q["chosen_kl"]).sum(-1))
    assert {"margin", "chosen_reward", "rejected_reward", "accuracy"} <= set(found)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_its_state_is_exact(way: str) -> None:
    q = record()
    text = f"sparse_po(layers={LAYERS}, width={WIDTH}, masks='independent', dropout=0.3)"
    objective = poise.parse(text)
    optimizer = torch.optim.AdamW(objective.parameter_groups()[0]["params"], lr=0.05)
    objective.follow(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        objective(q).backward()
        optimizer.step()
    if way == "state_dict":
        twin = poise.parse(text)
        assert twin(q).item() != objective(q).item()
        twin.load_state_dict(copy.deepcopy(objective.state_dict()))
    else:
        twin = copy.deepcopy(objective) if way == "deepcopy" else pickle.loads(pickle.dumps(objective))
    assert torch.equal(twin(q), objective(q))


def test_dropout_draws_derived_numbers_and_rests_in_evaluation() -> None:
    q = record()
    objective = poise.parse(f"sparse_po(layers={LAYERS}, width={WIDTH}, dropout=0.5)")
    assert torch.equal(objective(q), objective(q))
    assert not torch.equal(objective(q), objective.eval()(q))


def test_the_mask_learns_the_tokens_that_matter() -> None:
    # Feature 0 of the states says which token carries the preference; elsewhere the log-ratio is noise.
    g = torch.Generator().manual_seed(0)
    batch, time = 64, 10
    q: dict[str, Tensor] = {}
    for side, sign in (("chosen", 1), ("rejected", -1)):
        matters = torch.arange(time) == torch.randint(time, (batch, 1), generator=g)
        noise = torch.randn(batch, time, generator=g)
        q[f"{side}_logps"] = torch.where(matters, 2.0 * sign, noise)
        q[f"reference_{side}_logps"] = torch.zeros(batch, time)
        q[f"{side}_mask"] = torch.ones(batch, time, dtype=torch.bool)
        q[f"{side}_states"] = torch.randn(2, batch, time, 4, generator=g)
        q[f"{side}_states"][..., 0] += 6 * matters
        q[f"{side}_matters"] = matters
    objective = poise.parse(
        "sparse_po(beta=1.0, layers=2, width=4, kl='none') + 0.005*mask_l1.on(size='sparse_po.reward_size')"
    )
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.03)
    objective.follow(optimizer)
    for _ in range(80):
        optimizer.zero_grad()
        objective(q).backward()
        optimizer.step()
    m = objective.terms["sparse_po"].networks[0](q["chosen_states"])
    matters = q["chosen_matters"]
    assert m[matters].mean() > 3 * m[~matters].mean()


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (f"sparse_po({LEARNED})", {"chosen_states": None}, "chosen_states"),
        ("sparse_po(layers=4, width=5)", {}, r"states are \[layers = 4, .*layers=3, width=5"),
        ("sparse_po(layers=3, width=6)", {}, r"width = 6\]"),
        ("sparse_po(mask_from='data')", {"rejected_token_weight": -1.0}, "masks are at least 0, and 'rejected_token_weight'"),
        ("sparse_po(reward='ones')", {}, None),
        (f"sparse_po({LEARNED})", {"chosen_mask": 0.0}, "the chosen answer of row 0 has no token"),
        (f"sparse_po({LEARNED})", {"chosen_logps": "sum"}, "masks need a log-probability for each token"),
    ],
)  # fmt: skip
def test_bad_data_is_refused(text: str, change: dict[str, object], message: str | None) -> None:
    q = record()
    for name, how in change.items():
        if how is None:
            del q[name]
        elif how == "sum":
            q[name] = q[name].sum(-1)
        else:
            q[name] = (q[name] * how).to(q[name].dtype)
    if message is None:
        with pytest.raises(FormulaError, match="needs the sizes of the reference"):
            poise.parse(text)
        return
    with pytest.raises(QuantityError, match=message):
        poise.parse(text)(q)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparse_po", "needs the sizes of the reference: layers= and width="),
        ("sparse_po(beta=0)", "sparse_po: beta must be positive"),
        ("sparse_po(mask_from='model')", "mask_from is one of 'states', 'data'"),
        ("sparse_po(masks='two')", "masks is one of 'common', 'independent'"),
        ("sparse_po(mask_from='data', masks='independent')", "are two networks"),
        ("sparse_po(kl='zero')", "kl is one of 'mask', 'ones', 'none'"),
        ("sparse_po(layers=2, width=0)", "at least 1"),
        ("sparse_po(layers=2, width=2, kind='some')", "kind is one of"),
        ("sparse_po(layers=2, width=2, activation='tanh')", "activation is 'relu', 'rescale' or None"),
        ("sparse_po(layers=2, width=2, dropout=1.0)", r"dropout is a share in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_refused(text: str, message: str) -> None:
    with pytest.raises(FormulaError, match=message):
        poise.parse(text)


def test_a_mask_of_zeros_leaves_log_2_without_gradient() -> None:
    q = record()
    term = SparsePO(layers=LAYERS, width=WIDTH)
    network = term.networks[0]
    assert isinstance(network, TokenMask)
    with torch.no_grad():
        network.mixer.zero_()
    found = term(**{k: q[k] for k in term.reads})
    assert torch.allclose(found.values, torch.full_like(found.values, math.log(2)))
    assert found.extras["sparsity"].eq(1).all()
    assert DPO is not None
