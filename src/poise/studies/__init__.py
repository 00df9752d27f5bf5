"""Studies: what to compare (`study`), who runs it (`engine`), where it is kept (`store`), what it means (`summary`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Imported on first use: the report and the command line read summaries without loading PyTorch.
_HOME = {
    "Study": "study",
    "StudyConfig": "config",
    "StudyResult": "study",
    "RunSpec": "spec",
    "RunRecord": "spec",
    "execute": "execute",
    "Engine": "engine",
    "LocalEngine": "engine",
    "Store": "store",
    "Summary": "summary",
    "summarize": "summary",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from poise.studies.config import StudyConfig
    from poise.studies.engine import Engine, LocalEngine
    from poise.studies.execute import execute
    from poise.studies.spec import RunRecord, RunSpec
    from poise.studies.store import Store
    from poise.studies.study import Study, StudyResult
    from poise.studies.summary import Summary, summarize


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
