"""The token record of small models: what the readout offers agrees with distributions of PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from poise.errors import InputError
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.tokens import TokenReadout
from poise.tasks.words import WordModel, sample, token_logps

MODEL = WordModel(width=8, hidden=16, seed=1).double()


def record(side: str = "response", policy: WordModel | None = None) -> Quantities:
    drawn = sample(MODEL, 6, torch.Generator().manual_seed(0))
    batch = Quantities({f"{side}_ids": drawn.ids, f"{side}_mask": drawn.mask})
    return TokenReadout(MODEL)(ModelView(policy or WordModel(width=8, hidden=16, seed=2).double()), batch, frozenset())


def test_the_readout_offers_the_token_record_of_each_side() -> None:
    for side in ("response", "chosen", "rejected"):
        q = record(side)
        mask, logits, reference = q[f"{side}_mask"], q[f"{side}_logits"], MODEL(q[f"{side}_ids"])
        p, r = Categorical(logits=logits), Categorical(logits=reference)
        expected = {
            "logps": token_logps(lambda _, logits=logits: logits, q[f"{side}_ids"], mask),
            "entropy": p.entropy() * mask,
            "logsumexp": logits.logsumexp(-1) * mask,
            "kl": kl_divergence(r, p) * mask,
            "reverse_kl": kl_divergence(p, r) * mask,
        }
        for name, value in expected.items():
            torch.testing.assert_close(q[f"{side}_{name}"], value)
        torch.testing.assert_close(q[f"reference_{side}_entropy"], r.entropy() * mask)
        torch.testing.assert_close(
            q[f"reference_{side}_logps"], token_logps(MODEL, q[f"{side}_ids"], mask).detach(), check_device=False
        )
        assert q[f"{side}_states"].shape == (2, *mask.shape, 16)
        assert bool((q[f"{side}_positions"][:, 0] == 0).all())
        assert q[f"{side}_logps"].requires_grad
        assert not q[f"reference_{side}_logps"].requires_grad


def test_on_pairs_response_is_another_name_for_chosen() -> None:
    q = record("chosen")
    assert q["response_logps"] is q["chosen_logps"]
    assert q["reference_response_logps"] is q["reference_chosen_logps"]
    assert q["response_ids"] is q["chosen_ids"]


def test_the_readout_says_what_it_misses() -> None:
    with pytest.raises(InputError, match="TokenReadout reads 'response_ids'"):
        TokenReadout()(ModelView(MODEL), Quantities({"input": torch.ones(1)}), frozenset())
