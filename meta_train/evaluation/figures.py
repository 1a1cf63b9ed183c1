"""From runs to figures: one row for every task and optimizer, one summary for every optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meta_train.evaluation.curve import diverged, loss_reduction
from meta_train.evaluation.interquartile import Estimate, estimate
from meta_train.evaluation.optimizers import DEFAULTS, Make
from meta_train.evaluation.splits import Split
from meta_train.evaluation.study import Result


@dataclass(frozen=True)
class Row:
    """What one optimizer did on one task; lists have an entry for each seed.

    Attributes:
        task: Name of the task.
        kind: What it stands for.
        optimizer: Name of the entry.
        setting: The one that was chosen.
        loss: What the benchmark is about (`Split.criterion`): the training loss at the end, running mean.
        held_out: Loss on other data after the last step; infinite where training broke off.
        accuracy: On other data, 0 to 1; empty where there is none.
        loss_reduction: The reference's `loss` over this one's; 0 where it is infinite.
        reduction: Steps of the reference over the steps to its final loss; 0 for never.
        seconds: Per step, forward and backward included; of all optimizers on this task side by side.
        wall_reduction: `reduction` in seconds instead of steps.
        diverged: Runs that diverged.
        skipped: Steps not taken.
        fallbacks: Nominal updates taken for learned ones.
    """

    task: str
    kind: str
    optimizer: str
    setting: str
    loss: list[float]
    held_out: list[float]
    accuracy: list[float]
    loss_reduction: list[float]
    reduction: list[float]
    seconds: float
    wall_reduction: list[float]
    diverged: int
    skipped: int
    fallbacks: int


@dataclass(frozen=True)
class Summary:
    """What one optimizer did on all tasks.

    Attributes:
        optimizer: Name of the entry.
        settings: How many were tried for each task.
        reduction: Interquartile mean over tasks of the median over seeds.
        wall_reduction: The same in seconds.
        loss_reduction: The same of `Row.loss_reduction`.
        as_good: Fraction of tasks with a loss, mean over seeds, at least as good as the reference's.
        generalises: The same of the held-out loss after the last step.
        beats_defaults: Fraction of tasks with a loss at least as good as that of AdamW at its defaults.
        diverged: Runs that diverged.
        runs: Runs in all.
    """

    optimizer: str
    settings: int
    reduction: Estimate
    wall_reduction: Estimate
    loss_reduction: Estimate
    as_good: float
    generalises: float
    beats_defaults: float
    diverged: int
    runs: int


def rows_of(split: Split, results: Sequence[Result], seconds: Mapping[tuple[str, Make], float]) -> list[Row]:
    """One row for every result.

    Args:
        split: The benchmark.
        results: Of its reference and others.
        seconds: Per step, by name of the task and how the optimizer is made.
    """
    references = {r.task.name: r for r in results if r.entry is split.reference}
    rows = []
    for result in results:
        name, runs, reference = result.task.name, result.runs, references[result.task.name]
        reductions = [split.reduction(run, base) for run, base in zip(runs, reference.runs, strict=True)]
        ratio = seconds[name, reference.setting.make] / seconds[name, result.setting.make]
        last = [run.held_out[-1][1] if run.held_out and np.isfinite(run.losses[-1]) else {} for run in runs]
        rows.append(
            Row(
                task=name,
                kind=result.task.kind,
                optimizer=result.entry.name,
                setting=str(result.setting),
                loss=[split.criterion(run) for run in runs],
                held_out=[scores.get("loss", float("inf")) for scores in last],
                accuracy=[scores["accuracy"] for scores in last if "accuracy" in scores],
                loss_reduction=[
                    loss_reduction(split.criterion(run), split.criterion(base))
                    for run, base in zip(runs, reference.runs, strict=True)
                ],
                reduction=reductions,
                seconds=seconds[name, result.setting.make],
                wall_reduction=[ratio * reduction for reduction in reductions],
                diverged=sum(diverged(run.losses) for run in runs),
                skipped=sum(run.skipped for run in runs),
                fallbacks=sum(run.fallbacks for run in runs),
            )
        )
    return rows


def summaries_of(split: Split, rows: Sequence[Row], settings: Mapping[str, int]) -> list[Summary]:
    """One summary for every optimizer, in the order of the rows.

    Args:
        split: The benchmark.
        rows: Of all tasks and optimizers.
        settings: Optimizer -> settings tried for each task.
    """
    means = {(r.task, r.optimizer): (float(np.mean(r.loss)), float(np.mean(r.held_out))) for r in rows}

    def share(optimizer: str, other: str, which: int) -> float:
        tasks = [task for task, name in means if name == optimizer]
        return float(np.mean([means[task, optimizer][which] <= means[task, other][which] for task in tasks]))

    found = []
    for name in dict.fromkeys(row.optimizer for row in rows):
        own = [row for row in rows if row.optimizer == name]
        found.append(
            Summary(
                optimizer=name,
                settings=settings[name],
                reduction=estimate(np.array([row.reduction for row in own])),
                wall_reduction=estimate(np.array([row.wall_reduction for row in own])),
                loss_reduction=estimate(np.array([row.loss_reduction for row in own])),
                as_good=share(name, split.reference.name, 0),
                generalises=share(name, split.reference.name, 1),
                beats_defaults=share(name, DEFAULTS.name, 0),
                diverged=sum(row.diverged for row in own),
                runs=sum(len(row.loss) for row in own),
            )
        )
    return found
