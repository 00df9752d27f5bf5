"""What studies and the command ask of a task and of one draw of its parts, whatever kind of data it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from poise.run import Run

__all__ = ["AnySplit", "AnyTask"]


class AnySplit(Protocol):
    """One draw of training, validation and test examples."""

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of each part, by "train", "valid" and "test"."""
        ...

    @property
    def warnings(self) -> list[str]:
        """What looks wrong in this draw, in words."""
        ...

    def few(self, rows: int) -> AnySplit:
        """Return the same draw with only the first examples of each part."""
        ...

    def measure(self, run: Run, part: str) -> dict[str, float]:
        """Return the metrics of a trained model on a part."""
        ...

    def details(self, run: Run) -> dict[str, Any]:
        """Return what a report shows beyond metrics and curves, as JSON; `curves` among it joins the run's curves."""
        ...


class AnyTask(Protocol):
    """Data with everything that a comparison needs; the attributes are those of `poise.tasks.Task`."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def target_type(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...] | None: ...

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    @property
    def examples(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def notes(self) -> list[str]: ...

    @property
    def warnings(self) -> list[str]: ...

    @property
    def primary(self) -> str: ...

    @property
    def direction(self) -> str: ...

    @property
    def metric_names(self) -> tuple[str, ...]: ...

    @property
    def usual_epochs(self) -> tuple[int, int]: ...

    def usual_batch(self, model: str) -> int:
        """Return the examples of a step where nobody says."""
        ...

    def usual_threads(self, model: str) -> int:
        """Return the threads of a run where nobody says."""
        ...

    def usual_solver(self, model: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any], float]:
        """Return solver, its options and its learning rate where nobody says."""
        ...

    def choose_model(self, name: str) -> str:
        """Return the name of the model that "auto" stands for; other names stay."""
        ...

    def model_code(self, name: str) -> str:
        """Return the sha256 of what the user's own model is made of; nothing for built-in ones."""
        ...

    def split(self, seed: int) -> AnySplit:
        """Draw the parts of one seed."""
        ...

    def arguments(self, split: Any, model: str, seed: int, device: str = "auto", **options: Any) -> dict[str, Any]:
        """Return what `poise.fit` is given beside the objective and the training settings."""
        ...
