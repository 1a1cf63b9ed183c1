"""Mixtures of task distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from meta_train.tasks.task import Task, TaskDistribution


@dataclass(frozen=True)
class Mixture(TaskDistribution[Task]):
    """Draws a component, then a task from it.

    Args:
        parts: Distributions with weights; a component is drawn in proportion to its weight.

    Raises:
        ValueError: A weight is negative, or all are zero.
    """

    parts: tuple[tuple[TaskDistribution[Any], float], ...]

    def __post_init__(self) -> None:
        """Check the weights."""
        weights = [weight for _, weight in self.parts]
        if min(weights, default=0) < 0 or sum(weights) <= 0:
            raise ValueError(f"expected weights of at least 0 and some above, found {weights}")

    def sample(self, generator: torch.Generator) -> Task:
        """Draw a component, then a task from it."""
        weights = torch.tensor([weight for _, weight in self.parts], dtype=torch.float64)
        return self._described(
            part := int(torch.multinomial(weights, 1, generator=generator)), self.parts[part][0].sample(generator)
        )

    def rebuild(self, description: dict[str, Any]) -> Task:
        """The task that its component rebuilds."""
        part = description["part"]
        return self._described(part, self.parts[part][0].rebuild(description["task"]))

    @staticmethod
    def _described(part: int, task: Task) -> Task:
        task.description = {"part": part, "task": task.description}
        return task


@dataclass(frozen=True)
class Single(TaskDistribution[Task]):
    """Always the same task.

    Args:
        task: The task.
    """

    task: Task

    def sample(self, generator: torch.Generator) -> Task:
        """The task."""
        return self.rebuild({})

    def rebuild(self, description: dict[str, Any]) -> Task:
        """The task."""
        self.task.description = {}
        return self.task
