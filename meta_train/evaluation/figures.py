"""Statistics of runs: one row per task and optimizer, one summary per optimizer."""

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
    """Results of one optimizer on one task; lists have one element per seed.

    Attributes:
        task: Name of the task.
        kind: Kind of task.
        optimizer: Name of the contender.
        setting: The selected setting.
        loss: The criterion (`Split.criterion`): by default the running mean of the training loss after the last step.
        held_out: Held-out loss after the last step; infinite if training broke off.
        accuracy: Held-out accuracy, 0 to 1; empty if the task has none.
        loss_reduction: The reference's `loss` over this one's; 0 if this one is infinite.
        reduction: Steps of the reference over the steps to its final loss; 0 for never.
        seconds: Per step, forward and backward included; all optimizers on a task are timed in turns.
        wall_reduction: `reduction` in seconds instead of steps.
        diverged: Number of runs that diverged.
        skipped: Number of skipped steps.
        fallbacks: Number of fallbacks to the nominal update.
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
    """Results of one optimizer over all tasks.

    Attributes:
        optimizer: Name of the contender.
        settings: Settings tried per task.
        reduction: Interquartile mean over tasks of the median over seeds of `Row.reduction`.
        wall_reduction: The same of `Row.wall_reduction`.
        loss_reduction: The same of `Row.loss_reduction`.
        as_good: Fraction of tasks with a mean loss over seeds at most the reference's.
        generalises: The same of the held-out loss after the last step.
        beats_defaults: Fraction of tasks with a mean loss at most that of AdamW at its defaults.
        diverged: Number of runs that diverged.
        runs: Number of runs.
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
    """One row per result.

    Args:
        split: The benchmark.
        results: Of its reference and other contenders.
        seconds: Per step, by name of the task and constructor of the optimizer.
    """
    references = {r.task.name: r for r in results if r.contender is split.reference}
    rows = []
    for result in results:
        name, runs, reference = result.task.name, result.runs, references[result.task.name]
        reductions = [split.step_reduction(run, base) for run, base in zip(runs, reference.runs, strict=True)]
        ratio = seconds[name, reference.setting.make] / seconds[name, result.setting.make]
        last = [run.held_out[-1][1] if run.held_out and np.isfinite(run.losses[-1]) else {} for run in runs]
        rows.append(
            Row(
                task=name,
                kind=result.task.kind,
                optimizer=result.contender.name,
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
    """One summary per optimizer, in the order of the rows.

    Args:
        split: The benchmark.
        rows: Of all tasks and optimizers.
        settings: Optimizer -> settings tried per task.
    """
    means = {(r.task, r.optimizer): (float(np.mean(r.loss)), float(np.mean(r.held_out))) for r in rows}

    def fraction_as_good(optimizer: str, other: str, which: int) -> float:
        tasks = [task for task, name in means if name == optimizer]
        return float(np.mean([means[task, optimizer][which] <= means[task, other][which] for task in tasks]))

    summaries = []
    for name in dict.fromkeys(row.optimizer for row in rows):
        own = [row for row in rows if row.optimizer == name]
        summaries.append(
            Summary(
                optimizer=name,
                settings=settings[name],
                reduction=estimate(np.array([row.reduction for row in own])),
                wall_reduction=estimate(np.array([row.wall_reduction for row in own])),
                loss_reduction=estimate(np.array([row.loss_reduction for row in own])),
                as_good=fraction_as_good(name, split.reference.name, 0),
                generalises=fraction_as_good(name, split.reference.name, 1),
                beats_defaults=fraction_as_good(name, DEFAULTS.name, 0),
                diverged=sum(row.diverged for row in own),
                runs=sum(len(row.loss) for row in own),
            )
        )
    return summaries
