"""The rules of the house: which room may import which, and what is imported only where it is used."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "poise"
ROOT = {p.stem for p in SOURCE.glob("*.py")} | {"errors"}
ABOVE = {
    "estimators",
    "recipes",
    "tasks",
    "studies",
    "claims",
    "report",
    "cli",
    "saved",
    "solving",
    "tables",
    "terminal",
}
MAY_IMPORT = {
    "terms": {"terms", "parts"},
    "weights": {"weights"},
    "solvers": {"solvers"},
    "parts": {"parts"},
    "readouts": {"readouts"},
    "metrics": {"metrics"},
    "data": {"data"},
    "trackers": {"trackers"},
}
"""Rooms that stand on the files of the root, on themselves, and on what is named here."""
# The catalogue of terms is what a formula means, and a readout is what a problem runs: the root reads both.
ROOT_MAY_IMPORT = {"terms", "weights", "solvers", "readouts", "parts", "metrics"}
HEAVY = {
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "trl",
    "lightning",
    "pandas",
    "scipy",
    "sklearn",
    "plotly",
    "numba",
    "accelerate",
    "pyarrow",
    "mlxtend",
    "skimage",
    "cleanlab",
    "torchmetrics",
    "ot",
    "jax",
    "optuna",
    "cvxpy",
    "mlflow",
    "tensorboard",
    "wandb",
}
WITHOUT_TORCH = (
    "__init__",
    "__main__",
    "_version",
    "errors",
    "cli",
    "catalogue",
    "tables",
    "terminal",
    "terms/__init__",
    "weights/__init__",
)


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Return the modules that a file imports, those for type checking left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(tree)
    return found


def rooms(path: Path) -> set[str]:
    """Return the rooms and root files of Poise that a file imports."""
    parts = [name.split(".") for name in imports(path) if name.startswith("poise.")]
    return {p[1] for p in parts if (SOURCE / p[1]).is_dir() or (SOURCE / f"{p[1]}.py").exists()}


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_lower_room_stands_on_the_root_alone(room: str) -> None:
    for path in files():
        if path.parent.name == room or room in path.relative_to(SOURCE).parts[:-1]:
            above = {r for r in rooms(path) if (SOURCE / r).is_dir()} - MAY_IMPORT[room]
            assert not above, f"{path.relative_to(SOURCE)} imports {above}"


def test_the_upper_rooms_are_imported_by_nobody_below() -> None:
    for path in files():
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room not in ABOVE and room not in ("__init__", "__main__"):
            assert not rooms(path) & ABOVE, f"{path.relative_to(SOURCE)} imports {rooms(path) & ABOVE}"


def test_the_root_imports_no_room_but_those_that_it_is_made_of() -> None:
    for path in SOURCE.glob("*.py"):
        if path.stem not in (*ABOVE, "__init__", "__main__"):
            above = {r for r in rooms(path) if (SOURCE / r).is_dir()} - ROOT_MAY_IMPORT
            assert not above, f"{path.name} imports {above}"


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for path in files():
        # An estimator inherits from scikit-learn, so its file is loaded only when its name is asked for.
        heavy = HEAVY - {"sklearn"} if path.stem.endswith(("estimator", "estimators")) else HEAVY
        found = {name.split(".")[0] for name in imports(path, top_level=True)} & heavy
        assert not found, f"{path.relative_to(SOURCE)} imports {found} at its top"


def test_what_the_command_line_needs_for_its_help_does_not_import_torch() -> None:
    for name in WITHOUT_TORCH:
        path = SOURCE / f"{name}.py"
        assert not any(module.split(".")[0] == "torch" for module in imports(path, top_level=True)), name


def test_no_file_is_a_drawer_for_everything() -> None:
    for path in files():
        assert path.stem not in ("utils", "util", "common", "helpers", "misc", "base"), path


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*/__init__.py")), ids=lambda p: p.parent.name)
def test_every_public_name_of_a_room_is_there_once(path: Path) -> None:
    """A name that is listed twice, or whose file is gone, is found by nobody until somebody asks for it."""
    import importlib

    room = importlib.import_module(f"poise.{path.parent.name}")
    listed = [
        key.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "_HOME"
        for key in getattr(node.value, "keys", [])
        if isinstance(key, ast.Constant)
    ]
    assert sorted(listed) == sorted(set(listed))
    for name in listed:
        assert getattr(room, name) is not None
