"""Runs that are read out on the way, and studies in pieces."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from inline import Pool

from meta_train.evaluate import Extent, Folders, evaluate
from meta_train.evaluation import anytime, tiny
from meta_train.evaluation.cache import Run
from meta_train.evaluation.optimizers import TUNED, Contender, Setting, adamw
from meta_train.evaluation.splits import SPLITS
from meta_train.evaluation.study import Job, Result, cache_key_of

INF = math.inf


def test_a_run_is_read_out_where_the_shorter_one_ends() -> None:
    long = [8.0] * 100 + [2.0] * 30 + [1.0] * 170  # the running mean is over 30 batches
    assert anytime.loss_ratio(long, [9.0] * 70 + [4.0] * 30) == 2
    assert anytime.loss_ratio(long, [9.0] * 100 + [4.0] * 30) == 0.5
    assert anytime.loss_ratio(long, [1.0] * 115) == 5  # of 8 and 2, half each
    assert anytime.loss_ratio([1.0] * 99 + [INF], [1.0] * 99) == 1
    assert anytime.loss_ratio([1.0] * 99 + [INF], [1.0] * 100) == anytime.MAX_RATIO


def test_rows_and_page_of_known_curves() -> None:
    task = replace(tiny.TASKS[0], steps=800)
    assert anytime.lengths_of(task) == [100, 200, 400, 800]
    curve = [4.0] * 150 + [2.0] * 650
    contender = Contender("rule", (Setting(adamw),))
    whole = Result(task, contender, contender.grid[0], [Run(curve, [], 1.0)])
    finals = {100: 4.0, 200: 1.99, 400: 1.0, 800: 4.0}
    references = {
        (task.name, steps): Result(anytime.shortened(task, steps), TUNED, TUNED.grid[0], [Run([loss] * steps, [], 1.0)])
        for steps, loss in finals.items()
    }
    (row,) = anytime.rows_of([whole], references)
    assert {steps: ratio for steps, (ratio,) in row.ratios.items()} == pytest.approx(
        {100: 1, 200: 2 / 1.99, 400: 2, 800: 0.5}
    )
    page = anytime.page([row], "AdamW tuned", "About.")
    assert "| rule | 100 % | 100 % | 0 % | 100 % | 1.00 | 1.01 | 2.00 | 0.50 |" in page
    assert f"| {task.name} | 1.00 · 1.01 · 2.00 · 0.50 |" in page


def test_a_shortened_task_of_full_length_is_the_task(tmp_path: Path) -> None:
    task = tiny.TASKS[0]
    whole, half = (Job(anytime.shortened(task, steps), Setting(adamw), 0) for steps in (task.steps, task.steps // 2))
    assert cache_key_of(whole, tmp_path) == cache_key_of(Job(task, Setting(adamw), 0), tmp_path)
    assert cache_key_of(half, tmp_path) != cache_key_of(whole, tmp_path)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    monkeypatch.setattr("meta_train.evaluation.study.ProcessPoolExecutor", Pool)
    reference = replace(SPLITS["tiny"].reference, grid=SPLITS["tiny"].reference.grid[-1:])
    monkeypatch.setitem(SPLITS, "tiny", replace(SPLITS["tiny"], reference=reference))
    return Folders(tmp_path, tmp_path / "cache", tmp_path / "out")


def test_a_study_in_pieces_is_listed_cached_and_reported(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("AdamW tuned", "AdamW defaults"):
        evaluate("tiny", ("adamw",), 1, Extent(tasks=("wave",), contenders=(name,)), folders=folders)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"wave, MLP | {name} | lr ")
    assert not folders.out.exists()
    made = set(folders.cache.rglob("*.json"))
    assert len(made) == 2
    evaluate("tiny", ("adamw",), 1, Extent(tasks=("wave",)), folders=folders)
    assert made < set(folders.cache.rglob("*.json"))
    content = json.loads((folders.out / "tiny_part.json").read_text())
    assert content["split"] == "tiny"
    assert {row["task"] for row in content["rows"]} == {"wave, MLP"}
    assert not (folders.out / "tiny.json").exists()


def test_the_anytime_study_writes_its_own_report(folders: Folders) -> None:
    evaluate("tiny", ("adamw",), 1, Extent(tasks=("wave",), anytime=True), folders=folders)
    rows = json.loads((folders.out / "tiny_part_anytime.json").read_text())["rows"]
    assert [row["optimizer"] for row in rows] == ["AdamW tuned", "schedule-free tuned", "adamw"]
    assert all(list(row["ratios"]) == ["5", "10", "20", "40"] for row in rows)
    assert rows[0]["ratios"]["40"] == [1.0]


@pytest.mark.parametrize(
    ("extent", "message"),
    [
        (Extent(tasks=("nothing",)), "expected words from names of tasks"),
        (Extent(contenders=("SOAP",)), r"expected names of contenders, .*'SOAP tuned'.* found \['SOAP'\]"),
    ],
)
def test_unknown_names_are_refused(extent: Extent, message: str, folders: Folders) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate("tiny", ("adamw",), 1, extent, folders=folders)
