"""What is trained in a benchmark: an ordinary module, an ordinary loss, ordinary batches, as a user would write them.

Nothing here is differentiated through, vmapped or traced: a benchmark task shares no code with the tasks of
meta-training (`meta_train.tasks`), and neither does its data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Scores = dict[str, float]
"""What is measured on data that is not trained on: always "loss", and "accuracy" (0 to 1) where there is one."""


@dataclass(frozen=True)
class Training:
    """A network about to be trained.

    Attributes:
        model: The network, with its initial parameters.
        loss: Draws a training batch with a generator and returns its loss, 0-d.
        held_out: Scores on other data; the same data at every call, and without touching the global random state.
    """

    model: nn.Module
    loss: Callable[[torch.Generator], Tensor]
    held_out: Callable[[], Scores]


@dataclass(frozen=True)
class Task:
    """A line of a benchmark.

    Args:
        name: What tables call it.
        kind: What it stands for, in one or two words.
        begin: Makes the network, after the global random state was seeded; is given the data folder.
        steps: How long it is trained.
        files: The data files that it reads.
        packages: Distributions whose data, text or pictures it reads.
        checks: How often held-out scores are taken, evenly spaced, the last time after the last step.
    """

    name: str
    kind: str
    begin: Callable[[Path], Training]
    steps: int
    files: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    checks: int = 5
