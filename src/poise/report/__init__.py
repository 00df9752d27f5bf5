"""The report: one page that opens offline and says what a study found, how sure that is, and what every term bought.

`write_report(summary, folder)` writes `report.html` and, beside it, `plotly.min.js`; `rebuild(folder)` does so from the
store of a study that was run before. The page asks the network for nothing, and its Content-Security-Policy forbids it to.
"""

from __future__ import annotations

from poise.report.write import rebuild, render, write_report

__all__ = ["rebuild", "render", "write_report"]
