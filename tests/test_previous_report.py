"""Baselines with the settings of a previous report: which runs are made, and the comparison of their losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from inline import Pool

from meta_train.evaluate import Folders, evaluate
from meta_train.evaluation import tiny
from meta_train.evaluation.optimizers import TUNED
from meta_train.evaluation.previous_report import PreviousReport
from meta_train.evaluation.splits import SPLITS


def run_count(folder: Path) -> int:
    """Number of cached runs."""
    return sum(1 for _ in folder.rglob("*.json"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_baselines_are_not_tuned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meta_train.evaluation.study.ProcessPoolExecutor", Pool)
    first = Folders(data=tmp_path, cache=tmp_path / "cache", out=tmp_path / "first")
    evaluate("tiny", ("default",), 1, workers=1, folders=first)
    again = Folders(data=tmp_path, cache=tmp_path / "elsewhere", out=tmp_path / "again")
    evaluate("tiny", ("adamw",), 1, tuned=first.out / "tiny.json", workers=1, folders=again)
    assert (
        run_count(again.cache) == len(tiny.TASKS) * 4
    )  # AdamW as chosen and at its defaults, the rule with the horizon known and unknown
    assert run_count(first.cache) > run_count(again.cache)
    old, new = (json.loads((folder.out / "tiny.json").read_text()) for folder in (first, again))
    rows = [{(r["task"], r["optimizer"]): (r["setting"], r["loss"]) for r in x["rows"]} for x in (old, new)]
    for names in rows[1]:
        if names[1] not in ("adamw", "adamw, horizon known"):
            assert rows[0][names] == rows[1][names]
    assert {s["optimizer"]: s["settings"] for s in new["summary"]}["AdamW tuned"] == len(SPLITS["tiny"].reference.grid)
    count = 2 * len(tiny.TASKS)
    assert f"{count} of {count} losses are identical to the previous ones." in (again.out / "tiny.md").read_text()


def test_losses_are_compared_with_those_of_the_report() -> None:
    names = ("a task", TUNED.name)
    previous = PreviousReport({names: "lr 0.1"}, {names: [1.0, 2.0, None]})

    class Row:
        task, optimizer = names
        loss = (1.0, 2.2, 3.0)

    sentence = previous.comparison([Row()])  # type: ignore[list-item] # the fields that are read
    assert sentence.endswith(
        "1 of 2 losses are identical to the previous ones, the others differ by factors of 1.10 to 1.10."
    )
    assert PreviousReport().comparison([Row()]) == ""  # type: ignore[list-item]


def test_invalid_reports_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    with pytest.raises(FileNotFoundError, match="expected the JSON file of a previous report, found none"):
        PreviousReport.read(file, "tiny", ["AdamW tuned"])
    for content in ("no json", "[]", "{}", '{"split": "tiny", "rows": [{}]}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="expected a report that"):
            PreviousReport.read(file, "tiny", ["AdamW tuned"])
    file.write_text('{"split": "test", "rows": []}')
    with pytest.raises(ValueError, match="expected a report on 'tiny', found one on 'test'"):
        PreviousReport.read(file, "tiny", ["AdamW tuned"])
    row = {"task": tiny.TASKS[0].name, "optimizer": "AdamW tuned", "setting": "lr 7", "loss": [1.0]}
    file.write_text(json.dumps({"split": "tiny", "rows": [row]}))
    folders = Folders(data=tmp_path, cache=tmp_path / "cache", out=tmp_path)
    with pytest.raises(ValueError, match=r"expected a setting of AdamW tuned .* found 'lr 7'.*without --tuned"):
        evaluate("tiny", ("adamw",), 1, tuned=file, folders=folders)
