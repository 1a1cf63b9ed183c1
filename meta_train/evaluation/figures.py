"""Statistics of runs: one row per task and optimizer, one summary per optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from meta_train.evaluation.cache import Run
from meta_train.evaluation.curve import diverged, loss_reduction
from meta_train.evaluation.interquartile import Estimate, estimate
from meta_train.evaluation.optimizers import DEFAULTS, Make
from meta_train.evaluation.scores import (
    MIN_LOSS_REDUCTION,
    MISS,
    geometric_mean,
    held_out_target,
    profile_scores,
    steps_to,
    strongest,
)
from meta_train.evaluation.splits import Split
from meta_train.evaluation.study import Result


@dataclass(frozen=True)
class Comparison:
    """A run's results in terms of the strongest of some rivals on its task; lists have one element per seed.

    Attributes:
        rival: Its name.
        reduction: Steps of the rival over the steps to its final loss; 0 for never.
        loss_reduction: The rival's loss over this one's; 0 if this one is infinite.
    """

    rival: str
    reduction: list[float]
    loss_reduction: list[float]


@dataclass(frozen=True)
class Row:
    """Results of one optimizer on one task; lists have one element per seed.

    Attributes:
        task: Name of the task.
        kind: Kind of task.
        optimizer: Name of the contender.
        setting: The selected setting.
        loss: The criterion (`Judge.criterion`): by default the running mean of the training loss after the last step.
        held_out: Held-out loss after the last step; infinite if training broke off.
        accuracy: Held-out accuracy, 0 to 1; empty if the task has none.
        loss_reduction: The reference's `loss` over this one's; 0 if this one is infinite.
        reduction: Steps of the reference over the steps to its final loss; 0 for never.
        seconds: Per step, forward and backward included; all optimizers on a task are timed in turns.
        wall_reduction: `reduction` in seconds instead of steps.
        held_out_steps: Steps until the held-out loss is as low as that of the reference ever is; infinite for never.
        against: Title of a set of rivals (`Split.rivals`) -> comparison, for those that took part.
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
    held_out_steps: list[float]
    against: dict[str, Comparison]
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
        missed: Fraction of tasks on which the median over seeds of `Row.reduction` is 0.
        geometric_reduction: The geometric mean over tasks of the median over seeds, a miss counting as `scores.MISS`.
        geometric_loss_reduction: The same of `Row.loss_reduction`, at least `scores.MIN_LOSS_REDUCTION`.
        against: Title of a set of rivals -> interquartile means of both reductions in terms of the strongest of them.
        profile: AlgoPerf's score, of the median over seeds of `Row.held_out_steps`.
        wall_profile: The same in seconds.
        as_good: Fraction of tasks with a mean loss over seeds at most the reference's.
        generalises: The same of the held-out loss after the last step.
        accurate: Fraction of tasks with a mean accuracy at least the reference's, of those that have one; None without.
        beats_defaults: Fraction of tasks with a mean loss at most that of AdamW at its defaults.
        diverged: Number of runs that diverged.
        runs: Number of runs.
    """

    optimizer: str
    settings: int
    reduction: Estimate
    wall_reduction: Estimate
    loss_reduction: Estimate
    missed: float
    geometric_reduction: Estimate
    geometric_loss_reduction: Estimate
    against: dict[str, tuple[Estimate, Estimate]]
    profile: float
    wall_profile: float
    as_good: float
    generalises: float
    accurate: float | None
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
    by_name = {(r.task.name, r.contender.name): r for r in results}
    losses = {names: [split.judge.criterion(run) for run in r.runs] for names, r in by_name.items()}
    took_part = {r.contender.name for r in results}
    rivals = {title: names for title, names in split.rivals.items() if took_part.issuperset(names)}
    rows = []
    for (name, optimizer), result in by_name.items():
        runs, reference = result.runs, by_name[name, split.reference.name]

        def comparison(rival: Result, runs: Sequence[Run] = runs) -> Comparison:
            pairs = list(zip(runs, rival.runs, strict=True))
            lower = [loss_reduction(split.judge.criterion(run), split.judge.criterion(base)) for run, base in pairs]
            return Comparison(
                rival.contender.name, [split.judge.step_reduction(run, base) for run, base in pairs], lower
            )

        compared = comparison(reference)
        target = held_out_target([_held_out_losses(run) for run in reference.runs])
        ratio = seconds[name, reference.setting.make] / seconds[name, result.setting.make]
        last = [run.held_out[-1][1] if run.held_out and np.isfinite(run.losses[-1]) else {} for run in runs]
        rows.append(
            Row(
                task=name,
                kind=result.task.kind,
                optimizer=optimizer,
                setting=str(result.setting),
                loss=losses[name, optimizer],
                held_out=[scores.get("loss", float("inf")) for scores in last],
                accuracy=[scores["accuracy"] for scores in last if "accuracy" in scores],
                loss_reduction=compared.loss_reduction,
                reduction=compared.reduction,
                seconds=seconds[name, result.setting.make],
                wall_reduction=[ratio * reduction for reduction in compared.reduction],
                held_out_steps=[steps_to(target, _held_out_losses(run)) for run in runs],
                against={
                    title: comparison(by_name[name, strongest({other: losses[name, other] for other in names})])
                    for title, names in rivals.items()
                },
                diverged=sum(diverged(run.losses) for run in runs),
                skipped=sum(run.skipped for run in runs),
                fallbacks=sum(run.fallbacks for run in runs),
            )
        )
    return rows


def _held_out_losses(run: Run) -> list[tuple[int, float]]:
    """(step, held-out loss) of every check."""
    return [(step, scores["loss"]) for step, scores in run.held_out]


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

    def fraction_as_accurate(optimizer: str) -> float | None:
        references = [row for row in rows if row.optimizer == split.reference.name and row.accuracy]
        pairs = [(by_name[optimizer, row.task], row) for row in references]
        # a run that broke off has none, which counts as 0
        as_accurate = [sum(own.accuracy) / len(own.loss) >= np.mean(other.accuracy) for own, other in pairs]
        return float(np.mean(as_accurate)) if as_accurate else None

    by_name = {(row.optimizer, row.task): row for row in rows}
    optimizers, tasks = (list(dict.fromkeys(names)) for names in zip(*by_name, strict=True))
    steps = np.array([[np.median(by_name[name, task].held_out_steps) for task in tasks] for name in optimizers])
    per_step = np.array([[by_name[name, task].seconds for task in tasks] for name in optimizers])
    profiles = zip(profile_scores(steps), profile_scores(steps * per_step), strict=True)
    summaries = []
    for name, (profile, wall_profile) in zip(optimizers, profiles, strict=True):
        own = [by_name[name, task] for task in tasks]
        reductions = np.array([row.reduction for row in own])  # (tasks, seeds)
        loss_reductions = np.array([row.loss_reduction for row in own])
        summaries.append(
            Summary(
                optimizer=name,
                settings=settings[name],
                reduction=estimate(reductions),
                wall_reduction=estimate(np.array([row.wall_reduction for row in own])),
                loss_reduction=estimate(loss_reductions),
                missed=float((np.median(reductions, -1) == 0).mean()),
                geometric_reduction=estimate(reductions, partial(geometric_mean, least=MISS)),
                geometric_loss_reduction=estimate(loss_reductions, partial(geometric_mean, least=MIN_LOSS_REDUCTION)),
                against={
                    title: (
                        estimate(np.array([row.against[title].reduction for row in own])),
                        estimate(np.array([row.against[title].loss_reduction for row in own])),
                    )
                    for title in own[0].against
                },
                profile=float(profile),
                wall_profile=float(wall_profile),
                as_good=fraction_as_good(name, split.reference.name, 0),
                generalises=fraction_as_good(name, split.reference.name, 1),
                accurate=fraction_as_accurate(name),
                beats_defaults=fraction_as_good(name, DEFAULTS.name, 0),
                diverged=sum(row.diverged for row in own),
                runs=sum(len(row.loss) for row in own),
            )
        )
    return summaries
