"""A benchmark task: an ordinary module, loss and batches, as a user would write them.

No task here is vmapped or differentiated through, and none shares code or data with the tasks of meta-training
(`meta_train.tasks`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Scores = dict[str, float]
"""Held-out scores: always "loss", and "accuracy" (0 to 1) for classification."""


@dataclass(frozen=True)
class Training:
    """An initialised network with its losses.

    Attributes:
        model: The network, with its initial parameters.
        loss: Draws a training batch with a generator and returns its loss, 0-d.
        held_out: Held-out scores; uses the same data at every call, and not the global random state.
    """

    model: nn.Module
    loss: Callable[[torch.Generator], Tensor]
    held_out: Callable[[], Scores]


@dataclass(frozen=True)
class Task:
    """A task of a benchmark.

    Args:
        name: Its label in tables.
        kind: Kind of task, in one or two words.
        begin: Constructs the network from the data folder; the global random state is seeded before.
        steps: Training steps.
        files: Data files that it reads.
        packages: Packages whose data, text or images it reads.
        checks: Number of held-out evaluations, evenly spaced, the last one after the last step.
        weight_decay: Of every parameter, handed to every optimizer; 0 leaves each as it is constructed.
    """

    name: str
    kind: str
    begin: Callable[[Path], Training]
    steps: int
    files: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    checks: int = 25
    weight_decay: float = 0.0
