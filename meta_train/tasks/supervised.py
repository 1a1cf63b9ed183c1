"""Tasks in which a network maps inputs to targets, with common handling of data, noise and scales."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from meta_train.tasks.augment import Augment
from meta_train.tasks.data import Data
from meta_train.tasks.task import Params, Task, Tensors

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function of output and targets; the mean over the batch, 0-d."""


class SupervisedTask(Task):
    """A network, defined by `init` and `output`, with a data set; a subclass also sets `name` and `symmetry`.

    Args:
        data: The data set.
        loss: Function of its output and the targets.
        batch_size: Examples in a batch.
        augment: Augmentation of its members.
    """

    def __init__(self, data: Data, loss: Loss, batch_size: int, augment: Augment) -> None:
        self.data, self.batch_size, self.augment = data, batch_size, augment
        self._loss = loss

    @abstractmethod
    def init(self, count: int, generator: torch.Generator) -> Params:
        """Initial weights `(count, *shape)` by name, in the order of the symmetry."""

    @abstractmethod
    def output(self, weights: Params, x: Tensor) -> Tensor:
        """The output of one network on a batch; it must work under `vmap`.

        Args:
            weights: `(*shape)` by name.
            x: `(batch_size, ...)`.

        Returns:
            `(batch_size, ...)`.
        """

    def network_losses(self, weights: Params, x: Tensor, y: Tensor) -> Tensor:
        """The loss of every network, `(count,)`; a subclass may compute the same more efficiently.

        Args:
            weights: `(count, *shape)` by name.
            x: `(count, batch_size, ...)`.
            y: `(count, batch_size, ...)`.
        """

        def single(weights: Params, x: Tensor, y: Tensor) -> Tensor:
            return self._loss(self.output(weights, x), y)

        return torch.func.vmap(single)(weights, x, y)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Params, Tensors]:
        """Initial weights, augmented."""
        params, member = self.augment.draw(self.init(count, generator), self.data.classes, generator)
        return self._to_device(params), self._to_device(member)

    def batch(self, count: int, generator: torch.Generator, *, held_out: bool = False) -> Tensors:
        """A batch of the data with noise, which members scale."""
        batch = self.data.batch((count, self.batch_size), generator, held_out=held_out)
        return self.augment.noise(batch, self.data.classes, generator)

    def loss(self, params: Params, member: Tensors, batch: Tensors) -> Tensor:
        """The loss of one member, 0-d."""
        one = ({name: value.unsqueeze(0) for name, value in tensors.items()} for tensors in (params, member, batch))
        return self.losses(*one).squeeze(0)

    def losses(self, params: Params, member: Tensors, batch: Tensors) -> Tensor:
        """The loss of every member, `(count,)`, each with its own scales, noise and label permutation."""
        x, y = self.augment.examples(member, batch)
        losses = self.network_losses(self.augment.weights(params, member), x, y)
        return self.augment.scaled(losses, member)

    def to(self, device: torch.device | str) -> None:
        """Move the data too."""
        super().to(device)
        self.data = self.data.to(self.device)

    def _to_device(self, tensors: Tensors) -> Tensors:
        return {name: value.to(self.device) for name, value in tensors.items()}
