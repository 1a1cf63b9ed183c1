"""Two tasks of seconds without data files, for smoke tests."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from meta_train.evaluation import losses
from meta_train.evaluation.datasets import Examples
from meta_train.evaluation.networks import mlp
from meta_train.evaluation.task import Task, Training


def wave(_data: Path) -> Training:
    """A sine of one input."""
    x = torch.linspace(-2, 2, 400).unsqueeze(-1)[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    y = (3 * x).sin()
    return losses.regression(mlp(1, 16, 16, 1, act=nn.Tanh), Examples(x[:300], y[:300], x[300:], y[300:]), 32)


def quadrants(_data: Path) -> Training:
    """Whether two coordinates have the same sign."""
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    y = (x.prod(-1) > 0).long()
    return losses.classification(mlp(2, 12, 2), Examples(x[:400], y[:400], x[400:], y[400:]), 32)


TASKS = (Task("wave, MLP", "regression", wave, 40), Task("quadrants, MLP", "classification", quadrants, 40))
