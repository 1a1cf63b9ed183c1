"""The benchmarks: tasks, baselines and criteria."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from meta_train.evaluation import development, published, real, tiny, unseen
from meta_train.evaluation.cache import Run
from meta_train.evaluation.curve import step_reduction, step_reduction_to_best
from meta_train.evaluation.optimizers import (
    DEFAULTS,
    MUONS,
    PRIOR_ENTRIES,
    REAL_BASELINES,
    TUNED,
    Contender,
    adam,
    grid,
)
from meta_train.evaluation.study import best_held_out_loss, final_held_out_loss, final_loss
from meta_train.evaluation.task import Task


def training_step_reduction(run: Run, reference: Run) -> float:
    """Step reduction in the training loss."""
    return step_reduction(run.losses, reference.losses)


def held_out_step_reduction(run: Run, reference: Run) -> float:
    """Step reduction in the held-out loss."""
    curves = ([(step, scores["loss"]) for step, scores in r.held_out] for r in (run, reference))
    return step_reduction_to_best(*curves)


@dataclass(frozen=True)
class Judge:
    """What optimizers are tuned for and compared by.

    Attributes:
        criterion: The loss of a run; the setting with its lowest value is selected.
        step_reduction: Steps of a reference over the steps of a run to the same loss.
        target: That loss, in words.
        loss: The criterion, in words.
    """

    criterion: Callable[[Run], float]
    step_reduction: Callable[[Run, Run], float]
    target: str
    loss: str = "that loss"


TRAINING = Judge(final_loss, training_step_reduction, "its final training loss (mean of the last 30 batches, or 3 %)")
BEST_HELD_OUT = Judge(best_held_out_loss, held_out_step_reduction, "its best held-out loss")
FINAL_HELD_OUT = Judge(
    final_held_out_loss, held_out_step_reduction, "its best held-out loss", "the held-out loss after its last step"
)


@dataclass(frozen=True)
class Split:
    """A benchmark.

    Args:
        tasks: The tasks.
        reference: The baseline that rules are compared with.
        others: Further baselines of thorough comparisons.
        judge: What decides.
        published: Task -> step reductions in the literature, by method.
        always: Further baselines of every comparison, AdamW at its defaults among them.
    """

    tasks: tuple[Task, ...]
    reference: Contender = TUNED
    others: tuple[Contender, ...] = PRIOR_ENTRIES
    judge: Judge = TRAINING
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    always: tuple[Contender, ...] = (DEFAULTS,)

    def baselines(self, *, thorough: bool) -> tuple[Contender, ...]:
        """The reference, further baselines and, if `thorough`, the others."""
        return (self.reference, *self.always, *(self.others if thorough else ()))

    @property
    def rivals(self) -> dict[str, tuple[str, ...]]:
        """Title -> names of baselines; rules are compared with the strongest of them on each task."""
        everyone = tuple(contender.name for contender in self.baselines(thorough=True))
        muons = tuple(muon.name for muon in MUONS if muon.name in everyone)
        return ({"tuned Muon": muons} if muons else {}) | {"best rival": everyone}


SPLITS = {
    "development": Split(development.TASKS),
    "test": Split(unseen.TASKS),
    "real": Split(real.TASKS, REAL_BASELINES[0], (), FINAL_HELD_OUT, always=(DEFAULTS, *REAL_BASELINES[1:])),
    "published": Split(
        published.TASKS,
        Contender("Adam tuned", grid(adam, published.ADAM_RATES, cosine=False, warmup=False)),
        (),
        BEST_HELD_OUT,
        {name: dict(zip(published.COLUMNS, row, strict=True)) for name, row in published.PUBLISHED.items()},
    ),
    "tiny": Split(
        tiny.TASKS,
        Contender(TUNED.name, TUNED.grid[5::8]),  # one learning rate, every schedule
        tuple(Contender(other.name, other.grid[-2:]) for other in PRIOR_ENTRIES),
    ),
}
