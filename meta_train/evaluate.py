"""Rules against baselines that are tuned for each task: from runs to a report.

    python -m meta_train evaluate --rule default --rule runs/x/theta.safetensors --data FOLDER

trains the networks of a benchmark with every optimizer, from the same initial parameters and on the same batches, as
far as the runs are not in the cache, and writes tables, pictures and a JSON file.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from meta_train.evaluation import plots, report, step_time
from meta_train.evaluation.earlier import Earlier
from meta_train.evaluation.figures import rows_of, summaries_of
from meta_train.evaluation.optimizers import Make, entries_of, fingerprint
from meta_train.evaluation.splits import SPLITS
from meta_train.evaluation.study import Result, Study
from meta_train.tasks.folder import FOLDER


@dataclass(frozen=True)
class Folders:
    """Where things are.

    Args:
        data: Folder with fashion_mnist.npz and cifar10.npz; by default the one that NFN_OPTIM_DATA names.
        cache: Folder for finished runs; several commands may use it at once.
        out: Folder for the report.
    """

    data: Path = Path(os.environ.get(FOLDER, "."))
    cache: Path = Path("runs/evaluation")
    out: Path = Path("benchmarks/results")


def evaluate(
    split: Literal["development", "test", "published", "tiny"] = "development",
    rule: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    seeds: int = 3,
    thorough: bool = False,
    tuned: Path | None = None,
    workers: int = 2,
    folders: Annotated[Folders, tyro.conf.arg(name="")] = Folders(),
) -> None:
    """Compare rules with AdamW tuned for each task.

    Writes SPLIT.md, SPLIT_tasks.md, SPLIT.json and two pictures. A command that was stopped continues where it was.

    Args:
        split: development: tasks that may be looked at while choosing; test: for the report only; published: the
            protocol of the literature; tiny: seconds, no data, to see that it runs.
        rule: Name or file of a rule; may be given again. By default, the one that ships.
        seeds: Of initial parameters and batches, for each task and optimizer.
        thorough: Also tuned SGD, Muon and schedule-free AdamW, the nominal rule, and the rules with a tuned learning
            rate and with tensors kept apart.
        tuned: JSON file of an earlier report on the split. Baselines are run with the settings that were chosen there,
            and not tuned again: minutes instead of hours. The page says how far their losses are from those.
        workers: Processes, one thread each.
        folders: Where things are.

    Raises:
        ValueError: A number is out of range, or the earlier report is of something else.
        FileNotFoundError: A rule, a data file or the earlier report is missing.
    """
    if seeds < 1 or workers < 1:
        raise ValueError(f"expected at least one seed and one worker, found {seeds} and {workers}")
    chosen = SPLITS[split]
    labels = labels_of(rule or ("default",))
    known = {label: fingerprint(path) for label, path in labels.items()}
    rules = tuple(entry for label, path in labels.items() for entry in entries_of(path, label, thorough=thorough))
    baselines = chosen.baselines(thorough=thorough)
    entries = (*baselines, *rules)
    earlier = Earlier() if tuned is None else Earlier.read(tuned, split, [entry.name for entry in baselines])
    study = Study(chosen.tasks, entries, seeds, folders.data, folders.cache, chosen.criterion, earlier.settings)
    results = study.run(workers)
    rows = rows_of(chosen, results, seconds_of(results, folders.data))
    summaries = summaries_of(chosen, rows, {entry.name: len(entry.grid) for entry in entries})
    about = f"torch {torch.__version__}, {platform.machine()}, {seeds} seeds, one thread.{earlier.compared(rows)}"
    main = [entry.name for entry in rules if entry.name in (*labels, *(f"{label}, told" for label in labels))]
    text = report.page(chosen, rows, summaries, main, about)
    content = {"split": split, "torch": torch.__version__, "seeds": seeds, "rules": known}
    content |= report.described(rows, summaries)
    report.write(folders.out, split, (text, report.long_table(rows)), content)
    plots.curves(results, folders.out / f"{split}_curves.png")
    plots.profile(rows, folders.out / f"{split}_profile.png")
    sys.stdout.write(f"{text}\nwrote {folders.out / split}.md, _tasks.md, .json, _curves.png, _profile.png\n")


def labels_of(rules: tuple[str, ...]) -> dict[str, str]:
    """What tables call rules -> their names or files: the run's folder, or the file where that is not enough."""
    short = {path: Path(path).parent.name if path.endswith(".safetensors") else path for path in rules}
    names = list(short.values())
    return {name if name and names.count(name) == 1 else path: path for path, name in short.items()}


def seconds_of(results: list[Result], data: Path) -> dict[tuple[str, Make], float]:
    """Seconds per step by name of the task and how the optimizer is made, measured now, side by side."""
    from tqdm import tqdm  # noqa: PLC0415 - an extra

    torch.set_num_threads(1)
    found: dict[tuple[str, Make], float] = {}
    for task in tqdm({result.task.name: result.task for result in results}.values(), desc="timing"):
        settings = {result.setting.make: result.setting for result in results if result.task is task}
        measured = step_time.step_times(task, list(settings.values()), data)
        found |= {(task.name, make): seconds for make, seconds in zip(settings, measured, strict=True)}
    return found
