"""The methods behind `auto(policy=..., method=...)`: where each is defined. Nothing is imported until one is asked for."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from poise.call_text import parse_call
from poise.errors import InputError, nearest

METHODS: dict[str, dict[str, str]] = {
    "pareto": {
        "cagrad": "pareto.cagrad:CAGrad",
        "dynamic_average": "pareto.loss_scale:DynamicAverage",
        "epo": "pareto.epo:EPO",
        "fixed": "pareto.baselines:FixedPreference",
        "grad_norm": "pareto.grad_norm:GradNorm",
        "guided": "pareto.guided:GuidedPareto",
        "hypervolume": "pareto.hypervolume:HypervolumeGuidance",
        "imtl_g": "pareto.imtl:IMTLG",
        "imtl_l": "pareto.loss_scale:IMTLL",
        "influence": "pareto.influence:GradientInfluence",
        "loss_scale": "pareto.loss_scale:LossScale",
        "mgda": "pareto.mgda:MGDA",
        "nash_mtl": "pareto.nash_mtl:NashMTL",
        "normalised": "pareto.normalised:Normalised",
        "pcgrad": "pareto.pcgrad:PCGrad",
        "random": "pareto.baselines:RandomWeights",
        "uncertainty": "pareto.loss_scale:Uncertainty",
        "upgrad": "pareto.upgrad:UPGrad",
    },
    "bilevel": {
        "bo_rep": "bilevel.driven:bo_rep",
        "cg": "bilevel.online:cg",
        "hoag": "bilevel.driven:hoag",
        "maid": "bilevel.driven:maid",
        "neumann": "bilevel.online:neumann",
        "one_step": "bilevel.online:one_step",
        "penalty": "bilevel.driven:penalty",
        "self_tuning": "bilevel.self_tuning:SelfTuning",
    },
}
"""By policy, every method and what makes it within `poise.weights`, called with what is written behind the name."""
DEFAULTS = {"pareto": "upgrad", "bilevel": "one_step"}
"""The method of a policy where none is named."""
POLICIES = ("search", *METHODS)


def check_method(policy: str, method: str | None) -> None:
    """Refuse a policy or a method that does not exist.

    Raises:
        InputError: it names the nearest one.
    """
    if policy not in POLICIES:
        raise InputError(
            f"auto: policy {policy!r} is not known; this version has: {', '.join(POLICIES)}.{nearest(policy, POLICIES)}"
        )
    if method is None:
        return
    known = METHODS.get(policy, {})
    name = method.partition("(")[0].strip()
    if name not in known:
        there = f"its methods are {', '.join(known)}" if known else "it has no methods"
        raise InputError(f"auto: policy {policy!r} has no method {method!r}; {there}.{nearest(name, known)}")


def make_policy(policy: str, method: str | None = None) -> Any:
    """Make a policy from its names.

    Args:
        policy: "pareto" or "bilevel".
        method: one of its methods, alone or with arguments as in `"cagrad(c=0.4)"`; None for the default. A balancer also takes
            `on='trunk'`: the submodule on whose output gradients are weighed.

    Raises:
        InputError: the policy or the method does not exist.
        FormulaError: the arguments are no literals.
    """
    check_method(policy, method)
    known = METHODS[policy]
    text = method or DEFAULTS[policy]
    name, arguments = parse_call(text, known, "method", f"{DEFAULTS[policy]}")
    module_name, _, attribute = known[name].partition(":")
    module = importlib.import_module(f"poise.weights.{module_name}")
    made = getattr(module, attribute)
    features = arguments.pop("on", None) if policy == "pareto" else None
    # A function that stands for one method of a class says in its annotation which class takes the arguments.
    taking = made if isinstance(made, type) else getattr(module, made.__annotations__["return"])
    parameters = inspect.signature(taking).parameters
    if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        for argument in arguments:
            if argument not in parameters:
                raise InputError(f"{name} has no argument {argument!r}.{nearest(argument, parameters)}")
    found = made(**arguments)
    return found if features is None else found.on(features)


def find_policy(text: str) -> Any:
    """Make a policy from the name of a method alone: `"mgda"`, `"neumann(every=5)"`.

    Raises:
        InputError: no policy has such a method.
    """
    name = text.partition("(")[0].strip()
    for policy, known in METHODS.items():
        if name in known:
            return make_policy(policy, text)
        if name == policy:
            return make_policy(policy)
    every = [*METHODS, *(name for known in METHODS.values() for name in known)]
    raise InputError(f"There is no policy {text!r}; there is {', '.join(every)}.{nearest(name, every)}")
