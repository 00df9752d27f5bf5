from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from studies_fakes import GAINS, make_record, task

import poise
from poise.errors import FormulaError, InputError, StoreError
from poise.studies import Store, Study, summarize
from poise.studies.lock import FolderLock

AUTO = "cross_entropy + auto*l2"


def starts(folder: Path) -> collections.Counter[str]:
    return collections.Counter((folder / "started.log").read_text().split())


def test_a_study_runs_every_formula_on_the_same_seeds_and_finds_the_difference(fake_study):
    study, engine = fake_study(seeds=5)
    result = study.run(engine=engine)
    assert result.ok
    summary = result.summary
    assert [[r.seed for r in f.seeds] for f in summary.formulas] == [[0, 1, 2, 3, 4]] * 2
    (difference,) = [d for d in summary.differences if d.metric == "accuracy"]
    assert difference.verdict == "better"
    # The fake adds 0.1 and noise of at most 0.01 to each of the two.
    assert difference.estimate.mean == pytest.approx(GAINS["early_learning"], abs=0.02)
    assert summary.recommendation.kind == "better"
    assert summary.recommendation.text.startswith("cross_entropy + 3*early_learning is better than cross_entropy by ")
    assert (summary.runs_done, summary.runs_planned) == (15, 15)


def test_leaving_a_term_out_reuses_the_run_of_the_formula_that_it_equals(fake_study):
    study, engine = fake_study(executor="logged")
    result = study.run(engine=engine)
    # 2 formulas and 3 * early_learning alone, on 3 seeds: the formula without early_learning is the first formula.
    assert len(starts(study.folder)) == 9
    effects = {e.label: e for e in result.summary.term_effects if e.metric == "accuracy"}
    assert set(effects) == {"cross_entropy", "early_learning"}
    assert effects["early_learning"].without == "cross_entropy"
    assert effects["early_learning"].per_seed == result.summary.differences[0].per_seed


def test_a_finished_run_is_never_repeated(fake_study):
    study, engine = fake_study(executor="logged")
    first = study.run(engine=engine)
    study, engine = fake_study(executor="logged")
    second = study.run(engine=engine)
    assert set(starts(study.folder).values()) == {1}
    assert first.summary == second.summary


def test_a_study_that_grows_runs_only_what_is_new(fake_study):
    study, engine = fake_study(executor="logged", seeds=2)
    study.run(engine=engine)
    study, engine = fake_study(("cross_entropy", "cross_entropy + 3*early_learning", "l2"), "logged", seeds=3)
    study.run(engine=engine)
    assert set(starts(study.folder).values()) == {1}
    assert len(starts(study.folder)) == 3 * 4


def test_a_failed_run_leaves_the_study_going_and_is_named(fake_study):
    study, engine = fake_study(("cross_entropy", "cross_entropy + 0.1*l2"), "failing")
    result = study.run(engine=engine)
    assert not result.ok
    names = {(run.text, run.seed, run.error) for run in result.failed}
    assert ("cross_entropy + 0.1*l2", 1, "The term 'l2' became infinite at step 3.") in names
    formula = result.summary.formulas[1]
    assert formula.failed_seeds == (1,)
    assert [r.seed for r in formula.seeds] == [0, 2]
    # The difference is over the seeds that both have.
    assert set(result.summary.differences[0].per_seed) == {0, 2}


def test_a_failed_run_is_tried_again_when_the_study_is_called_again(fake_study):
    study, engine = fake_study(("cross_entropy", "cross_entropy + 0.1*l2"), "failing")
    assert not study.run(engine=engine).ok
    study, engine = fake_study(("cross_entropy", "cross_entropy + 0.1*l2"), "logged")
    assert study.run(engine=engine).ok
    assert len(starts(study.folder)) == 2  # the formula and l2 alone, on seed 1


def test_the_summary_of_a_folder_is_that_of_the_run_and_needs_no_data(fake_study, monkeypatch):
    study, engine = fake_study()
    result = study.run(engine=engine)

    def no_data(*_, **__):
        raise AssertionError("the data were read")

    monkeypatch.setattr(Study, "task", property(no_data))
    assert Study.open(study.folder) == result.summary


def test_study_toml_runs_again_exactly(fake_study, tmp_path):
    study, engine = fake_study(executor="logged", label_noise=0.4)
    first = study.run(engine=engine)
    again = Study.from_toml(study.folder / "study.toml")
    assert again.folder == study.folder
    assert again.config == study.config
    assert [s.id for s in again.plan().wanted()] == [s.id for s in study.plan().wanted()]
    assert again.run(engine=fake_study(executor="logged")[1]).summary == first.summary
    assert set(starts(study.folder).values()) == {1}


def test_study_toml_states_every_default(fake_study):
    study, _ = fake_study()
    training = study.config.training
    assert (training.solver, training.solver_options, training.lr) == ("sgd", {"momentum": 0.9}, 0.02)
    assert (training.epochs, training.batch_size) == (150, 128)
    for line in ("lr = 0.02", "epochs = 150", "batch_size = 128", f'fingerprint = "{"f" * 64}"'):
        assert line in study.to_toml()


def test_data_that_changed_since_study_toml_was_written_are_refused(tmp_path, monkeypatch):
    import poise.tasks

    monkeypatch.setattr(poise.tasks, "load_task", lambda source, **_: task(fingerprint="a" * 64), raising=False)
    study = Study("digits", ["cross_entropy"], out=tmp_path)
    path = tmp_path / "study.toml"
    study.to_toml(path)
    monkeypatch.setattr(poise.tasks, "load_task", lambda source, **_: task(fingerprint="b" * 64), raising=False)
    with pytest.raises(InputError, match=r"data of this study have changed"):
        _ = Study.from_toml(path).config


def test_progress_tells_how_far_the_study_is(fake_study):
    study, engine = fake_study()
    seen = []
    study.run(progress=seen.append, engine=engine)
    assert (seen[0].event, seen[-1].event) == ("begun", "ended")
    assert seen[-1].done == seen[-1].planned == 9
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[0].seconds_left is None
    assert seen[-1].seconds_left == 0.0
    assert seen[-1].formulas[1].done == 3
    assert seen[-1].formulas[1].mean == pytest.approx(0.8, abs=0.02)


def test_auto_means_ten_trials_for_every_formula(fake_study):
    study, engine = fake_study(("cross_entropy", AUTO), seeds=2)
    summary = study.run(engine=engine).summary
    for formula in (0, 1):
        for seed in (0, 1):
            rows = [row for row in summary.trials if (row.formula, row.seed) == (formula, seed)]
            assert len({row.trial for row in rows}) == 10
            assert [sum(row.rung == rung for row in rows) for rung in range(3)] == [10, 4, 2]
            assert sum(row.selected for row in rows) == 1
            rates = [row.lr for row in rows if row.rung == 0]
            assert rates == [row.lr for row in summary.trials if (row.formula, row.seed, row.rung) == (0, seed, 0)]
    assert any("10 trials" in note for note in summary.notes)


def test_the_search_selects_on_validation_inside_the_seed_and_measures_the_test_split_once(fake_study):
    study, engine = fake_study((AUTO,), tune=6, seeds=2)
    summary = study.run(engine=engine).summary
    with Store(study.folder / "study.sqlite") as store:
        records = list(store.records())
    for seed in (0, 1):
        mine = [r for r in records if r.spec.seed == seed]
        assert (
            sum("test/accuracy" in r.metrics for r in mine if "auto" not in r.spec.formula) == 3
        )  # final, two without
        assert all("test/accuracy" not in r.metrics for r in mine if r.spec.measure == "valid")
        rows = [row for row in summary.trials if row.seed == seed]
        last = [row for row in rows if row.rung == 2]
        (chosen,) = [row for row in rows if row.selected]
        assert chosen.score == max(row.score for row in last)
        result = next(r for r in summary.formulas[0].seeds if r.seed == seed)
        assert (result.lr, result.weights) == (chosen.lr, chosen.weights)
        assert summary.formulas[0].selected["l2"][seed] == chosen.weights["l2"]
    assert [row.epochs for row in summary.trials if row.seed == 0][:1] == [17]  # 150 / 9


def test_the_budget_of_a_search_is_planned_before_it_is_known(fake_study):
    study, engine = fake_study((AUTO,), tune=6, seeds=2)
    seen = []
    study.run(progress=seen.append, engine=engine)
    # 6 + 2 + 1 trials, the final run and two reduced ones, on two seeds.
    assert seen[0].planned == seen[-1].planned == seen[-1].done == 24


def test_trials_that_fail_do_not_fail_the_study(fake_study, monkeypatch):
    study, engine = fake_study((AUTO,), "fails_at_large_rates", tune=6, seeds=2)
    result = study.run(engine=engine)
    assert result.ok
    assert any(row.score is None for row in result.summary.trials)
    assert all(r.lr <= 0.02 for r in result.summary.formulas[0].seeds)


def test_a_search_whose_every_trial_fails_is_named(fake_study):
    study, engine = fake_study((AUTO, "cross_entropy"), "fails_with_l2", tune=4, seeds=2)
    result = study.run(engine=engine)
    assert not result.ok
    assert result.summary.formulas[0].failed_seeds == (0, 1)
    assert any("Each of the 4 trials failed. The first one: l2 is broken." in w for w in result.summary.warnings)
    assert result.summary.formulas[1].failed_seeds == ()


def test_a_killed_worker_costs_the_study_nothing(fake_study):
    study, engine = fake_study(executor="killed_once")
    result = study.run(engine=engine)
    assert result.ok
    assert result.summary.runs_done == 9


def test_the_folder_of_a_running_study_is_refused_to_a_second_one(fake_study):
    study, engine = fake_study()
    study.folder.mkdir()
    with FolderLock(study.folder), pytest.raises(StoreError, match="is running a study"):
        study.run(engine=engine)


def test_an_output_folder_that_cannot_be_made_is_a_clear_error(fake_study):
    study, engine = fake_study(out="/proc/poise-test/out")
    with pytest.raises(StoreError, match="Choose another output folder"):
        study.run(engine=engine)


def test_checkpoints_of_finished_runs_are_removed(fake_study):
    study, engine = fake_study(executor="slow_on_seed_one_once", seeds=2)
    study.run(engine=engine)
    assert sorted(p.name for p in study.folder.iterdir() if not p.name.startswith("study.")) == ["started.log"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_study_that_is_stopped_keeps_what_finished_and_continues(fake_study, tmp_path, how):
    code = """
import sys
import poise.studies.study
import studies_fakes
from poise.studies import LocalEngine, Study
Study.task = studies_fakes.task()
poise.studies.study._rehearse = lambda plan, objectives: None
study = Study("digits", ["cross_entropy"], seeds=[0, 2, 1], out=sys.argv[1])
executor = "studies_fakes:slow_on_seed_one"
def show(progress):
    if progress.done == 2 and progress.running and min(progress.running.values()) > 0:
        print("two", flush=True)
study.run(progress=show, engine=LocalEngine(1, folder=study.folder / "checkpoints", executor=executor, grace=2.0))
"""
    out = tmp_path / "stopped"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "two\n"
    process.send_signal(how)
    process.communicate(timeout=30)
    with Store(out / "study.sqlite") as store:
        assert len(store.ids("done")) == 2
    assert [p.name for p in (out / "checkpoints").glob("*/begun")] == ["begun"]
    study, engine = fake_study(("cross_entropy",), "logged", seeds=[0, 2, 1], out=out)
    assert study.run(engine=engine).ok
    assert set(starts(out).values()) == {1}
    assert len(starts(out)) == 3


@pytest.mark.parametrize(
    ("formulas", "error", "message"),
    [
        (["cross_entropy", "1.0 * cross_entropy"], InputError, "given twice"),
        (["cross_entorpy"], FormulaError, "cross_entropy"),
        (["cross_entropy - 0.1*l2"], InputError, "negative weight"),
        ([], InputError, "formulas"),
    ],
)
def test_formulas_that_make_no_study_are_refused(tmp_path, formulas, error, message):
    with pytest.raises(error, match=message):
        Study("digits", formulas, out=tmp_path)


def test_a_device_that_is_not_there_is_refused(fake_study):
    study, _ = fake_study(device="cuda:99")
    with pytest.raises(InputError, match="cuda:99"):
        _ = study.config


def test_objectives_and_one_formula_are_accepted(fake_task, tmp_path):
    assert Study("digits", poise.parse("l2 + cross_entropy"), out=tmp_path).config.formulas == ("l2 + cross_entropy",)
    assert Study("digits", "l2", seeds=[7], out=tmp_path).config.seeds == (7,)


def test_ten_thousand_runs_are_replayed_and_summarised(fake_study):
    # How long it takes is a benchmark, bench_studies.
    study, _ = fake_study(seeds=3333)
    plan = study.plan()
    records = [make_record(spec, points=2) for spec in plan.wanted()]
    assert len(records) == 9999
    plan.feed(records)
    summary = summarize(plan, study.describe())
    assert (summary.runs_done, summary.formulas[1].metrics["accuracy"].n) == (9999, 3333)
