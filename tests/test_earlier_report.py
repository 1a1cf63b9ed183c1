"""Settings of baselines taken over from an earlier report: what is run then, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meta_train.evaluate import Folders, evaluate
from meta_train.evaluation import tiny
from meta_train.evaluation.earlier import Earlier
from meta_train.evaluation.optimizers import TUNED
from meta_train.evaluation.splits import SPLITS


def runs(folder: Path) -> int:
    """How many are kept."""
    return sum(1 for _ in folder.rglob("*.json"))


@pytest.mark.timeout(300)
def test_baselines_are_not_tuned_again(tmp_path: Path) -> None:
    first = Folders(data=tmp_path, cache=tmp_path / "cache", out=tmp_path / "first")
    evaluate("tiny", ("default",), 1, workers=1, folders=first)
    again = Folders(data=tmp_path, cache=tmp_path / "elsewhere", out=tmp_path / "again")
    evaluate("tiny", ("adamw",), 1, tuned=first.out / "tiny.json", workers=1, folders=again)
    assert runs(again.cache) == len(tiny.TASKS) * 4  # AdamW as chosen and at its defaults, the rule told and not
    assert runs(first.cache) > runs(again.cache)
    old, new = (json.loads((folder.out / "tiny.json").read_text()) for folder in (first, again))
    rows = [{(r["task"], r["optimizer"]): (r["setting"], r["loss"]) for r in x["rows"]} for x in (old, new)]
    for names in rows[1]:
        if names[1] not in ("adamw", "adamw, told"):
            assert rows[0][names] == rows[1][names]
    assert {s["optimizer"]: s["settings"] for s in new["summary"]}["AdamW tuned"] == len(SPLITS["tiny"].reference.grid)
    count = 2 * len(tiny.TASKS)
    assert f"of {count} losses {count} are those of that one to the last digit." in (again.out / "tiny.md").read_text()


def test_how_far_losses_are_from_those_of_the_report() -> None:
    names = ("a task", TUNED.name)
    earlier = Earlier({names: "lr 0.1"}, {names: [1.0, 2.0, None]})

    class Row:
        task, optimizer = names
        loss = (1.0, 2.2, 3.0)

    said = earlier.compared([Row()])  # type: ignore[list-item] # all that is looked at
    assert said.endswith("of 2 losses 1 are those of that one to the last digit, the others 1.10 to 1.10 times them.")
    assert Earlier().compared([Row()]) == ""  # type: ignore[list-item]


def test_reports_that_will_not_do(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    with pytest.raises(FileNotFoundError, match="expected the JSON file of an earlier report, found none"):
        Earlier.read(file, "tiny", ["AdamW tuned"])
    for content in ("no json", "[]", "{}", '{"split": "tiny", "rows": [{}]}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="expected a report that"):
            Earlier.read(file, "tiny", ["AdamW tuned"])
    file.write_text('{"split": "test", "rows": []}')
    with pytest.raises(ValueError, match="expected a report on 'tiny', found one on 'test'"):
        Earlier.read(file, "tiny", ["AdamW tuned"])
    row = {"task": tiny.TASKS[0].name, "optimizer": "AdamW tuned", "setting": "lr 7", "loss": [1.0]}
    file.write_text(json.dumps({"split": "tiny", "rows": [row]}))
    folders = Folders(data=tmp_path, cache=tmp_path / "cache", out=tmp_path)
    with pytest.raises(ValueError, match=r"expected a setting of AdamW tuned .* found 'lr 7'.*without --tuned"):
        evaluate("tiny", ("adamw",), 1, tuned=file, folders=folders)
