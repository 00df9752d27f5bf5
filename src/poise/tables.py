"""The tables that the command line prints, built from plain data; nothing here computes or loads PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from poise.report import wording

if TYPE_CHECKING:
    from poise.catalogue import Entry
    from poise.claims import Claim
    from poise.claims.runner import Row
    from poise.studies.solution import SolutionSummary
    from poise.studies.summary import Difference, Metric, Summary, TermEffect
    from poise.tasks.contract import AnyTask

__all__ = ["claim_finding", "claim_rows", "fit_results", "formula_names", "solution_results", "study_results"]

STATE_STYLE = {"holds": "green", "fails": "red", "not run": "yellow", "not built": "dim"}
VERDICT_STYLE = {"better": "green", "worse": "red", "undecided": "yellow", "no interval": "dim"}


def study_results(summary: Summary) -> Iterator[RenderableType]:
    """What a study found, top down: the data, the metrics, the differences, what each term bought, the advice."""
    yield from _data(summary)
    yield from _formulas(summary)
    yield from _metrics(summary)
    if summary.differences:
        yield from _differences(summary)
    if summary.term_effects:
        yield from _term_effects(summary)
    if any(formula.constraints for formula in summary.formulas):
        yield from _constraints(summary)
    if any(formula.selected for formula in summary.formulas):
        yield from _selected(summary)
    if summary.failed:
        yield from _failed(summary)
    yield _heading("Recommendation")
    yield Text(summary.recommendation.text)
    if summary.recommendation.python:
        yield Text()
        yield Text("\n".join(f"    {line}" for line in summary.recommendation.python.splitlines()), style="cyan")
    if summary.notes:
        yield _heading("How to read this")
        yield Text("\n".join(summary.notes), style="dim")


def fit_results(
    formula: str, task: AnyTask, seconds: float, metrics: dict[str, float], constraints: Sequence[str] = ()
) -> Iterator[RenderableType]:
    """What one trained model reached on the test split, and whether its constraints held."""
    yield _heading(f"{formula} on {task.name}, {wording.count(task.examples, 'example')}: {wording.seconds(seconds)}")
    table = _table("Test metric", ">Value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    yield table
    for sentence in constraints:
        yield Text(f"Constraint {sentence}", style=VERDICT_STYLE["worse" if "not feasible" in sentence else "better"])


def solution_results(summary: SolutionSummary) -> Iterator[RenderableType]:
    """A solved linear model: its certificate, its metrics, its largest weights, and the path of weights."""
    c = summary.certificate
    yield _heading(f"{summary.formula} on {summary.task}, {wording.count(summary.examples, 'example')}")
    met = c["residual"] <= c["tolerance"]
    style = VERDICT_STYLE["better" if met else "worse"]
    yield Text(f"{'Solved' if met else 'Not solved: ' + c['status']}", style=style)
    table = _grid()
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    table.add_row("objective", f"{c['value']:.8g}")
    table.add_row(c["measure"], f"{c['residual']:.2g} (asked for: {c['tolerance']:.2g})")
    steps = wording.count(c["iterations"], "iteration")
    table.add_row("solver", Text(f"{summary.solver}: {summary.reason}; {steps}, {wording.seconds(summary.seconds)}"))
    table.add_row("inputs used", f"{len(summary.used):,} of {len(summary.inputs):,}")
    yield table
    yield _heading("Metrics")
    table = _table("Rows", *(f">{name}" for name in summary.metrics["test"]))
    for part, values in summary.metrics.items():
        table.add_row(part, *(f"{value:.4g}" for value in values.values()))
    yield table
    if summary.used:
        shown = summary.used[:10]
        yield _heading("Largest weights")
        table = _table("Input", *(f">{name}" for name in summary.outputs[:6]))
        for j in shown:
            table.add_row(
                Text(summary.inputs[j]), *(wording.rounded(row[j]) if row[j] else "0" for row in summary.coef[:6])
            )
        yield table
        hidden = [
            wording.count(len(summary.used) - len(shown), "more input") if len(summary.used) > len(shown) else "",
            wording.count(len(summary.outputs) - 6, "more output") if len(summary.outputs) > 6 else "",
        ]
        if any(hidden):
            yield Text(f"and {', '.join(filter(None, hidden))} in weights.csv", style="dim")
    if summary.path:
        yield _heading(f"Path: {summary.varied}")
        table = _table(">Weight", ">Inputs used", ">Objective", f">{summary.primary}, valid", "")
        every = max(1, len(summary.path) // 10)
        for i, p in enumerate(summary.path):
            if i % every == 0 or i in (summary.best, len(summary.path) - 1):
                said = "best on validation rows" if i == summary.best else "" if p.converged else "certificate missed"
                table.add_row(
                    wording.rounded(p.weight),
                    str(p.support),
                    wording.rounded(p.value),
                    f"{p.metrics[summary.primary]:.4g}",
                    said,
                )
        yield table
    for note in summary.notes:
        yield Text(note, style="dim")


def formula_names(entries: Iterable[Entry]) -> Iterator[RenderableType]:
    """The names of the formula language, one line each."""
    entries = list(entries)
    titles = {
        "term": "Terms",
        "shorthand": "Shorthands for sums of terms",
        "weight": "Weights",
        "balancer": "Methods of auto(policy='pareto', method=...), which weighs the gradients of terms against each other",
        "bilevel": "Methods of auto(policy='bilevel', method=...), which goes by the validation objective",
        "part": "Parts of the model",
    }
    for kind, title in titles.items():
        table = _grid()
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for entry in entries:
            if entry.kind == kind:
                table.add_row(entry.name, Text(entry.summary))
        yield _heading(title)
        yield table
    yield Text('\nWhat a formula means: poise explain "cross_entropy + 0.1*l2"')


def claim_rows(rows: list[Row]) -> Iterator[RenderableType]:
    """The table of claims, and a line that counts them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("No.", justify="right")
    table.add_column("State", no_wrap=True)
    table.add_column("Paper", overflow="fold", ratio=2)
    table.add_column("arXiv", no_wrap=True)
    table.add_column("Room", overflow="fold", ratio=1)
    for row in rows:
        state = Text(row.state + ("" if row.current else " (older code)"), style=STATE_STYLE[row.state])
        paper = Text(row.paper.title)
        if row.measurement:
            paper.append(f"\n{row.measurement.measured} ({wording.seconds(row.measurement.seconds)})", style="dim")
        room = Text(", ".join(row.paper.room), style="dim")
        table.add_row(str(row.paper.number), state, paper, row.paper.arxiv, room)
    yield table
    counts = {state: sum(row.state == state for row in rows) for state in STATE_STYLE}
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    yield Text(f"\n{len(rows)} papers: {summary}. Verdicts are measured on this machine by `poise claims run NUMBER`.")


def claim_finding(row: Row, claim: Claim) -> Iterator[RenderableType]:
    """One claim after its study: the paper's statement, what was expected, what was measured, the verdict."""
    measured = row.measurement
    if measured is None:
        return
    yield _heading(f"{row.paper.number}  {row.paper.title}  (arXiv:{row.paper.arxiv})")
    table = _grid()
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    table.add_row("claim", Text(claim.statement))
    table.add_row("expected", Text(claim.expected))
    table.add_row("falsified by", Text(claim.falsified))
    table.add_row("measured", Text(measured.measured))
    table.add_row("verdict", Text(row.state, style=f"bold {STATE_STYLE[row.state]}"))
    if measured.reason:
        table.add_row("reason", Text(measured.reason))
    table.add_row("took", Text(f"{wording.seconds(measured.seconds)} on {measured.machine}"))
    yield table


def _data(summary: Summary) -> Iterator[RenderableType]:
    task = summary.task
    sizes = ", ".join(f"{number:,} {name}" for name, number in task.sizes.items())
    yield _heading(summary.title)
    yield Text(f"{task.name}: {wording.count(task.examples, 'example')} ({sizes}), {task.target_type}")
    for note in task.notes:
        yield Text(note, style="dim")
    for warning in (*task.warnings, *summary.warnings):
        yield Text(f"warning: {warning}", style="yellow")


def _formulas(summary: Summary) -> Iterator[RenderableType]:
    yield _heading("Formulas and what a run of each cost")
    table = _table("", "Formula", ">Seconds", ">Peak memory")
    for formula in summary.formulas:
        cost = (wording.seconds(formula.cost.seconds.mean), wording.size(formula.cost.peak_memory_bytes.mean))
        table.add_row(_letter(formula.index), Text(formula.text), *cost)
    yield table


def _metrics(summary: Summary) -> Iterator[RenderableType]:
    yield _heading(f"Test metrics over {wording.count(len(summary.seeds), 'seed')}")
    table = _table("Metric", "", ">Mean", f">{100 * summary.level:g} % interval")
    for metric in summary.metrics:
        name = f"{metric.title} {'↑' if metric.direction == 'max' else '↓'}"
        for formula in summary.formulas:
            if (estimate := formula.metrics.get(metric.name)) is not None:
                interval = wording.interval(metric, estimate) or estimate.reason
                table.add_row(name, _letter(formula.index), wording.value(metric, estimate.mean), Text(interval))
                name = ""
    yield table


def _differences(summary: Summary) -> Iterator[RenderableType]:
    baseline = _letter(summary.differences[0].baseline)
    yield _heading(f"Paired difference to {baseline}, same seeds and splits")
    table = _table("Metric", "", ">Difference", f">{100 * summary.level:g} % interval", ">p (Holm)", "Finding")
    last = ""
    for difference in summary.differences:
        metric = summary.metric(difference.metric)
        name, last = ("" if metric.title == last else metric.title), metric.title
        table.add_row(
            name, _letter(difference.formula), *_difference(metric, difference), _verdict(difference.verdict)
        )  # fmt: skip
    yield table


def _term_effects(summary: Summary) -> Iterator[RenderableType]:
    metric = summary.primary
    yield _heading(f"What each term bought in {metric.title}: the formula minus the formula without the term")
    table = _table("", "Term", ">Bought", f">{100 * summary.level:g} % interval", ">p (Holm)", "Finding")
    for effect in summary.term_effects:
        if effect.metric == metric.name:
            table.add_row(
                _letter(effect.formula), Text(effect.label), *_difference(metric, effect), _verdict(effect.verdict)
            )  # fmt: skip
    yield table


def _constraints(summary: Summary) -> Iterator[RenderableType]:
    yield _heading("Constraints at the end of training")
    table = _table("", "Finding")
    for formula in summary.formulas:
        for found in formula.constraints:
            style = VERDICT_STYLE["better" if found.feasible == found.seeds else "worse"]
            table.add_row(_letter(formula.index), Text(found.sentence, style=style))
    yield table


def _selected(summary: Summary) -> Iterator[RenderableType]:
    yield _heading("Found on the validation split, or set within the run, seed by seed")
    table = _table("", "Weight", "Values")
    for formula in summary.formulas:
        for name, by_seed in formula.selected.items():
            values = ", ".join(f"{value:.4g} (seed {seed})" for seed, value in by_seed.items())
            table.add_row(_letter(formula.index), name, Text(values))
    yield table


def _failed(summary: Summary) -> Iterator[RenderableType]:
    yield _heading("Failed runs (the others went on)")
    table = _table("", ">Seed", "Run", "Why")
    for run in summary.failed:
        table.add_row(_letter(run.formula), str(run.seed), run.role, Text(run.error, style="red"))
    yield table


def _difference(metric: Metric, found: Difference | TermEffect) -> tuple[str, Text, str]:
    # The unit stands in the column before.
    interval = wording.difference_interval(metric, found.estimate).removesuffix(" points") or found.estimate.reason
    return wording.difference(metric, found.estimate.mean), Text(interval), wording.p_value(found.p_holm)


def _verdict(verdict: str) -> Text:
    return Text(verdict, style=VERDICT_STYLE[verdict])


def _letter(index: int) -> str:
    """The name of a formula in the tables: A, B, ..., Z, AA, ..."""
    letters = ""
    number = index + 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("A") + digit) + letters
    return letters


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _grid() -> Table:
    return Table(box=None, show_header=False, pad_edge=False)


def _table(*columns: str) -> Table:
    """A table without lines; a column whose title begins with `>` holds figures and is not broken."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in columns:
        figures = title.startswith(">")
        table.add_column(title.lstrip(">"), justify="right" if figures else "left", overflow="fold")
    return table
