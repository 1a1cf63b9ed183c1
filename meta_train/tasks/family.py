"""Tasks of one kind: each follows from a *shape*, a dataclass of plain values; a family says how shapes are drawn."""

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
    """Random choices of plain values.

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
        """One of them, equally likely."""
        return options[int(torch.randint(len(options), (), generator=self.generator))]

    def one_in(self, count: int) -> bool:
        """True with probability 1 / count."""
        return self.one_of(range(count)) == 0

    def log_uniform(self, low: int, high: int) -> int:
        """A whole number between two, both included."""
        return round(low * float((high / low) ** self.unit()))

    def widths(self, low: int, high: int, depths: Sequence[int]) -> tuple[int, ...]:
        """Widths of the layers of a network, each log-uniform; their number is one of `depths`, equally likely."""
        return tuple(self.log_uniform(low, high) for _ in range(self.one_of(depths)))

    def unit(self) -> float:
        """A number between 0 and 1."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


class Family(TaskDistribution[T], Generic[T, S]):
    """Tasks of one kind; a subclass is a dataclass of ranges.

    Attributes:
        made_of: The class of the shapes.
    """

    made_of: ClassVar[type[Any]]

    @abstractmethod
    def shape(self, draws: Draws) -> S:
        """Draw a shape."""

    @abstractmethod
    def task(self, shape: S) -> T:
        """The task of a shape."""

    def sample(self, generator: torch.Generator) -> T:
        """Draw a shape and make its task."""
        return self._described(self.shape(Draws(generator)))

    def rebuild(self, description: dict[str, Any]) -> T:
        """The task of the shape with these fields."""
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in description.items()}
        return self._described(self.made_of(**fields))

    def _described(self, shape: S) -> T:
        task = self.task(shape)
        task.description = asdict(shape)  # type: ignore[call-overload]
        return task
