"""Pairs whose two answers come from the model itself or from elsewhere, in any combination.

DPO's side effects depend on where the two answers come from. With the model's own scored answers and pairs from elsewhere to
the same prompts, the four scenarios are

    own = best_and_worst(sampled)                       # sampled: several scored answers to each prompt
    mix_sources(own, others, chosen="off", rejected="on")

and both on-policy is what the authors recommend. Nothing here calls a model; `poise.readouts.on_policy.collect` samples.
Source: arXiv:2406.07327, sections 3 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["best_and_worst", "mix_sources"]

Batch = dict[str, Tensor]
Source = Literal["on", "off"]


def best_and_worst(sampled: Mapping[str, Tensor]) -> Batch:
    """Make one pair for each prompt of its best and its worst answer; prompts whose answers are all equally good are left out.

    Args:
        sampled: `reward` float [n], `group` (or `index`) int64 [n], the prompt that a row answers, and `response_*` columns [n, ...].

    Returns: `chosen_*` and `rejected_*` columns, `group` int64 [pairs] and `reward_gap` float [pairs].

    Raises:
        InputError: a column is missing, or no prompt has answers of different rewards.

    >>> ids = torch.tensor([[1], [2], [3], [4]])
    >>> sampled = {"response_ids": ids, "reward": torch.tensor([0.0, 1.0, 5.0, 5.0]), "group": torch.tensor([0, 0, 1, 1])}
    >>> best_and_worst(sampled)["chosen_ids"].tolist()
    [[2]]
    """
    place = "group" if "group" in sampled else "index"
    answers = [name for name in sampled if name.startswith(("response_", "reference_response_"))]
    if place not in sampled or "reward" not in sampled or not answers:
        raise InputError(
            f"best_and_worst reads 'group' (or 'index'), 'reward' and 'response_*', and was given {', '.join(sampled)}."
        )
    group, reward = sampled[place], sampled["reward"]
    # A stable sort by reward, then by prompt: the first row of a prompt is its worst answer, the last its best.
    order = reward.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    prompts, counts = torch.unique_consecutive(group[order], return_counts=True)
    last = counts.cumsum(0) - 1
    worst, best = order[last - counts + 1], order[last]
    apart = reward[best] > reward[worst]
    if not bool(apart.any()):
        raise InputError("best_and_worst: no prompt has answers of different rewards, so there is no pair.")
    best, worst = best[apart], worst[apart]
    pairs: Batch = {"group": prompts[apart], "reward_gap": reward[best] - reward[worst]}
    for name in answers:
        pairs[name.replace("response_", "chosen_")] = sampled[name][best]
        pairs[name.replace("response_", "rejected_")] = sampled[name][worst]
    return pairs


def mix_sources(
    on_policy: Mapping[str, Tensor], off_policy: Mapping[str, Tensor], *, chosen: Source = "on", rejected: Source = "on"
) -> Batch:
    """Take the chosen and the rejected answer of each prompt from the model's own pairs or from others.

    Args:
        on_policy, off_policy: pairs with `group` int64 [pairs], the prompt; one pair for each prompt. Prompts that only one of
            the two has are left out, so that all four scenarios have the same prompts.
        chosen, rejected: "on" or "off".

    Returns: the `chosen_*` columns of one, the `rejected_*` columns of the other, and `group`.

    Raises:
        InputError: no `group`, several pairs for one prompt, or no prompt in common.

    >>> own = {"group": torch.tensor([3, 7]), "chosen_ids": torch.tensor([[1], [2]]), "rejected_ids": torch.tensor([[3], [4]])}
    >>> others = {"group": torch.tensor([7]), "chosen_ids": torch.tensor([[5]]), "rejected_ids": torch.tensor([[6]])}
    >>> mixed = mix_sources(own, others, chosen="off", rejected="on")
    >>> mixed["chosen_ids"].tolist(), mixed["rejected_ids"].tolist()
    ([[5]], [[4]])
    """
    sources = {"on": on_policy, "off": off_policy}
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if value not in sources:
            raise InputError(f"mix_sources: {name} is 'on' or 'off', and it is {value!r}.")
    for name, pairs in (("on_policy", on_policy), ("off_policy", off_policy)):
        if "group" not in pairs:
            raise InputError(f"mix_sources: {name} needs 'group', the prompt that each pair answers.")
        if len(torch.unique(pairs["group"])) != len(pairs["group"]):
            raise InputError(f"mix_sources: {name} has several pairs for one prompt; best_and_worst makes one of each.")
    common = on_policy["group"][torch.isin(on_policy["group"], off_policy["group"])].sort().values
    if not len(common):
        raise InputError("mix_sources: no prompt is in both, so nothing can be mixed.")
    mixed: Batch = {"group": common}
    for side, source in (("chosen", sources[chosen]), ("rejected", sources[rejected])):
        order = source["group"].argsort()
        rows = order[torch.searchsorted(source["group"][order], common)]
        for name, column in source.items():
            if name.startswith((f"{side}_", f"reference_{side}_")):
                mixed[name] = column[rows]
    return mixed
