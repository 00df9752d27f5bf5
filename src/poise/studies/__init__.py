"""Studies: what to compare (`study`), who runs it (`engine`), where it is kept (`store`), what it means (`summary`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Imported on first use: the report and the command line read summaries without loading PyTorch.
_HOME = {
    "DataSpec": "spec",
    "Engine": "engine",
    "LocalEngine": "engine",
    "RunRecord": "spec",
    "RunSpec": "spec",
    "Store": "store",
    "Study": "study",
    "StudyConfig": "config",
    "StudyProgress": "study",
    "StudyResult": "study",
    "Summary": "summary",
    "summarize": "findings",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from poise.studies.config import StudyConfig as StudyConfig
    from poise.studies.engine import Engine as Engine
    from poise.studies.engine import LocalEngine as LocalEngine
    from poise.studies.findings import summarize as summarize
    from poise.studies.spec import DataSpec as DataSpec
    from poise.studies.spec import RunRecord as RunRecord
    from poise.studies.spec import RunSpec as RunSpec
    from poise.studies.store import Store as Store
    from poise.studies.study import Study as Study
    from poise.studies.study import StudyProgress as StudyProgress
    from poise.studies.study import StudyResult as StudyResult
    from poise.studies.summary import Summary as Summary


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
