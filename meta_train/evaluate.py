"""Comparison of rules with baselines that are tuned for each task.

    python -m meta_train evaluate --rule default --rule runs/x/theta.safetensors --data FOLDER

trains the networks of a benchmark with every optimizer, from the same initial parameters and on the same batches,
unless the runs are cached, and writes tables, plots and a JSON file. A benchmark of hours can be made in pieces:

    python -m meta_train evaluate --tasks transformer GRU --contenders "SOAP tuned" "Muon tuned" --data FOLDER

trains, caches and lists; the command without filters then makes what is missing and writes the report.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from meta_train.evaluation import anytime, plots, report, step_time
from meta_train.evaluation.figures import rows_of, summaries_of
from meta_train.evaluation.optimizers import (
    DEFAULTS,
    SCHEDULE_FREE,
    Contender,
    Make,
    contenders_of,
    fingerprint,
    horizon_known_label,
)
from meta_train.evaluation.previous_report import PreviousReport
from meta_train.evaluation.splits import SPLITS, Split
from meta_train.evaluation.study import Result, Study
from meta_train.evaluation.task import Task
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


@dataclass(frozen=True)
class Extent:
    """What is compared.

    Args:
        thorough: Also all tuned rivals, the nominal rule, and the rules with a tuned rate and without symmetry.
        tasks: Only tasks with one of these words in their name; the report is called SPLIT_part.
        contenders: Only contenders with one of these names: runs are cached and listed, no report is written.
        anytime: Another study instead: rules that are not told the horizon, and schedule-free AdamW, after 1/8, 1/4,
            1/2 and all of a run, beside AdamW tuned for each of these lengths. The report is called SPLIT_anytime.
    """

    thorough: bool = False
    tasks: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    anytime: bool = False


@dataclass(frozen=True)
class Comparison:
    """A benchmark, or a part of one, with the rules on it.

    Attributes:
        title: Name of the benchmark.
        split: The benchmark, with the chosen tasks.
        labels: Label in tables -> name or file of a rule.
        seeds: Per task and optimizer.
        workers: Processes.
        folders: Input and output folders.
        selected: Settings of a previous report, see `Study.selected`.
    """

    title: str
    split: Split
    labels: Mapping[str, str]
    seeds: int
    workers: int
    folders: Folders
    selected: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the report."""
        return self.title if self.split.tasks == SPLITS[self.title].tasks else f"{self.title}_part"

    @property
    def about(self) -> str:
        """A line on the versions, machine and seeds."""
        return f"torch {torch.__version__}, {platform.machine()}, {self.seeds} seeds, one thread."

    def contenders(self, *, thorough: bool) -> tuple[Contender, ...]:
        """The baselines, then the rules."""
        rules = (c for label, path in self.labels.items() for c in contenders_of(path, label, thorough=thorough))
        return (*self.split.baselines(thorough=thorough), *rules)

    def results(self, tasks: Sequence[Task], contenders: Sequence[Contender]) -> list[Result]:
        """Train what is not cached."""
        folders, criterion = self.folders, self.split.judge.criterion
        study = Study(tasks, contenders, self.seeds, folders.data, folders.cache, criterion, self.selected)
        return study.run(self.workers)

    def write(self, name: str, pages: Mapping[str, str], content: Mapping[str, Any]) -> None:
        """Write pages, by the end of their name, and a JSON file; print the first page."""
        rules = {label: fingerprint(path) for label, path in self.labels.items()}
        content = {"split": self.title, "torch": torch.__version__, "seeds": self.seeds, "rules": rules} | dict(content)
        report.write(self.folders.out, name, {f"{name}{end}": text for end, text in pages.items()}, content)
        files = ", ".join([*(f"{name}{end}.md" for end in pages), f"{name}.json"])
        sys.stdout.write(f"{next(iter(pages.values()))}\nwrote {files} in {self.folders.out}\n")


def evaluate(
    split: Literal["development", "test", "real", "published", "tiny"] = "development",
    rule: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    seeds: int = 3,
    extent: Annotated[Extent, tyro.conf.arg(name="")] = Extent(),
    tuned: Path | None = None,
    workers: int = os.cpu_count() or 1,
    folders: Annotated[Folders, tyro.conf.arg(name="")] = Folders(),
) -> None:
    """Compare rules with AdamW tuned for each task.

    Writes SPLIT.md, SPLIT_tasks.md, SPLIT.json and two plots. An interrupted command resumes when it is run again.

    Args:
        split: development: tasks for model selection; test: for the final report only; real: larger networks, trained
            as people train them, judged by held-out loss; published: the protocol of the literature; tiny: a smoke
            test of seconds, without data files.
        rule: Name or file of a rule; may be repeated. By default, the shipped rule.
        seeds: Seeds of initial parameters and batches, per task and optimizer.
        extent: What is compared.
        tuned: JSON file of a previous report on the split. Baselines use the settings selected there instead of being
            tuned again: minutes instead of hours. The report compares their losses with the previous ones.
        workers: Processes, one thread each; by default one for each core.
        folders: Input and output folders.

    Raises:
        ValueError: A number or a name is out of range, or the previous report is on another benchmark.
        FileNotFoundError: A rule, a data file or the previous report is missing.
    """
    if seeds < 1 or workers < 1:
        raise ValueError(f"expected at least one seed and one worker, found {seeds} and {workers}")
    benchmark = replace(SPLITS[split], tasks=chosen_tasks(SPLITS[split].tasks, extent.tasks))
    labels = labels_of(rule or ("default",))
    thorough = extent.thorough or bool(extent.contenders)
    baselines = [c.name for c in benchmark.baselines(thorough=thorough)]
    previous = PreviousReport() if tuned is None else PreviousReport.read(tuned, split, baselines)
    comparison = Comparison(split, benchmark, labels, seeds, workers, folders, previous.settings)
    if extent.anytime:
        _write_anytime(comparison)
    elif extent.contenders:
        _list(comparison, extent.contenders)
    else:
        _write_report(comparison, comparison.contenders(thorough=thorough), previous)


def _write_report(comparison: Comparison, contenders: Sequence[Contender], previous: PreviousReport) -> None:
    """Compare all contenders; write tables and plots."""
    benchmark, name, folders = comparison.split, comparison.name, comparison.folders
    results = comparison.results(benchmark.tasks, contenders)
    rows = rows_of(benchmark, results, seconds_of(results, folders.data))
    summaries = summaries_of(benchmark, rows, {c.name: len(c.grid) for c in contenders})
    main = [contender.name for contender in benchmark.always if contender is not DEFAULTS]
    main += [name for label in comparison.labels for name in (label, horizon_known_label(label))]
    text = report.page(benchmark, rows, summaries, main, comparison.about + previous.comparison(rows))
    folders.out.mkdir(parents=True, exist_ok=True)
    plots.curves(results, folders.out / f"{name}_curves.png")
    plots.profile(rows, folders.out / f"{name}_profile.png")
    comparison.write(name, {"": text, "_tasks": report.long_table(rows)}, report.json_of(rows, summaries))


def _list(comparison: Comparison, names: Sequence[str]) -> None:
    """Train the contenders of some names; print a line for each of their results."""
    known = {contender.name: contender for contender in comparison.contenders(thorough=True)}
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"expected names of contenders, which are {list(known)}, found {missing}")
    for result in comparison.results(comparison.split.tasks, [known[name] for name in names]):
        loss = report.mean_and_range([comparison.split.judge.criterion(run) for run in result.runs])
        seconds = f"{statistics.median(run.seconds for run in result.runs):.1f} s a run"
        line = (result.task.name, result.contender.name, str(result.setting), f"loss {loss}", seconds)
        sys.stdout.write(" | ".join(line) + "\n")


def _write_anytime(comparison: Comparison) -> None:
    """Compare runs of unknown length, read out on the way, with AdamW tuned for each length."""
    tasks, reference = comparison.split.tasks, comparison.split.reference
    shorter = {(t.name, steps): anytime.shortened(t, steps) for t in tasks for steps in anytime.lengths_of(t)}
    references = dict(zip(shorter, comparison.results(list(shorter.values()), (reference,)), strict=True))
    rules = (contenders_of(path, label, thorough=False)[0] for label, path in comparison.labels.items())
    rows = anytime.rows_of(comparison.results(tasks, (reference, SCHEDULE_FREE, *rules)), references)
    page = anytime.page(rows, reference.name, comparison.about)
    comparison.write(f"{comparison.name}_anytime", {"": page}, anytime.json_of(rows))


def chosen_tasks(tasks: Sequence[Task], words: Sequence[str]) -> tuple[Task, ...]:
    """The tasks with one of some words in their name; all of them for no words.

    Raises:
        ValueError: A word is in no name.
    """
    if missing := [word for word in words if not any(word in task.name for task in tasks)]:
        raise ValueError(f"expected words from names of tasks, which are {[t.name for t in tasks]}, found {missing}")
    return tuple(task for task in tasks if not words or any(word in task.name for word in words))


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
