"""The contract of a task: something to train, of which many members run side by side.

A task fixes an architecture and a data set. Its *members* differ in what tensors can express (initial parameters,
permutation of the labels, reparametrisation, the order of the data), so that they are trained together under `vmap`.
A distribution draws tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from nfn_optim.symmetry import Symmetry

Params = dict[str, Tensor]
"""Parameter name -> value."""
Tensors = dict[str, Tensor]
"""What distinguishes a member, or one batch of data, by name."""


class Task(ABC):
    """One architecture on one data set.

    Attributes:
        name: A short text for logs; what comes before its first hyphen is the kind of task.
        symmetry: The axes of its parameters.
        description: What the distribution that drew it needs to make it again.
        device: Where `draw` and `batch` put what they return.
    """

    name: str
    symmetry: Symmetry
    description: dict[str, Any]
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> tuple[Params, Tensors]:
        """Draw members.

        Args:
            count: How many.
            generator: The only source of randomness; on the CPU, wherever the task is.

        Returns:
            Initial parameters `(count, *shape)` and what else distinguishes the members, `(count, ...)` each.
        """

    @abstractmethod
    def batch(self, count: int, generator: torch.Generator, *, held_out: bool = False) -> Tensors:
        """Draw a batch of data for each member.

        Args:
            count: How many members.
            generator: The only source of randomness.
            held_out: Whether to draw from the data held out for meta-validation, which inner training never sees.

        Returns:
            `(count, ...)` each.
        """

    @abstractmethod
    def loss(self, params: Params, member: Tensors, batch: Tensors) -> Tensor:
        """The training loss of one member, 0-d, without a leading dimension; it must work under `vmap`."""

    def losses(self, params: Params, member: Tensors, batch: Tensors) -> Tensor:
        """The training loss of every member, `(count,)`; a subclass may know a faster way to the same numbers.

        Args:
            params: `(count, *shape)` by name.
            member: `(count, ...)` each.
            batch: `(count, ...)` each.
        """
        return torch.func.vmap(self.loss)(params, member, batch)

    def to(self, device: torch.device | str) -> None:
        """Keep on a device what is drawn from, and put there what is drawn: the same numbers as on the CPU."""
        self.device = torch.device(device)


T = TypeVar("T", bound=Task)


class TaskDistribution(ABC, Generic[T]):
    """Draws tasks, and makes one again from its description."""

    @abstractmethod
    def sample(self, generator: torch.Generator) -> T:
        """Draw a task, and give it a description."""

    @abstractmethod
    def rebuild(self, description: dict[str, Any]) -> T:
        """Make the task of a description again, and give it that description."""

    def describe(self, task: T) -> dict[str, Any]:
        """What `rebuild` needs to make the task again: plain numbers, texts and lists."""
        return task.description
