"""Steps on the mean gradient of several batches, as for batches that do not fit into memory."""

from __future__ import annotations

from dataclasses import dataclass

from meta_train.evaluation.task import Training


@dataclass(frozen=True)
class Accumulated(Training):
    """A training whose loss is drawn several times for each step.

    Attributes:
        count: Batches of a step.
    """

    count: int = 1
