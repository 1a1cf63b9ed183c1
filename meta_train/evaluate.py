"""Comparison of rules with baselines that are tuned for each task.

    python -m meta_train evaluate --rule default --rule runs/x/theta.safetensors --data FOLDER

trains the networks of a benchmark with every optimizer, from the same initial parameters and on the same batches,
unless the runs are cached, and writes tables, plots and a JSON file.
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
from meta_train.evaluation.figures import rows_of, summaries_of
from meta_train.evaluation.optimizers import Make, contenders_of, fingerprint, horizon_known_label
from meta_train.evaluation.previous_report import PreviousReport
from meta_train.evaluation.splits import SPLITS
from meta_train.evaluation.study import Result, Study
from meta_train.tasks.folder import FOLDER


@dataclass(frozen=True)
class Folders:
    """Input and output folders.

    Args:
        data: Folder with fashion_mnist.npz and cifar10.npz; by default the value of NFN_OPTIM_DATA.
        cache: Folder of finished runs; several commands may use it at once.
        out: Folder of the report.
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

    Writes SPLIT.md, SPLIT_tasks.md, SPLIT.json and two plots. An interrupted command resumes when it is run again.

    Args:
        split: development: tasks for model selection; test: for the final report only; published: the protocol of the
            literature; tiny: a smoke test of seconds, without data files.
        rule: Name or file of a rule; may be repeated. By default, the shipped rule.
        seeds: Seeds of initial parameters and batches, per task and optimizer.
        thorough: Also tuned SGD, Muon and schedule-free AdamW, the nominal rule, and the rules with a tuned learning
            rate and without symmetry.
        tuned: JSON file of a previous report on the split. Baselines use the settings selected there instead of being
            tuned again: minutes instead of hours. The report compares their losses with the previous ones.
        workers: Processes, one thread each.
        folders: Input and output folders.

    Raises:
        ValueError: A number is out of range, or the previous report is on another benchmark.
        FileNotFoundError: A rule, a data file or the previous report is missing.
    """
    if seeds < 1 or workers < 1:
        raise ValueError(f"expected at least one seed and one worker, found {seeds} and {workers}")
    benchmark = SPLITS[split]
    labels = labels_of(rule or ("default",))
    fingerprints = {label: fingerprint(path) for label, path in labels.items()}
    rules = tuple(c for label, path in labels.items() for c in contenders_of(path, label, thorough=thorough))
    baselines = benchmark.baselines(thorough=thorough)
    contenders = (*baselines, *rules)
    previous = PreviousReport() if tuned is None else PreviousReport.read(tuned, split, [c.name for c in baselines])
    criterion, selected = benchmark.criterion, previous.settings
    results = Study(benchmark.tasks, contenders, seeds, folders.data, folders.cache, criterion, selected).run(workers)
    rows = rows_of(benchmark, results, seconds_of(results, folders.data))
    summaries = summaries_of(benchmark, rows, {c.name: len(c.grid) for c in contenders})
    about = f"torch {torch.__version__}, {platform.machine()}, {seeds} seeds, one thread.{previous.comparison(rows)}"
    main = [name for label in labels for name in (label, horizon_known_label(label))]
    text = report.page(benchmark, rows, summaries, main, about)
    content = {"split": split, "torch": torch.__version__, "seeds": seeds, "rules": fingerprints}
    content |= report.json_of(rows, summaries)
    report.write(folders.out, split, (text, report.long_table(rows)), content)
    plots.curves(results, folders.out / f"{split}_curves.png")
    plots.profile(rows, folders.out / f"{split}_profile.png")
    sys.stdout.write(f"{text}\nwrote {folders.out / split}.md, _tasks.md, .json, _curves.png, _profile.png\n")


def labels_of(rules: tuple[str, ...]) -> dict[str, str]:
    """Label in tables -> name or file of a rule; the label is the run's folder, or the file if that is ambiguous."""
    short = {path: Path(path).parent.name if path.endswith(".safetensors") else path for path in rules}
    names = list(short.values())
    return {name if name and names.count(name) == 1 else path: path for path, name in short.items()}


def seconds_of(results: list[Result], data: Path) -> dict[tuple[str, Make], float]:
    """Seconds per step by name of the task and constructor of the optimizer, measured now, in turns."""
    from tqdm import tqdm  # noqa: PLC0415 - an extra

    torch.set_num_threads(1)
    seconds: dict[tuple[str, Make], float] = {}
    for task in tqdm({result.task.name: result.task for result in results}.values(), desc="timing"):
        settings = {result.setting.make: result.setting for result in results if result.task is task}
        measured = step_time.step_times(task, list(settings.values()), data)
        seconds |= {(task.name, make): value for make, value in zip(settings, measured, strict=True)}
    return seconds
