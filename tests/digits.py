"""scikit-learn's handwritten digits, and a small network that learns them in a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nfn_optim import NFNOptimizer

BATCH = 64
HIDDEN = 24
SYMMETRY = {"0.weight": ("a0", "a1"), "0.bias": ("a0",), "2.weight": ("a2", "a0"), "2.bias": ("a2",)}
"""The canonical axes of `network()`."""


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images `(1797, 64)`, from -1 to 1, and classes `(1797,)`."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(classes)


def batches(steps: int, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    """The first `steps` batches, the same in every run."""
    images, classes = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [(images[rows], classes[rows]) for rows in (order[k * size : (k + 1) * size] for k in range(steps))]


def loader(steps: int) -> DataLoader[tuple[Tensor, ...]]:
    """The same batches as a data loader."""
    images, classes = (torch.cat(part) for part in zip(*batches(steps), strict=True))
    return DataLoader(TensorDataset(images, classes), BATCH)


def axes_of(optimizer: NFNOptimizer) -> dict[str, tuple[str, ...]]:
    """The symmetry that an optimizer found, with canonical axes; empty if no axis is free."""
    assert optimizer.symmetry is not None
    return dict(optimizer.symmetry.canonical().dims) if optimizer.symmetry.free else {}


def network(hidden: int = HIDDEN) -> nn.Sequential:
    """A network with one hidden layer, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Take one step per batch; returns the loss before each."""
    losses = []
    for images, classes in data:
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def falls(losses: Sequence[float]) -> bool:
    """Whether the mean of the last three losses is a tenth below the first."""
    return sum(losses[-3:]) / 3 < 0.9 * losses[0]
