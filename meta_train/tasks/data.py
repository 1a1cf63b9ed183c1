"""Data sets of tasks: examples with targets, split into a training and a held-out part.

Inner training uses the training part only. The held-out part is for meta-validation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from meta_train.tasks.task import Tensors


class Data(ABC):
    """A data set that draws batches.

    Attributes:
        name: Name in logs.
        classes: Number of classes; 0 if targets are real numbers.
    """

    name: str
    classes: int

    @abstractmethod
    def batch(self, size: tuple[int, int], generator: torch.Generator, *, held_out: bool = False) -> Tensors:
        """Draw batches, with replacement.

        Args:
            size: Members and batch size.
            generator: The only source of randomness.
            held_out: Whether to draw from the held-out part.

        Returns:
            Inputs `x` `(*size, ...)`, float32 or int64, and targets `y` `(*size, ...)`, int64 if there are classes.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Data:
        """The same data on a device. Batches are on it too; the generator stays on the CPU."""


@dataclass(frozen=True, eq=False)
class Examples(Data):
    """Inputs with targets in memory.

    Args:
        name: Name in logs.
        x: Inputs `(count, ...)`, float32.
        y: Targets `(count,)`, int64, or `(count, outputs)`, float32.
        classes: Number of classes, 0 if targets are real numbers.
        train: Number of training examples, the first ones; the others are held out.

    Example:
        >>> data = Examples("toy", torch.arange(6.0)[:, None], torch.arange(6) % 2, classes=2, train=4)
        >>> batch = data.batch((2, 3), torch.Generator().manual_seed(0))
        >>> batch["x"].shape, batch["y"].shape, bool((batch["x"] < 4).all())
        (torch.Size([2, 3, 1]), torch.Size([2, 3]), True)
    """

    name: str
    x: Tensor
    y: Tensor
    classes: int
    train: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        if not 0 < self.train <= len(self.x) == len(self.y):
            raise ValueError(
                f"expected as many targets as inputs and 1 to {len(self.x)} of them for training, found "
                f"{len(self.x)} inputs, {len(self.y)} targets, train={self.train}"
            )

    def batch(self, size: tuple[int, int], generator: torch.Generator, *, held_out: bool = False) -> Tensors:
        """Draw examples of a part uniformly."""
        first, last = (self.train, len(self.x)) if held_out else (0, self.train)
        if first == last:
            raise ValueError(f"expected held out examples of {self.name!r}, found none: train={self.train}")
        index = (first + torch.randint(last - first, size, generator=generator)).to(self.x.device)
        return {"x": self.x[index], "y": self.y[index]}

    def to(self, device: torch.device) -> Examples:
        """The same examples on a device; copies are cached."""
        return self if device == self.x.device else _moved(self, device)

    @classmethod
    def of(
        cls, name: str, loader: Iterable[tuple[Tensor, Tensor]], classes: int = 0, held_out: float = 0.1
    ) -> Examples:
        """Read a data loader, or another iterable of batches, into memory.

        Args:
            name: Name in logs.
            loader: Yields inputs `(batch, ...)` with targets `(batch, ...)`; for a data set of torchvision, a
                `DataLoader` of it with `transform=ToTensor()`.
            classes: Number of classes, 0 if targets are real numbers.
            held_out: Fraction of the examples, the last ones, that is held out, 0 to 1.

        Example:
            >>> loader = [(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 3]))] * 5
            >>> data = Examples.of("toy", loader, classes=4)
            >>> data.x.shape, data.train
            (torch.Size([20, 1, 2, 2]), 18)
        """
        xs, ys = zip(*loader, strict=True)
        x, y = torch.cat(xs), torch.cat(ys)
        return cls(name, x, y, classes, len(x) - round(held_out * len(x)))

    def zoomed(self, zoom: int) -> Examples:
        """Images `(count, channels, height, width)` with every pixel repeated `zoom` x `zoom` times."""
        return replace(self, x=self.x.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2))

    def projected(self, width: int, seed: int) -> Examples:
        """Flattened inputs under a random linear map to another width; `(count, width)`, unit variance."""
        flat = self.x.flatten(1)
        generator = torch.Generator().manual_seed(seed)
        x = flat @ torch.randn(flat.shape[1], width, generator=generator)
        return replace(self, x=x / x[: self.train].std())

    def reconstruction(self) -> Examples:
        """Flattened inputs with themselves as targets."""
        flat = self.x.flatten(1)
        return replace(self, x=flat, y=flat, classes=0)


@lru_cache(maxsize=16)
def _moved(examples: Examples, device: torch.device) -> Examples:
    return replace(examples, x=examples.x.to(device), y=examples.y.to(device))
