"""Families of tasks: a task is defined by a *shape*, a dataclass of hyperparameters, which the family draws."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Generic, TypeVar

import torch

from meta_train.tasks.task import Task, TaskDistribution

S = TypeVar("S")
T = TypeVar("T", bound=Task)
V = TypeVar("V")


class Draws:
    """Random choices of hyperparameters.

    Args:
        generator: The only source of randomness.

    Example:
        >>> draws = Draws(torch.Generator().manual_seed(0))
        >>> draws.one_of(["relu", "tanh"]) in ("relu", "tanh"), 8 <= draws.log_uniform(8, 32) <= 32
        (True, True)
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def one_of(self, options: Sequence[V]) -> V:
        """One of the options, equally likely."""
        return options[int(torch.randint(len(options), (), generator=self.generator))]

    def one_in(self, count: int) -> bool:
        """True with probability 1 / count."""
        return self.one_of(range(count)) == 0

    def log_uniform(self, low: int, high: int) -> int:
        """An integer between two, inclusive."""
        return round(low * float((high / low) ** self.unit()))

    def widths(self, low: int, high: int, depths: Sequence[int]) -> tuple[int, ...]:
        """Widths of the layers of a network, each log-uniform; the depth is one of `depths`, equally likely."""
        return tuple(self.log_uniform(low, high) for _ in range(self.one_of(depths)))

    def unit(self) -> float:
        """A uniform number between 0 and 1."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


class Family(TaskDistribution[T], Generic[T, S]):
    """A distribution over tasks of one kind; a subclass is a dataclass of ranges.

    Attributes:
        shape_class: The class of the shapes.
    """

    shape_class: ClassVar[type[Any]]

    @abstractmethod
    def shape(self, draws: Draws) -> S:
        """Draw a shape."""

    @abstractmethod
    def task(self, shape: S) -> T:
        """The task with these hyperparameters."""

    def sample(self, generator: torch.Generator) -> T:
        """Draw a shape; return its task."""
        return self._described(self.shape(Draws(generator)))

    def rebuild(self, description: dict[str, Any]) -> T:
        """The task whose shape has these fields."""
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in description.items()}
        return self._described(self.shape_class(**fields))

    def _described(self, shape: S) -> T:
        task = self.task(shape)
        task.description = asdict(shape)  # type: ignore[call-overload]
        return task
