"""What the command line prints: tables, progress, and errors as one paragraph.

Results go to standard output, progress and errors to standard error, so that `poise claims --json | jq` works. On a
terminal, progress is a live table; in a pipe, in a log file or in a notebook it is plain lines, because cursor
movements have no meaning there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from poise.claims import Progress
    from poise.studies.study import ProgressCallback, StudyProgress

__all__ = ["Journal", "Terminal"]

PLAIN_WIDTH = 160
"""Columns of a table that is written to a pipe: wide enough that no figure is cut."""


class Journal:
    """The log file of `--log FILE`: one line an event, with the time before it; nothing without a file."""

    def __init__(self, path: Path | None) -> None:
        from poise.errors import InputError

        try:
            self._file: IO[str] | None = path.open("a", encoding="utf-8") if path else None
        except OSError as error:
            raise InputError(
                f"The log file {path} cannot be written: {error.strerror}. Choose another with --log."
            ) from None

    def write(self, line: str) -> None:
        """Append one line, at once, so that a killed run leaves all that it said."""
        if self._file:
            print(f"{datetime.now().isoformat(timespec='seconds')} {line}", file=self._file, flush=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()


class Terminal:
    """Two consoles, one for results and one for progress, and what is printed on them.

    Args:
        quiet: no progress; results and errors only.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)
        self.quiet = quiet

    @property
    def live(self) -> bool:
        """Whether progress may redraw itself."""
        return self.err.is_terminal and not self.quiet

    def say(self, line: str) -> None:
        """A line of progress."""
        if not self.quiet:
            self.err.print(Text(line), soft_wrap=True)

    def print(self, *parts: Any) -> None:
        """A part of the result."""
        for part in parts:
            # Text from elsewhere is never read as markup: a formula may hold square brackets.
            renderable = Text(part) if isinstance(part, str) else part
            self.out.print(renderable, soft_wrap=isinstance(renderable, Text))

    def error(self, message: str) -> None:
        """An error as one paragraph; line breaks of the message (a formula with its caret) are kept."""
        text = Text("poise: ", style="bold red")
        text.append(message, style="default")
        self.err.print(text, soft_wrap=True)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """Progress of one piece of work: a bar with the time left, or a plain line every ten percent."""
        if not self.live:
            yield _Lines(self, title)
            return
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.err, transient=True) as bar:
            task = bar.add_task(title, total=1.0)
            yield lambda fraction, text: bar.update(task, completed=fraction, description=f"{title}  {text}")

    @contextmanager
    def study(self, journal: Journal) -> Iterator[ProgressCallback]:
        """Progress of a study: a live table of the formulas with the time left, or a plain line for every run."""
        if not self.live:
            yield lambda now: self._study_line(now, journal)
            return
        from rich.live import Live

        waiting = Text("Loading the data and starting the workers ...", style="dim")
        with Live(waiting, console=self.err, transient=True, refresh_per_second=4) as live:

            def show(now: StudyProgress) -> None:
                if now.message:
                    journal.write(_study_text(now))
                if now.event in ("failed", "retried"):
                    live.console.print(Text(now.message, style="yellow"), soft_wrap=True)
                live.update(_study_table(now))

            yield show

    def _study_line(self, now: StudyProgress, journal: Journal) -> None:
        if now.message:
            journal.write(_study_text(now))
            # A line for the start of a run as well would say everything twice.
            if now.event != "started":
                self.say(_study_text(now))


def _study_text(now: StudyProgress) -> str:
    from poise.report.wording import seconds

    left = f", about {seconds(now.seconds_left)} left" if now.seconds_left and now.done < now.planned else ""
    return f"[{now.done}/{now.planned}] {now.message}{left}"


def _study_table(now: StudyProgress) -> RenderableType:
    from poise.report.wording import seconds

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("Formula", overflow="fold")
    table.add_column("Seeds", justify="right")
    table.add_column("Mean so far", justify="right")
    table.add_column("Failed", justify="right")
    for formula in now.formulas:
        mean = "" if formula.mean is None else f"{formula.mean:.4g}"
        failed = Text(str(formula.failed), style="red") if formula.failed else Text()
        table.add_row(Text(formula.text), f"{formula.done}/{formula.planned}", mean, failed)
    share = (now.done + sum(now.running.values())) / max(1, now.planned)
    left = "" if now.seconds_left is None else f", about {seconds(now.seconds_left)} left"
    words = Text(
        f"{now.done} of {now.planned} runs, {seconds(now.seconds)}{left}. Ctrl-C stops and keeps what is done."
    )
    return Group(table, Columns([ProgressBar(total=1.0, completed=share, width=40), words]))


class _Lines:
    """Progress as lines of text: one whenever another tenth is done, with the time left."""

    def __init__(self, terminal: Terminal, title: str) -> None:
        self._terminal = terminal
        self._title = title
        self._first: tuple[float, float] | None = None
        self._tenths = -1

    def __call__(self, fraction: float, text: str) -> None:
        now = time.perf_counter()
        # The clock starts at the first report: what came before it is preparation, which does not repeat.
        self._first = self._first or (now, fraction)
        tenths = int(10 * fraction)
        if tenths == self._tenths:
            return
        self._tenths = tenths
        began, share = self._first
        left = ""
        if share < fraction < 1:
            left = f", about {(now - began) * (1 - fraction) / (fraction - share):.0f} s left"
        self._terminal.say(f"{self._title}: {100 * fraction:.0f} %{text and f' {text}'}{left}")


def _console(stream: IO[str]) -> Console:
    return Console(file=stream, highlight=False, width=None if stream.isatty() else PLAIN_WIDTH)
