"""The benchmarks: tasks, baselines and criteria."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from meta_train.evaluation import development, published, tiny, unseen
from meta_train.evaluation.cache import Run
from meta_train.evaluation.curve import step_reduction, step_reduction_to_best
from meta_train.evaluation.optimizers import DEFAULTS, MUONS, PRIOR_ENTRIES, TUNED, Contender, adam, grid
from meta_train.evaluation.study import best_held_out_loss, final_loss
from meta_train.evaluation.task import Task


def training_step_reduction(run: Run, reference: Run) -> float:
    """Step reduction in the training loss."""
    return step_reduction(run.losses, reference.losses)


def held_out_step_reduction(run: Run, reference: Run) -> float:
    """Step reduction in the held-out loss."""
    curves = ([(step, scores["loss"]) for step, scores in r.held_out] for r in (run, reference))
    return step_reduction_to_best(*curves)


@dataclass(frozen=True)
class Split:
    """A benchmark.

    Args:
        tasks: The tasks.
        reference: The baseline that rules are compared with.
        others: Further baselines.
        criterion: The tuning criterion; the setting with its lowest value is selected.
        step_reduction: Steps of the reference over the steps of a run to the same loss.
        published: Task -> step reductions in the literature, by method.
    """

    tasks: tuple[Task, ...]
    reference: Contender = TUNED
    others: tuple[Contender, ...] = PRIOR_ENTRIES
    criterion: Callable[[Run], float] = final_loss
    step_reduction: Callable[[Run, Run], float] = training_step_reduction
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def baselines(self, *, thorough: bool) -> tuple[Contender, ...]:
        """The reference, AdamW at its defaults and, if `thorough`, the others."""
        return (self.reference, DEFAULTS, *(self.others if thorough else ()))

    @property
    def rivals(self) -> dict[str, tuple[str, ...]]:
        """Title -> names of baselines; rules are compared with the strongest of them on each task."""
        muons = tuple(muon.name for muon in MUONS)
        everyone = tuple(contender.name for contender in self.baselines(thorough=True))
        return {"tuned Muon": muons, "best rival": everyone}


SPLITS = {
    "development": Split(development.TASKS),
    "test": Split(unseen.TASKS),
    "published": Split(
        published.TASKS,
        Contender("Adam tuned", grid(adam, published.ADAM_RATES, cosine=False, warmup=False)),
        (),
        best_held_out_loss,
        held_out_step_reduction,
        {name: dict(zip(published.COLUMNS, row, strict=True)) for name, row in published.PUBLISHED.items()},
    ),
    "tiny": Split(
        tiny.TASKS,
        Contender(TUNED.name, TUNED.grid[5::8]),  # one learning rate, every schedule
        tuple(Contender(other.name, other.grid[-2:]) for other in PRIOR_ENTRIES),
    ),
}
