"""What can go wrong, in one small hierarchy.

Every message is written for the person who will read it: what was expected, what came, and what to do.
The command line prints these errors as one paragraph and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PoiseError(Exception):
    """Base of every error that Poise raises on purpose."""


class InputError(PoiseError, ValueError):
    """An argument, a file or a data set does not fit."""


class QuantityError(PoiseError, ValueError):
    """A term reads a quantity that is missing, or that has the wrong shape, dtype or range."""


class FormulaError(PoiseError, ValueError):
    """A formula does not parse; the message carries the text with a caret under the place."""


class IncompatibleError(PoiseError, TypeError):
    """A solver, policy or readout lacks what an objective needs, or the other way round."""


class NonFiniteError(PoiseError, ArithmeticError):
    """A term became infinite or NaN during training."""


class CheckpointError(PoiseError, RuntimeError):
    """A checkpoint cannot be read or does not belong to this run."""


class StoreError(PoiseError, RuntimeError):
    """The store of a study cannot be opened, read or written."""


class StateError(PoiseError, RuntimeError):
    """A stateful objective is used out of order, for instance stepped without `advance`."""


class Interrupted(KeyboardInterrupt):
    """The user stopped a run; the message says what is saved and how to go on."""


class MissingDependencyError(PoiseError, ImportError):
    """An optional library is not installed; the message gives the line that installs it."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed. Install it with: pip install 'poise[{extra}]'"
        )
        self.library = library
        self.extra = extra


class PoiseWarning(UserWarning):
    """Something the user should know that does not stop the work."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the known name nearest to `name`, or an empty string.

    >>> nearest("cross_entorpy", ["cross_entropy", "l2"])
    " Did you mean 'cross_entropy'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
