"""The command `poise`: compare objectives on your own data, and everything around it.

Every command imports what it needs when it runs, so that `poise --help` answers without loading PyTorch. What goes
wrong on purpose (`PoiseError`) is printed as one paragraph. Exit codes:

    0    done
    1    a run failed (the others went on; the report names it), or an unexpected error
    2    bad input: a wrong argument, file, formula or data set
    130  stopped with Ctrl-C; the last line says how to go on
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from poise.errors import PoiseError

if TYPE_CHECKING:
    from poise.terminal import Terminal

__all__ = ["app", "main"]

P = ParamSpec("P")

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="poise",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
claims_app = typer.Typer(help="The 70 papers: claim, state, measured verdict.", invoke_without_command=True)
app.add_typer(claims_app, name="claims")

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; results and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Entry point of the console script."""
    app()


def command(body: Callable[P, int]) -> Callable[P, None]:
    """Turn a function that returns an exit code into a command whose errors are one paragraph.

    With `--debug` the error passes through with its traceback.
    """

    @functools.wraps(body)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = body(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            _terminal().error(f"stopped. {interrupt}".strip())
            code = INTERRUPTED
        except Exception as error:
            if kwargs.get("debug"):
                raise
            code = _explain_error(error)
        raise typer.Exit(code)

    return guarded


def _explain_error(error: Exception) -> int:
    """Print an error for the person at the terminal, and return the exit code that belongs to it."""
    terminal = _terminal()
    if isinstance(error, PoiseError):
        terminal.error(str(error))
        return BAD_INPUT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        terminal.error(
            "out of memory. Use a smaller --batch-size, fewer --workers, a smaller --model, or fewer rows (--limit). "
            + str(error)
        )
        return BAD_INPUT
    if isinstance(error, OSError) and error.filename is not None:
        terminal.error(f"{error.filename}: {error.strerror}.")
        return BAD_INPUT
    terminal.error(f"unexpected {type(error).__name__}: {error} (--debug shows where it comes from)")
    return FAILED


def _terminal(quiet: bool = False) -> Terminal:
    from poise.terminal import Terminal

    return Terminal(quiet)


def _show_versions(wanted: bool) -> None:
    """Print the versions that matter, read from package metadata, so that nothing heavy is imported."""
    if not wanted:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from poise._version import __version__

    typer.echo(f"poise {__version__}")
    typer.echo(f"python {platform.python_version()}")
    for name in ("torch", "numpy", "scipy", "scikit-learn", "accelerate", "pandas", "numba", "safetensors"):
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} not installed")
    typer.echo(platform.platform())
    raise typer.Exit(DONE)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_versions, is_eager=True, help="The versions that matter.")
    ] = False,
) -> None:
    """Write a learning objective as a formula, compare it on your own data, and see what every term bought."""


@app.command()
@command
def terms(debug: Debug = False) -> int:
    """List what a formula may say: terms, and ways to set a weight, one line each."""
    from poise.catalogue import entries
    from poise.tables import formula_names

    _terminal().print(*formula_names(entries()))
    return DONE


@app.command()
@command
def explain(
    formula: Annotated[str, typer.Argument(help='For instance "cross_entropy + 3*early_learning".')],
    debug: Debug = False,
) -> int:
    """Print what a formula means: the equation, what it reads, defaults and sources."""
    from poise.formula import explain as explain_formula

    _terminal().print(explain_formula(formula))
    return DONE


@app.command()
@command
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `poise compare` wrote.")],
    debug: Debug = False,
) -> int:
    """Rebuild the report of a finished or interrupted comparison from its store."""
    from poise.report import write_report

    _terminal().print(f"Report: {write_report(folder)}")
    return DONE


@claims_app.callback()
def claims(
    context: typer.Context,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The 70 papers: claim, state, measured verdict. `poise claims run 18 32` measures."""
    if context.invoked_subcommand is None:
        _list_claims(as_json=as_json, debug=debug)


@command
def _list_claims(*, as_json: bool, debug: bool) -> int:
    from poise.claims.runner import rows
    from poise.tables import claim_rows

    listed = rows()
    if as_json:
        typer.echo(json.dumps([row.as_json() for row in listed], indent=1))
    else:
        _terminal().print(*claim_rows(listed))
    return DONE


@claims_app.command("run")
@command
def run_claims(
    numbers: Annotated[list[int], typer.Argument(help="Numbers of the papers, e.g. 18 32.")],
    full: Annotated[bool, typer.Option("--full", help="The larger study, where the claim offers one.")] = False,
    seed: Annotated[int, typer.Option(help="Everything random derives from it.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Run the studies of some claims and print what they measured beside the papers' figures.

    A claim that honestly fails is a measured result, not a failed run: the exit code is 0.
    """
    from poise.claims.runner import load_claim, rows, run_claim
    from poise.tables import claim_finding

    terminal = _terminal(quiet)
    claims = [load_claim(number) for number in dict.fromkeys(numbers)]
    for claim in claims:
        with terminal.progress(f"claim {claim.number}") as progress:
            run_claim(claim.number, full=full, seed=seed, progress=progress)
        if not as_json:
            terminal.print(*claim_finding(rows([claim.number])[0], claim))
    if as_json:
        typer.echo(json.dumps([row.as_json() for row in rows([claim.number for claim in claims])], indent=1))
    return DONE
