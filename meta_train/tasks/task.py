"""The interface of a task, of which many members are trained in parallel.

A task fixes an architecture and a data set. Its *members* differ in tensors only (initial parameters, permutation of
the labels, reparametrisation, the order of the data), so that they are trained together under `vmap`. A distribution
draws tasks.
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
"""Data that distinguishes members, or a batch, by name."""


class Task(ABC):
    """One architecture on one data set.

    Attributes:
        name: Name in logs; the part before its first hyphen is the kind of task.
        symmetry: The axes of its parameters.
        description: Data from which its distribution rebuilds it.
        device: Device of the results of `draw` and `batch`.
    """

    name: str
    symmetry: Symmetry
    description: dict[str, Any]
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> tuple[Params, Tensors]:
        """Draw members.

        Args:
            count: Number of members.
            generator: The only source of randomness; on the CPU for every device.

        Returns:
            Initial parameters `(count, *shape)`, and other data that distinguishes the members, `(count, ...)` each.
        """

    @abstractmethod
    def batch(self, count: int, generator: torch.Generator, *, held_out: bool = False) -> Tensors:
        """Draw a batch of data for each member.

        Args:
            count: Number of members.
            generator: The only source of randomness.
            held_out: Whether to draw from the data held out from inner training, for meta-validation.

        Returns:
            `(count, ...)` each.
        """

    @abstractmethod
    def loss(self, params: Params, member: Tensors, batch: Tensors) -> Tensor:
        """The training loss of one member, 0-d, without a leading dimension; it must work under `vmap`."""

    def losses(self, params: Params, member: Tensors, batch: Tensors) -> Tensor:
        """The training loss of every member, `(count,)`; a subclass may compute the same more efficiently.

        Args:
            params: `(count, *shape)` by name.
            member: `(count, ...)` each.
            batch: `(count, ...)` each.
        """
        return torch.func.vmap(self.loss)(params, member, batch)

    def to(self, device: torch.device | str) -> None:
        """Move the data to a device, where draws and batches are returned too; they are the same as on the CPU."""
        self.device = torch.device(device)


T = TypeVar("T", bound=Task)


class TaskDistribution(ABC, Generic[T]):
    """Draws tasks, and rebuilds them from their descriptions."""

    @abstractmethod
    def sample(self, generator: torch.Generator) -> T:
        """Draw a task and set its description."""

    @abstractmethod
    def rebuild(self, description: dict[str, Any]) -> T:
        """Rebuild the task of a description."""

    def describe(self, task: T) -> dict[str, Any]:
        """The argument of `rebuild` for a task: plain numbers, strings and lists."""
        return task.description
