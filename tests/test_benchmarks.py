"""`make bench`: each benchmark alone in its process, a trend that remembers, a table that keeps the prose, a lost goal that fails."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
command, page, runner, trend, harness = (
    importlib.import_module(f"benchmarks.{name}") for name in ("__main__", "page", "runner", "trend", "harness")
)
PAGE = f"# Figures\n\nProse before.\n\n{page.BEGIN}\nold\n{page.END}\n\nProse after.\n"
RATIO = "from benchmarks.harness import Ratio\ndef run(quick):\n    return [Ratio({arguments})]\n"


def bench(folder: Path, name: str, body: str) -> None:
    (folder / f"bench_{name}.py").write_text(body, encoding="utf-8")


def figure(folder: Path, name: str, value: float, goal: float = 1.0, better: str = "lower") -> None:
    bench(folder, name, RATIO.format(arguments=f"'ours | theirs', {value}, {goal}, {better!r}, 'sizes'"))


def run(folder: Path, *arguments: str) -> int:
    if not (folder / "page.md").exists():
        (folder / "page.md").write_text(PAGE, encoding="utf-8")
    places = ("--folder", str(folder), "--trend", str(folder / "trend.jsonl"), "--page", str(folder / "page.md"))
    status: int = command.main([*arguments, *places])
    return status


def statuses(folder: Path) -> list[str]:
    return [ratio["status"] for line in trend.read(folder / "trend.jsonl") for ratio in line["ratios"]]


def line(value: float | None, goal: float = 1.0, better: str = "lower", **more: Any) -> dict[str, Any]:
    met = value is not None and (value <= goal if better == "lower" else value >= goal)
    ratio = {"name": "a", "value": value, "goal": goal, "better": better, "met": met}
    ratio |= {"noise": more.pop("noise")} if "noise" in more else {}
    common = {"benchmark": "b", "mode": "full", "date": "2026-01-01", "machine": "m", "others": 0.0, "seconds": 1.0}
    return common | {"ratios": [ratio]} | more


def history(*values: float, **more: Any) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for value in values:
        lines.append(trend.judged(line(value, **more), lines))
    return lines


def test_one_broken_benchmark_loses_no_other_and_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(tmp_path, "absent", "import a_peer_that_is_absent\n")
    bench(tmp_path, "crash", "import os\ndef run(quick):\n    os._exit(3)\n")
    bench(tmp_path, "file", "def run(quick):\n    open('/some/folder/of/somebody/x.csv')\n")
    figure(tmp_path, "good", 0.5)
    assert run(tmp_path, "--quick") == 1
    assert "ModuleNotFoundError" in capsys.readouterr().err
    lines = {found["benchmark"]: found for found in trend.read(tmp_path / "trend.jsonl")}
    assert lines["good"]["ratios"][0]["status"] == "met"
    assert "a_peer_that_is_absent" in lines["absent"]["reason"]
    assert lines["crash"]["reason"] == "ended with exit status 3"
    assert "x.csv" in lines["file"]["reason"]
    assert "somebody" not in (tmp_path / "page.md").read_text() + (tmp_path / "trend.jsonl").read_text()


def test_the_limit_ends_a_benchmark_with_its_workers(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    worker = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    start = f"subprocess.Popen([sys.executable, '-c', {worker!r}])"
    bench(tmp_path, "slow", f"import subprocess, sys, time\ndef run(quick):\n    {start}\n    time.sleep(60)\n")
    outcome = runner.run("slow", True, 1.0, tmp_path)
    assert outcome.reason == "took more than 1 s"
    assert outcome.seconds < 30
    time.sleep(2.2)
    assert not mark.exists()


def test_the_table_goes_between_the_markers_and_the_prose_stays(tmp_path: Path) -> None:
    figure(tmp_path, "good", 0.5)
    assert run(tmp_path, "--quick") == 0
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# Figures\n\nProse before.\n")
    assert text.endswith("\n\nProse after.\n")
    assert "| good | ours \\| theirs | 0.5 | ≤ 1 | met |" in text
    for words in ("old", "torch ", "cores"):
        assert (words in text) == (words != "old")
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    assert run(tmp_path, "--table") == 0
    assert (tmp_path / "page.md").read_text() == text


def test_a_page_without_markers_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure(tmp_path, "good", 0.5)
    (tmp_path / "page.md").write_text("no markers", encoding="utf-8")
    assert run(tmp_path, "--quick") == 2
    assert page.BEGIN in capsys.readouterr().err
    assert not (tmp_path / "trend.jsonl").exists()


def test_a_goal_that_is_lost_fails_until_it_is_met_or_accepted(tmp_path: Path) -> None:
    figure(tmp_path, "one", 0.9)
    assert run(tmp_path, "--quick") == 0
    figure(tmp_path, "one", 1.5)
    assert run(tmp_path, "--quick") == 1
    assert trend.read(tmp_path / "trend.jsonl")[-1]["runs"] == command.REPEATS + 1
    assert "**no longer met**" in (tmp_path / "page.md").read_text()
    # Asking twice does not make it go away.
    assert run(tmp_path, "--quick") == 1
    assert run(tmp_path, "--quick", "--accept") == 0
    assert run(tmp_path, "--quick") == 0
    assert statuses(tmp_path) == ["met", "lost", "lost", "missed", "missed"]


def test_one_bad_run_of_three_is_no_loss(tmp_path: Path) -> None:
    figure(tmp_path, "one", 0.9)
    assert run(tmp_path, "--quick") == 0
    count = tmp_path / "count"
    value = f"(open({str(count)!r}, 'a').write('x'), 3.0 if len(open({str(count)!r}).read()) == 1 else 0.8)[1]"
    bench(tmp_path, "one", RATIO.format(arguments=f"'ours | theirs', {value}, 1.0"))
    assert run(tmp_path, "--quick") == 0
    assert statuses(tmp_path) == ["met", "met"]


@pytest.mark.parametrize(("better", "good", "bad"), [("lower", 0.9, 1.1), ("higher", 1.1, 0.9)])
def test_a_ratio_is_lost_only_by_more_than_its_noise(better: str, good: float, bad: float) -> None:
    before = history(good, better=better)
    for noise, expected in ((0.05, "lost"), (0.15, "near")):
        assert trend.judged(line(bad, better=better, noise=noise), before)["ratios"][0]["status"] == expected


def test_without_pairs_the_noise_is_the_spread_of_earlier_runs_on_the_same_machine() -> None:
    steady, unsteady = history(0.98, 0.98), history(0.5, 0.98)
    assert trend.judged(line(1.02), steady)["ratios"][0]["status"] == "lost"
    assert trend.judged(line(1.02), unsteady)["ratios"][0]["status"] == "near"
    # Another machine's spread says nothing here: a twentieth of the goal is left.
    assert trend.judged(line(1.1, machine="other"), unsteady)["ratios"][0]["status"] == "lost"
    assert trend.judged(line(None), steady)["ratios"][0]["status"] == "lost"


def test_near_misses_do_not_wear_a_goal_away() -> None:
    assert [one["ratios"][0]["status"] for one in history(0.99, 1.02, 1.3)] == ["met", "near", "lost"]


def test_quick_and_full_and_changed_goals_are_not_compared() -> None:
    before = history(0.9)
    for more in ({"mode": "quick"}, {"goal": 1.1}):
        assert trend.judged(line(1.5, **more), before)["ratios"][0]["status"] == "missed"


def test_a_run_that_gave_no_figure_does_not_hide_that_a_goal_was_met() -> None:
    before = [*history(0.9), line(1.0) | {"ratios": [], "reason": "took more than 1 s"}]
    assert trend.judged(line(1.5), before)["ratios"][0]["status"] == "lost"
    shown = page.table([one | {"versions": {"torch": "2"}} for one in before])
    assert "| b | a | 0.9 | ≤ 1 | met |" in shown
    assert "could not be measured" in shown


def test_the_trend_file_stays_small_and_keeps_the_newest_details(tmp_path: Path) -> None:
    lines = history(*[0.5] * 30)
    for one in lines:
        one["ratios"][0]["detail"] = "sizes"
        one["versions"] = {"torch": "2.13"}
    trend.write(tmp_path / "trend.jsonl", lines)
    kept = trend.read(tmp_path / "trend.jsonl")
    assert len(kept) == trend.KEPT
    assert [("versions" in one, "detail" in one["ratios"][0]) for one in kept[-2:]] == [(False, False), (True, True)]


def test_a_broken_trend_file_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trend.jsonl").write_text("{", encoding="utf-8")
    assert run(tmp_path, "--quick") == 2
    assert "restore it from git" in capsys.readouterr().err


def test_a_full_run_is_shown_before_a_later_quick_one() -> None:
    lines = [line(0.5), line(0.7, mode="quick")]
    assert "| 0.5 |" in page.table(lines)
    assert "| 0.7 |" not in page.table(lines)
    assert "(q)" in page.table(lines[1:])
    assert "(b)" in page.table([line(0.5, others=1.0)])


def test_a_paired_timing_knows_its_noise() -> None:
    measured = harness.median_of_pairs([1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.0, 1.0])
    assert float(measured) == 1.0
    assert 0 < measured.noise <= 0.2
    assert harness.median_of_pairs([1.0]).noise == 0
    assert harness.median_of_pairs([1.0, 2.0, 3.0]).noise == 1.0
    ratio = harness.Ratio("a", harness.paired(lambda: None, lambda: None, repeats=5).ratio, 1.0)
    assert ratio.noise is not None
    assert json.dumps(importlib.import_module("benchmarks.child").row(ratio))


def test_the_machine_is_said_without_its_name() -> None:
    import socket

    assert socket.gethostname() not in runner.machine()
    assert "cores" in runner.machine()
    assert (
        runner.without_paths("no file '/a/b/c.csv'; see https://x.org/a/b") == "no file 'c.csv'; see https://x.org/a/b"
    )


def test_every_benchmark_of_the_repository_has_a_run() -> None:
    import ast

    for name in runner.names():
        tree = ast.parse((runner.HERE / f"bench_{name}.py").read_text(encoding="utf-8"))
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
        assert found, f"bench_{name}.py has no run(quick)"
        assert [a.arg for a in found[0].args.args] == ["quick"]


def test_the_page_of_the_docs_holds_the_markers() -> None:
    text = (runner.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert text.count(page.BEGIN) == text.count(page.END) == 1
