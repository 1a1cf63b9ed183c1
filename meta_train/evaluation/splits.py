"""The benchmarks that there are: which tasks, and against whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from meta_train.evaluation import development, published, tiny, unseen
from meta_train.evaluation.cache import Run
from meta_train.evaluation.curve import step_reduction, step_reduction_to_best
from meta_train.evaluation.optimizers import DEFAULTS, OTHERS, TUNED, Entry, adam, grid
from meta_train.evaluation.study import best_held_out_loss, final_loss
from meta_train.evaluation.task import Task


def in_training(run: Run, reference: Run) -> float:
    """Step reduction on the training loss."""
    return step_reduction(run.losses, reference.losses)


def on_held_out(run: Run, reference: Run) -> float:
    """Step reduction on the held-out loss."""
    curves = ([(step, scores["loss"]) for step, scores in one.held_out] for one in (run, reference))
    return step_reduction_to_best(*curves)


@dataclass(frozen=True)
class Split:
    """A benchmark.

    Args:
        tasks: What is trained.
        reference: Whom rules are compared with.
        others: Further baselines.
        criterion: What of a run is lowest for the best setting of a grid.
        reduction: How much faster than the reference a run is.
        known: Task -> step reductions as others published them, by method.
    """

    tasks: tuple[Task, ...]
    reference: Entry = TUNED
    others: tuple[Entry, ...] = OTHERS
    criterion: Callable[[Run], float] = final_loss
    reduction: Callable[[Run, Run], float] = in_training
    known: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def baselines(self, *, thorough: bool) -> tuple[Entry, ...]:
        """The reference, AdamW at its defaults and, if wanted, the others."""
        return (self.reference, DEFAULTS, *(self.others if thorough else ()))


SPLITS = {
    "development": Split(development.TASKS),
    "test": Split(unseen.TASKS),
    "published": Split(
        published.TASKS,
        Entry("Adam tuned", grid(adam, published.ADAM_RATES, cosine=False, warmup=False)),
        (),
        best_held_out_loss,
        on_held_out,
        {name: dict(zip(published.COLUMNS, row, strict=True)) for name, row in published.PUBLISHED.items()},
    ),
    "tiny": Split(
        tiny.TASKS,
        Entry(TUNED.name, TUNED.grid[5::8]),  # one learning rate, every schedule
        tuple(Entry(entry.name, entry.grid[-2:]) for entry in OTHERS),
    ),
}
