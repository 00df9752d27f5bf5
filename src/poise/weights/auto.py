"""`auto`: a weight that the library finds.

`auto` marks the place and the range; a policy owns the value. `search` (the default) tries values over whole runs
(`poise compare --tune`, `poise.Study(tune=...)`) and resolves every `auto` to a number before a run starts. `pareto` and
`bilevel` move it while the one run goes on:

    auto                                          searched over runs
    auto(policy="pareto", method="mgda")          weighed by the terms' gradients
    auto(policy="bilevel", method="one_step")     moved down the gradient of the validation objective
"""

from __future__ import annotations

from dataclasses import dataclass

from poise.coefficient import Clock, Coefficient, text
from poise.errors import IncompatibleError, InputError
from poise.weights.policies import check_method


@dataclass(frozen=True, repr=False)
class Auto(Coefficient):
    """A weight to be found, in `[low, high]`.

    Args:
        name: what the weight is called; two `auto` of one name are one weight. Without a name it is called after its term.
        low, high: the range, both positive; a search is log-uniform in it, and a bilevel policy begins at its geometric middle.
            Balancers do not look at it: they weigh gradients against each other.
        policy: which policy finds it: "search", "pareto" or "bilevel".
        method: which of its methods, with arguments where it has some: "mgda", "cagrad(c=0.4)". None for the policy's default.

    Called, it returns a copy with other arguments, so that `auto` and `auto(low=0.1)` both work in a formula.

    >>> str(auto(low=0.1, high=10))
    'auto(low=0.1, high=10)'
    """

    name: str | None = None
    low: float = 1e-3
    high: float = 1e2
    policy: str = "search"
    method: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < float("inf"):
            raise InputError(
                f"auto: the range must be 0 < low < high, both finite, and it is [{self.low}, {self.high}]."
            )
        check_method(self.policy, self.method)

    def __call__(
        self,
        name: str | None = None,
        *,
        low: float = 1e-3,
        high: float = 1e2,
        policy: str = "search",
        method: str | None = None,
    ) -> Auto:
        return Auto(name, low, high, policy, method)

    def value(self, clock: Clock) -> float:
        called = f" {self.name!r}" if self.name else ""
        raise IncompatibleError(
            f"The weight{called} is 'auto' and nothing has set it yet. Search it with poise.Study(..., tune=10) or "
            "`poise compare --tune 10`, hand poise.fit a policy that sets it (policy='bilevel'), or set it with "
            "objective.resolve({name: value})."
        )

    def __str__(self) -> str:
        arguments = [repr(self.name)] if self.name else []
        arguments += [f"low={text(self.low)}"] if self.low != 1e-3 else []
        arguments += [f"high={text(self.high)}"] if self.high != 1e2 else []
        arguments += [f"policy={self.policy!r}"] if self.policy != "search" else []
        arguments += [f"method={self.method!r}"] if self.method is not None else []
        return f"auto({', '.join(arguments)})" if arguments else "auto"


auto = Auto()
