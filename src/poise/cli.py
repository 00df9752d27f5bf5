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
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from poise.errors import InputError, PoiseError

if TYPE_CHECKING:
    from poise.run import Run
    from poise.studies import Study
    from poise.studies.spec import RunSpec
    from poise.tasks.contract import AnySplit, AnyTask
    from poise.terminal import Journal, Terminal
    from poise.trackers.fitting import FitTracker

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
Log = Annotated[Path | None, typer.Option("--log", metavar="FILE", help="Append every event to a file, with its time.")]

Trackers = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        metavar="NAME",
        help="tensorboard[:DIR] | mlflow[:URI] | wandb[:PROJECT]: send curves, settings and verdict there too.",
    ),
]

# Options that say how the data are read, and how a run is trained; `compare` and `fit` share them. None means that the
# library chooses for the data, says so, and writes it down.
DATA, TRAINING = "Data", "Training"
Label = Annotated[
    str | None, typer.Option("--label", metavar="COLUMN", help="The column to predict.", rich_help_panel=DATA)
]
TargetType = Annotated[
    str | None,
    typer.Option("--target-type", metavar="TYPE", help="classification | regression", rich_help_panel=DATA),
]
SplitShares = Annotated[
    str, typer.Option("--split", metavar="SHARES", help="Train, validation and test shares.", rich_help_panel=DATA)
]
Group = Annotated[
    str | None,
    typer.Option("--group", metavar="COLUMN", help="Rows of one group stay in one split.", rich_help_panel=DATA),
]
Time = Annotated[
    str | None,
    typer.Option("--time", metavar="COLUMN", help="Train on the past, test on the future.", rich_help_panel=DATA),
]
TestFile = Annotated[
    Path | None, typer.Option("--test", metavar="FILE", help="A file of its own for testing.", rich_help_panel=DATA)
]
ClassWeight = Annotated[
    str | None, typer.Option("--class-weight", metavar="RULE", help="balanced", rich_help_panel=DATA)
]
LabelNoise = Annotated[
    float,
    typer.Option("--label-noise", help="Share of training labels to make wrong on purpose.", rich_help_panel=DATA),
]
Noise = Annotated[
    str, typer.Option("--noise", metavar="KIND", help="symmetric | asymmetric | pair", rich_help_panel=DATA)
]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="ROWS", help="Use only so many rows.", rich_help_panel=DATA)
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="auto | linear | mlp | cnn | package.module:factory | folder of a language model",
        rich_help_panel=TRAINING,
    ),
]
Solver = Annotated[
    str | None,
    typer.Option(
        "--solver",
        metavar="NAME",
        help="sgd, adamw, ...: any of torch.optim; lion; newton; proximal, for exact zeros; half_fine_tuning. Options in brackets: "
        '"adamw(weight_decay=0.1)".',
        rich_help_panel=TRAINING,
    ),
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate.", rich_help_panel=TRAINING)]
Schedule = Annotated[
    str | None,
    typer.Option("--schedule", metavar="NAME", help="Learning-rate schedule; constant.", rich_help_panel=TRAINING),
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the data.", rich_help_panel=TRAINING)]
Steps = Annotated[int | None, typer.Option("--steps", help="Or: optimiser steps.", rich_help_panel=TRAINING)]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Examples a step.", rich_help_panel=TRAINING)]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", metavar="TOKENS", help="Prompt and answer together, at most.", rich_help_panel=DATA),
]
MaxPrompt = Annotated[
    int | None,
    typer.Option(
        "--max-prompt-length", metavar="TOKENS", help="Prompt, at most; cut from the left.", rich_help_panel=DATA
    ),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out records that cannot be used, and list them.", rich_help_panel=DATA)
]
Accumulate = Annotated[
    int, typer.Option("--accumulate", metavar="N", help="Micro-batches of a step.", rich_help_panel=TRAINING)
]
Lora = Annotated[
    int | None,
    typer.Option("--lora", metavar="RANK", help="Train an adapter instead of all weights.", rich_help_panel=TRAINING),
]
Reference = Annotated[
    str,
    typer.Option(
        "--reference",
        metavar="HOW",
        help="live, or stored: log-probabilities of the start, computed once and kept.",
        rich_help_panel=TRAINING,
    ),
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing", help="Compute activations twice instead of keeping them.", rich_help_panel=TRAINING
    ),
]
Select = Annotated[
    str,
    typer.Option(
        "--select", metavar="WHICH", help="Measure the last model or the best on validation.", rich_help_panel=TRAINING
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto | cpu | cuda | cuda:N | mps", rich_help_panel=TRAINING)]
Precision = Annotated[str, typer.Option("--precision", help="fp32 | bf16", rich_help_panel=TRAINING)]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Refuse kernels that vary between repetitions.", rich_help_panel=TRAINING),
]


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except SystemExit as done:
        if done.code == INTERRUPTED:
            # An interrupt that comes while Python makes a class from text, as dataclasses do during imports, leaves a mark by
            # which the interpreter would end itself with the signal, whatever the exit code.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


def command(body: Callable[P, int]) -> Callable[P, None]:
    """Turn a function that returns an exit code into a command whose errors are one paragraph.

    With `--debug` the error passes through with its traceback.
    """

    @functools.wraps(body)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = body(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            _terminal().error(f"stopped. {str(interrupt) or 'Nothing was written; run the same command again.'}")
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
def compare(
    context: typer.Context,
    data: Annotated[
        str | None, typer.Argument(help="digits, breast_cancer, wine, diabetes, mnist, or a file or folder of yours.")
    ] = None,
    formulas: Annotated[
        list[str] | None, typer.Argument(help="The objectives; the first is what the others are compared with.")
    ] = None,
    study: Annotated[
        Path | None, typer.Option("--study", metavar="FILE", help="Run a study.toml again exactly, or continue it.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Where everything is written.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds; each redraws the split.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="The first seed.")] = 0,
    tune: Annotated[
        int | None, typer.Option("--tune", metavar="N", help="Trials per formula for auto weights and learning rate.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="The metric that the recommendation rests on.")
    ] = None,
    leave_one_out: Annotated[
        bool, typer.Option(help="Also train each formula without each of its terms: what every term bought.")
    ] = True,
    engine: Annotated[str, typer.Option("--engine", metavar="NAME", help="local")] = "local",
    workers: Annotated[
        int | None, typer.Option("--workers", help="Worker processes; as many as the cores allow.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="Threads of each worker; part of a run's identity. 1 where memory allows."),
    ] = None,
    label: Label = None,
    target_type: TargetType = None,
    split: SplitShares = "60/20/20",
    group: Group = None,
    time: Time = None,
    test: TestFile = None,
    class_weight: ClassWeight = None,
    label_noise: LabelNoise = 0.0,
    noise: Noise = "symmetric",
    limit: Limit = None,
    max_length: MaxLength = None,
    max_prompt_length: MaxPrompt = None,
    skip_bad: SkipBad = False,
    model: Model = "auto",
    solver: Solver = None,
    lr: LearningRate = None,
    schedule: Schedule = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = 1,
    lora: Lora = None,
    gradient_checkpointing: Checkpointing = False,
    reference: Reference = "live",
    select: Select = "last",
    device: Device = "auto",
    precision: Precision = "fp32",
    deterministic: Deterministic = False,
    tracker: Trackers = None,
    quiet: Quiet = False,
    log: Log = None,
    debug: Debug = False,
) -> int:
    """Compare objectives on your data: same seeds, same splits, same budget; intervals, and what every term bought.

    poise compare digits "cross_entropy" "cross_entropy + 3*early_learning" --label-noise 0.4

    poise compare mydata.csv --label quality "squared_error" "squared_error + auto*l2"

    poise compare pairs.jsonl --model ./my-lm "dpo(beta=0.1)" "dpo(beta=0.1) + 0.2*sft"
    """
    from poise.studies import Study

    if engine != "local":
        raise InputError(f"--engine {engine}: this version has the engine local, worker processes on this machine.")
    if study is not None:
        _refuse_beside_study(context)
        prepared = Study.from_toml(study, out)
    elif data is None or not formulas:
        raise InputError(
            "Give data and at least one formula, for instance: "
            'poise compare digits "cross_entropy" "cross_entropy + 0.01*l2". `poise terms` lists what a formula may say.'
        )
    else:
        prepared = Study(
            data,
            formulas,
            _seeds(seed, seeds),
            out=out or Path("poise-report"),
            label=label,
            target_type=target_type,
            split=_shares(split),
            group=group,
            time=time,
            test_file=test,
            label_noise=label_noise,
            noise=noise,
            class_weight=class_weight,
            limit=limit,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            skip_bad=skip_bad,
            model=model,
            solver=solver,
            lr=lr,
            schedule=schedule,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            accumulate=accumulate,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            reference=reference,
            precision=precision,
            device=device,
            select=select,
            deterministic=deterministic,
            tune=tune,
            leave_one_out=leave_one_out,
            metric=metric,
            workers=workers,
            threads=threads,
        )
    return _run_study(prepared, _terminal(quiet), log, tracker)


def _run_study(study: Study, terminal: Terminal, log: Path | None, tracker: list[str] | None) -> int:
    """Run what is missing, write the report, print the tables; 1 where a run failed."""
    from poise.report import write_report
    from poise.tables import study_results
    from poise.terminal import Journal

    folder = shlex.quote(str(study.folder))
    with Journal(log) as journal, terminal.study(journal) as progress:
        try:
            result = study.run(progress, tracker=tracker, say=_say_of(terminal, journal))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"What has finished is kept in {folder}. Go on with: poise compare --study {folder}/study.toml"
                if (study.folder / "study.toml").is_file()
                else "Nothing had begun; run the same command again."
            ) from None
        journal.write("done" if result.ok else "done; some runs failed")
    # The answer first: a disk that is full must not take it away.
    terminal.print(*study_results(result.summary))
    page = write_report(result.summary, study.folder)
    terminal.print(f"\nReport: {page}", f"Again:  poise compare --study {folder}/study.toml")
    return DONE if result.ok else FAILED


def _say_of(terminal: Terminal, journal: Journal) -> Callable[[str], None]:
    """Return what says that a tracker failed: once, also where progress is not shown."""

    def say(sentence: str) -> None:
        journal.write(f"warning: {sentence}")
        terminal.err.print(f"warning: {sentence}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    return say


def _refuse_beside_study(context: typer.Context) -> None:
    """A study.toml says everything; an option beside it would be ignored in silence."""
    allowed = ("study", "out", "tracker", "quiet", "log", "debug")
    given = [
        f"--{name.replace('_', '-')}" if name not in ("data", "formulas") else name
        for name in context.params
        if name not in allowed and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise InputError(
            f"A study.toml says everything, so {', '.join(given)} cannot stand beside --study. Edit the file, or give "
            "data and formulas instead of it."
        )


def _seeds(first: int, number: int) -> list[int]:
    """The seeds first, first + 1, ...; one seed is refused, because every answer of a comparison is an interval."""
    if number < 2:
        raise InputError(
            f"--seeds {number}: a comparison answers in intervals, and an interval needs at least two seeds (five by "
            "default). For a single run use `poise fit`."
        )
    return list(range(first, first + number))


def _shares(text: str) -> tuple[float, float, float]:
    """Read `60/20/20` or `0.6,0.2,0.2` as three shares of the whole."""
    try:
        train, valid, test = (float(part) for part in text.replace(",", "/").split("/"))
    except ValueError:
        raise InputError(
            f"--split {text}: give three shares for training, validation and test, such as 60/20/20."
        ) from None
    total = train + valid + test
    if min(train, valid, test) <= 0 or total not in (1.0, 100.0):
        raise InputError(f"--split {text}: the three shares must be positive and add up to 100 (or to 1).")
    return train / total, valid / total, test / total


@app.command()
@command
def fit(
    data: Annotated[
        str, typer.Argument(help="digits, breast_cancer, wine, diabetes, mnist, or a file or folder of yours.")
    ],
    formula: Annotated[str, typer.Argument(help="The objective, with a number for every weight.")],
    save: Annotated[
        Path | None, typer.Option("--save", metavar="DIR", help="Keep the model in a new folder, for `poise predict`.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides split, start and order of batches.")] = 0,
    threads: Annotated[int, typer.Option("--threads", help="Threads of PyTorch.")] = 1,
    label: Label = None,
    target_type: TargetType = None,
    split: SplitShares = "60/20/20",
    group: Group = None,
    time: Time = None,
    test: TestFile = None,
    class_weight: ClassWeight = None,
    label_noise: LabelNoise = 0.0,
    noise: Noise = "symmetric",
    limit: Limit = None,
    model: Model = "auto",
    solver: Solver = None,
    lr: LearningRate = None,
    schedule: Schedule = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    select: Select = "last",
    device: Device = "auto",
    precision: Precision = "fp32",
    deterministic: Deterministic = False,
    tracker: Trackers = None,
    quiet: Quiet = False,
    log: Log = None,
    debug: Debug = False,
) -> int:
    """Train one model on one formula, measure it on the test split, and keep it.

    poise fit mydata.csv "squared_error + 0.01*l2" --label quality --save my-model
    """
    from poise.studies import Study

    prepared = Study(
        data,
        formula,
        [seed],
        label=label,
        target_type=target_type,
        split=_shares(split),
        group=group,
        time=time,
        test_file=test,
        label_noise=label_noise,
        noise=noise,
        class_weight=class_weight,
        limit=limit,
        model=model,
        solver=solver,
        lr=lr,
        schedule=schedule,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        precision=precision,
        device=device,
        select=select,
        deterministic=deterministic,
        tune=0,
        leave_one_out=False,
        threads=threads,
    )
    return _fit_one(prepared, save, _terminal(quiet), log, tracker)


def _fit_one(study: Study, save: Path | None, terminal: Terminal, log: Path | None, tracker: list[str] | None) -> int:
    """Train the one run of a study in this process, with a bar and with checkpoints beside the model."""
    import torch

    from poise.formula import parse
    from poise.saved import CONFIG
    from poise.studies.execute import train
    from poise.tables import fit_results
    from poise.terminal import Journal
    from poise.weights.feasibility import judge_constraints

    if save is not None and ((save / CONFIG).exists() or (save / "config.json").exists()):
        raise InputError(f"{save} holds a model already. Choose another folder with --save, or remove this one.")
    (formula,) = study.config.formulas
    if autos := parse(formula).searched:
        raise InputError(
            f"This command needs a number for every weight, and {', '.join(autos)} is `auto`. "
            "`poise compare DATA FORMULA --tune 10` finds the weights."
        )
    torch.set_num_threads(study.config.engine.threads or 1)
    (spec,) = study.plan().wanted()
    task = study.task
    split = task.split(spec.seed)
    for line in (*task.notes, *(f"warning: {text}" for text in (*task.warnings, *split.warnings))):
        terminal.say(line)
    checkpoints = None if save is None else save.with_name(save.name + ".checkpoints") / spec.id
    with Journal(log) as journal, _tracked(study, spec, tracker, _say_of(terminal, journal)) as tracked:
        with terminal.progress(formula) as progress:
            try:
                run = train(
                    spec, task, split, folder=checkpoints, report=lambda share: progress(share, ""), tracker=tracked
                )
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    "Nothing was kept; with --save DIR a stopped run goes on where it was."
                    if save is None
                    else "Run the same command again to go on where it was."
                ) from None
        journal.write(f"trained {run.steps} steps in {run.seconds:.1f} s: {run.stopped}")
        metrics = split.measure(run, "test")
        constraints = judge_constraints(run.objective, run.history)
        tracked.verdict |= {f"test/{name}": value for name, value in metrics.items()}
        tracked.verdict |= {f"constraint/{found.label}": found.sentence for found in constraints}
    terminal.print(*fit_results(formula, task, run.seconds, metrics, [found.sentence for found in constraints]))
    for found in constraints:
        if found.warning:
            terminal.say(f"warning: {found.warning}")
    if save is not None and checkpoints is not None:
        terminal.print(f"\nSaved:   {save}", *_save(save, run, task, split, spec, metrics, terminal))
        shutil.rmtree(checkpoints.parent, ignore_errors=True)
    return DONE


def _tracked(
    study: Study, spec: RunSpec, tracker: list[str] | None, say: Callable[[str], None]
) -> AbstractContextManager[FitTracker]:
    """Return what tells trackers of a single run: its whole specification, and the data's name and size."""
    from poise.trackers.fitting import track

    task = study.describe()
    config = {**spec.to_dict(), "id": spec.id, "task": {"name": task.name, "examples": task.examples}}
    return track(tracker, config=config, say=say)


def _save(
    save: Path, run: Run, task: AnyTask, split: AnySplit, spec: RunSpec, metrics: dict[str, float], terminal: Terminal
) -> list[str]:
    """Keep a model, and say how to use it."""
    from poise.saved import save_model
    from poise.tasks import Split, Task
    from poise.tasks.language.task import LanguageSplit

    if isinstance(split, LanguageSplit):
        split.save(run, save)
        return [f"Load:    transformers.AutoModelForCausalLM.from_pretrained({str(save)!r})"]
    assert isinstance(task, Task)
    assert isinstance(split, Split)
    for note in save_model(save, run, task, split, spec, metrics):
        terminal.say(f"warning: {note}")
    return [f"Predict: poise predict {shlex.quote(str(save))} FILE"]


@app.command()
@command
def solve(
    data: Annotated[
        str, typer.Argument(help="diabetes, breast_cancer, wine, digits, mnist, or a file or folder of yours.")
    ],
    formula: Annotated[str, typer.Argument(help="One fit and penalties, with a number for every weight.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where page and tables go.")] = Path(
        "poise-solution"
    ),
    path: Annotated[int, typer.Option("--path", metavar="POINTS", help="Weights along the path; 0 for none.")] = 30,
    smallest: Annotated[
        float, typer.Option("--smallest", metavar="SHARE", help="Last weight of the path, as a share of the first.")
    ] = 1e-3,
    tol: Annotated[float, typer.Option("--tol", help="Relative tolerance of the certificate.")] = 1e-8,
    iterations: Annotated[int | None, typer.Option("--iterations", help="At most.")] = None,
    intercept: Annotated[
        bool, typer.Option("--intercept/--no-intercept", help="Whether there is a free intercept.")
    ] = True,
    solver: Annotated[
        str | None, typer.Option("--solver", metavar="NAME", help="By default the one that fits.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides the split.")] = 0,
    threads: Annotated[int, typer.Option("--threads", help="Threads of PyTorch.")] = 1,
    label: Label = None,
    target_type: TargetType = None,
    split: SplitShares = "60/20/20",
    group: Group = None,
    time: Time = None,
    test: TestFile = None,
    class_weight: ClassWeight = None,
    limit: Limit = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Minimise a formula of a linear model to a certificate, and along a path of its weight.

    poise solve diabetes "least_squares + 0.1*l1"

    poise solve mydata.csv "cross_entropy + 0.02*group_lasso(groups=4)" --label quality
    """
    import torch

    from poise.report.solution import write_solution
    from poise.studies.solution import solve_task
    from poise.tables import solution_results
    from poise.tasks import Task, load_task

    if path < 0 or path == 1 or not 0 < smallest < 1 or not tol > 0:
        raise InputError("--path is 0 or at least 2, --smallest is a share between 0 and 1, and --tol is positive.")
    torch.set_num_threads(threads)
    terminal = _terminal(quiet)
    task = load_task(
        data, label=label, target_type=target_type, split=_shares(split), group=group, time=time, test_file=test,
        class_weight=class_weight, limit=limit,
    )  # fmt: skip
    if not isinstance(task, Task):
        raise InputError(
            f"{data} holds text for language models; poise solve reads tables and images. Use `poise align`."
        )
    with terminal.progress(formula) as progress:
        try:
            summary = solve_task(
                task, formula, seed=seed, intercept=intercept, solver=solver, tol=tol, iterations=iterations, points=path,
                smallest=smallest, progress=lambda share: progress(share, ""),
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Nothing was kept; --path 0 solves at the formula's weight alone.") from None
    terminal.print(*solution_results(summary))
    for warning in summary.warnings:
        terminal.say(f"warning: {warning}")
    summary.save(out)
    terminal.print(f"\nReport: {write_solution(summary, out)}")
    return DONE if summary.certificate["residual"] <= summary.certificate["tolerance"] else FAILED


@app.command()
@command
def align(
    data: Annotated[
        str,
        typer.Argument(help="replies, or your JSON lines, Parquet or `datasets` folder of pairs, labels or answers."),
    ],
    formula: Annotated[str, typer.Argument(help="The objective, with a number for every weight.")],
    save: Annotated[Path, typer.Option("--save", metavar="DIR", help="A new folder, which plain transformers loads.")],
    seed: Annotated[int, typer.Option("--seed", help="Decides split and order of batches.")] = 0,
    threads: Annotated[int, typer.Option("--threads", help="Threads of PyTorch; all cores.")] = 0,
    split: SplitShares = "60/20/20",
    test: TestFile = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    max_prompt_length: MaxPrompt = None,
    skip_bad: SkipBad = False,
    model: Annotated[
        str, typer.Option("--model", metavar="FOLDER", help="A causal language model of transformers.")
    ] = "auto",
    solver: Solver = None,
    lr: LearningRate = None,
    schedule: Schedule = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = 1,
    lora: Lora = None,
    gradient_checkpointing: Checkpointing = False,
    reference: Reference = "live",
    device: Device = "auto",
    precision: Precision = "fp32",
    deterministic: Deterministic = False,
    tracker: Trackers = None,
    quiet: Quiet = False,
    log: Log = None,
    debug: Debug = False,
) -> int:
    """Train a language model on one formula, measure it on held-out answers, and keep it as a folder.

    poise align pairs.jsonl "dpo(beta=0.1) + 0.2*sft" --model ./my-lm --save ./aligned
    """
    from poise.studies import Study
    from poise.tasks.load import is_language_source

    if not is_language_source(data):
        raise InputError(
            f"`poise align` trains a language model on texts: replies, JSON lines, Parquet with chosen and rejected, or a folder "
            f"that `datasets` saved; {data} is none of these. `poise fit` trains on tables and images."
        )
    prepared = Study(
        data, formula, [seed], split=_shares(split), test_file=test, limit=limit, max_length=max_length,
        max_prompt_length=max_prompt_length, skip_bad=skip_bad, model=model, solver=solver, lr=lr, schedule=schedule,
        epochs=epochs, steps=steps, batch_size=batch_size, accumulate=accumulate, lora=lora,
        gradient_checkpointing=gradient_checkpointing, reference=reference, precision=precision, device=device, deterministic=deterministic,
        tune=0, leave_one_out=False, threads=threads or os.cpu_count() or 1,
    )  # fmt: skip
    return _fit_one(prepared, save, _terminal(quiet), log, tracker)


@app.command()
@command
def predict(
    folder: Annotated[Path, typer.Argument(help="A folder that `poise fit --save` wrote.")],
    data: Annotated[Path, typer.Argument(help="New rows, in a file like the one that was trained on.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where the CSV goes; standard output by default.")
    ] = None,
    device: Device = "auto",
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code", help="Also run the factory that a saved model names; only for folders that you trust."
        ),
    ] = False,
    debug: Debug = False,
) -> int:
    """Predict new rows with a kept model: a CSV with the prediction and, for classes, every probability."""
    from poise.saved import SavedModel

    predictions = SavedModel.load(folder, allow_code=allow_code).predict(data, device=device)
    if out is None:
        predictions.write_csv(sys.stdout)
        return DONE
    with out.open("w", encoding="utf-8", newline="") as file:
        predictions.write_csv(file)
    _terminal().say(f"{len(predictions.values):,} predictions: {out}")
    return DONE


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
    from poise.studies import Study
    from poise.tables import study_results

    summary = Study.open(folder)
    page = write_report(summary, folder)
    _terminal().print(*study_results(summary), f"\nReport: {page}")
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
