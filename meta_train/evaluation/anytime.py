"""Whether a run that is not told its length is good at every length.

The loss after 1/8, 1/4, 1/2 and all of one run is compared with that of AdamW tuned for just that length.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from meta_train.evaluation.curve import running_mean
from meta_train.evaluation.interquartile import interquartile_mean
from meta_train.evaluation.report import table
from meta_train.evaluation.study import Result
from meta_train.evaluation.task import Task

PARTS = (8, 4, 2, 1)  # a run is read out after its steps over each
TOLERANCE = 1.01  # times AdamW's loss
MAX_RATIO = 1e3  # also of a run that broke off


@dataclass(frozen=True)
class AnytimeRow:
    """Results of one optimizer on one task.

    Attributes:
        task: Name of the task.
        optimizer: Name of the contender.
        setting: The setting selected for the whole run.
        ratios: Steps -> loss after so many over that of AdamW tuned for so many, one per seed.
    """

    task: str
    optimizer: str
    setting: str
    ratios: dict[int, list[float]]


def lengths_of(task: Task) -> list[int]:
    """The lengths at which a task is read out, in steps, rising."""
    return [task.steps // part for part in PARTS]


def shortened(task: Task, steps: int) -> Task:
    """A task of fewer steps, under a name with their number."""
    return replace(task, steps=steps, name=f"{task.name}, {steps} of {task.steps} steps")


def loss_ratio(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The loss of a run after the steps of a shorter one, over the final loss of that; running means of both.

    Args:
        losses: The loss of every batch, `(steps,)`.
        reference: The same of a run of at most so many steps.

    Example:
        >>> loss_ratio([4.0, 2.0, 0.0, 0.0], [1.0, 3.0]), loss_ratio([float("inf")] * 2, [1.0])
        (1.5, 1000.0)
    """
    own, other = (float(running_mean(values)[-1]) for values in (losses[: len(reference)], reference))
    return min(own / other, MAX_RATIO) if np.isfinite(own) else MAX_RATIO


def rows_of(results: Sequence[Result], references: Mapping[tuple[str, int], Result]) -> list[AnytimeRow]:
    """One row per result.

    Args:
        results: Of whole runs.
        references: AdamW's results by the name of the whole task and the number of steps.
    """
    rows = []
    for result in results:
        name = result.task.name
        ratios = {
            steps: [
                loss_ratio(run.losses, base.losses)
                for run, base in zip(result.runs, references[name, steps].runs, strict=True)
            ]
            for steps in lengths_of(result.task)
        }
        rows.append(AnytimeRow(name, result.contender.name, str(result.setting), ratios))
    return rows


def page(rows: Sequence[AnytimeRow], reference: str, about: str) -> str:
    """The text of the report.

    Args:
        rows: Of all tasks and optimizers.
        reference: Name of the optimizer that was tuned for each length.
        about: A line on the versions, machine and seeds.
    """
    parts = [f"1/{part}" if part > 1 else "the whole" for part in PARTS]
    optimizers = list(dict.fromkeys(row.optimizer for row in rows))
    medians = {(r.task, r.optimizer): [statistics.median(values) for values in r.ratios.values()] for r in rows}
    summary = []
    for name in optimizers:
        own = np.array([values for (_, optimizer), values in medians.items() if optimizer == name])  # (tasks, parts)
        good = [f"{100 * share:.0f} %" for share in (own <= TOLERANCE).mean(0)]
        summary.append([name, *good, *(f"{ratio:.2f}" for ratio in interquartile_mean(own.T))])
    tasks = [
        [task, *(" · ".join(f"{ratio:.2f}" for ratio in medians[task, name]) for name in optimizers)]
        for task in dict.fromkeys(row.task for row in rows)
    ]
    caption = (
        f"{about} One run of each optimizer, read out after parts of it: training loss (running mean) over that of "
        f"{reference} for a run of just that length, median over seeds. *As good*: fraction of tasks with a ratio of "
        f"at most {TOLERANCE:g}; *ratio*: interquartile mean over tasks.\n"
    )
    head = ("optimizer", *(f"as good after {part}" for part in parts), *(f"ratio after {part}" for part in parts))
    titles = f"Ratios after {', '.join(parts)}:\n"
    return "\n".join([caption, table(head, summary), titles, table(("task", *optimizers), tasks)])


def json_of(rows: Sequence[AnytimeRow]) -> dict[str, object]:
    """Rows as JSON."""
    return {"rows": [asdict(row) for row in rows]}
