"""Quadratics of known spectrum, of a matrix or a product of two.

    loss = |A (W - W*)^T|^2 / entries        A^T A = Q diag(spectrum) Q^T

A batch is all rows of A, so that without label noise the gradient is exact; with it, its covariance is proportional to
the Hessian.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from meta_train.tasks.augment import Augment
from meta_train.tasks.data import Data
from meta_train.tasks.family import Draws, Family
from meta_train.tasks.losses import squared_error
from meta_train.tasks.module import ModuleTask
from meta_train.tasks.task import Tensors


@dataclass(frozen=True)
class QuadraticShape:
    """The hyperparameters of a quadratic.

    Args:
        seed: Of the eigenvectors and the minimum.
        inputs: Columns of W; number of eigenvalues.
        outputs: Rows of W.
        hidden: Inner size if W is a product of two matrices, 0 for a single matrix.
        decades: Between the smallest and the largest eigenvalue; they are log-uniform.
    """

    seed: int
    inputs: int
    outputs: int
    hidden: int
    decades: float


class Quadratic(Data):
    """The rows of A and their targets.

    Args:
        shape: Its hyperparameters.

    Example:
        >>> a = Quadratic(QuadraticShape(seed=0, inputs=5, outputs=2, hidden=0, decades=2.0)).x
        >>> values = torch.linalg.eigvalsh(a.T @ a)
        >>> round((values[-1] / values[0]).log10().item(), 3)
        2.0
    """

    name, classes = "quadratic", 0

    def __init__(self, shape: QuadraticShape) -> None:
        generator = torch.Generator().manual_seed(shape.seed)
        q = torch.linalg.qr(torch.randn(shape.inputs, shape.inputs, generator=generator)).Q
        roots = 10 ** (torch.linspace(0, shape.decades, shape.inputs) / 2)
        rotation = torch.linalg.qr(torch.randn(shape.inputs, shape.inputs, generator=generator)).Q
        self.x = rotation @ (roots / roots.square().mean().sqrt()).diag() @ q.T  # (inputs, inputs)
        self.y = self.x @ torch.randn(shape.inputs, shape.outputs, generator=generator)  # (inputs, outputs)

    def batch(self, size: tuple[int, int], generator: torch.Generator, *, held_out: bool = False) -> Tensors:
        """All rows; no data is held out."""
        return {"x": self.x.expand(size[0], *self.x.shape), "y": self.y.expand(size[0], *self.y.shape)}

    def to(self, device: torch.device) -> Quadratic:
        """The same rows on a device."""
        moved = copy(self)
        moved.x, moved.y = self.x.to(device), self.y.to(device)
        return moved


@dataclass(frozen=True)
class QuadraticDistribution(Family[ModuleTask, QuadraticShape]):
    """Quadratics of many sizes and condition numbers.

    Args:
        inputs: Smallest and largest number of eigenvalues, log-uniform.
        outputs: Smallest and largest number of rows, log-uniform.
        decades: Largest number of decades of the spectrum.
        augment: Augmentation of the members of a task.
    """

    shape_class = QuadraticShape
    inputs: tuple[int, int] = (4, 64)
    outputs: tuple[int, int] = (1, 16)
    decades: float = 3.0
    augment: Augment = field(
        default_factory=lambda: Augment(label_noise=0.5, pixel_noise=0.0, rescale=0.25, loss_scale=0.5)
    )

    def shape(self, draws: Draws) -> QuadraticShape:
        """Draw a quadratic."""
        return QuadraticShape(
            seed=draws.one_of(range(2**31)),
            inputs=draws.log_uniform(*self.inputs),
            outputs=draws.log_uniform(*self.outputs),
            hidden=draws.log_uniform(8, 64) if draws.one_in(3) else 0,
            decades=self.decades * draws.unit(),
        )

    def task(self, shape: QuadraticShape) -> ModuleTask:
        """The task with these hyperparameters."""
        sizes = (shape.inputs, shape.hidden, shape.outputs) if shape.hidden else (shape.inputs, shape.outputs)

        def build() -> nn.Module:
            return nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in pairwise(sizes)))

        name = "quadratic-" + "-".join(map(str, sizes))
        return ModuleTask(build, Quadratic(shape), squared_error, 1, self.augment, name)
