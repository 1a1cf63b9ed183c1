"""Networks that are trained first, by AdamW, and the images and text that they are trained on.

The same for every seed of what follows; trained once in a process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from meta_train.evaluation import losses
from meta_train.evaluation.datasets import docstrings
from meta_train.evaluation.gpt import GPT

CLOTHES, CLOTHES_STEPS = 5000, 1500
GPT_STEPS = 1500
WARMUP = 0.1  # fraction of the steps
CODES = 128  # vocabulary size of a text in ASCII
CONTEXT = 64  # characters


def reduced_images(folder: Path, name: str, part: str, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Some images of a data set, standardised, `(n, 1, 14, 14)`, and their classes."""
    with np.load(folder / f"{name}.npz") as arrays:
        x = torch.tensor(arrays[f"{part}_x28"][first:last], dtype=torch.float32)
        y = torch.tensor(arrays[f"{part}_y"][first:last], dtype=torch.int64)
    x = F.interpolate(x[:, None], size=14, mode="area")
    return (x - x.mean()) / x.std(), y


def codes(package: str) -> Tensor:
    """The docstrings of a package as ASCII codes `(count,)`, which are the same for all packages."""
    return torch.tensor(np.frombuffer(docstrings(package).encode("ascii", "replace"), np.uint8).astype(np.int64))


def small_cnn() -> nn.Sequential:
    """Two convolutions with BatchNorm, on grey images of any size."""
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(128, 10))


def with_new_head(model: nn.Sequential, seed: int | None = None) -> nn.Sequential:
    """A copy with a new last layer.

    Args:
        model: Its last module is a linear layer.
        seed: Of the new layer; None for the global random state.
    """
    changed, last = deepcopy(model), model[-1]
    assert isinstance(last, nn.Linear)
    if seed is not None:
        torch.manual_seed(seed)
    changed[-1] = nn.Linear(last.in_features, last.out_features)
    return changed


def falling(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """A schedule that rises over a tenth of the steps and then falls, linearly."""
    return LambdaLR(optimizer, lambda k: min(1, (k + 1) / (WARMUP * steps)) * (1 - k / steps))


def train_classifier(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Sequence[Tensor], steps: int, batch: int, seed: int
) -> None:
    """Train on random batches; AdamW with a warm-up and a linear decay, others with a constant rate.

    Args:
        model: The network, in training mode afterwards.
        optimizer: Of its parameters.
        data: Inputs and, last, classes; the first dimension of each counts examples.
        steps: Number of steps.
        batch: Examples a step.
        seed: Of the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    schedule = falling(optimizer, steps) if isinstance(optimizer, torch.optim.AdamW) else None
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(data[0]), (batch,), generator=generator)
        *inputs, classes = (x[chosen] for x in data)
        optimizer.zero_grad()
        F.cross_entropy(model(*inputs), classes).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if schedule is not None:
            schedule.step()


@lru_cache(maxsize=1)
@torch.random.fork_rng(devices=[])
def trained_on_clothes(make: Callable[[], nn.Sequential], folder: Path) -> nn.Sequential:
    """A network for images of 14x14 pixels, trained on clothes; copy it before training it further."""
    torch.manual_seed(0)
    model = make()
    data = reduced_images(folder, "fashion_mnist", "train", 0, CLOTHES)
    train_classifier(model, torch.optim.AdamW(model.parameters(), 1e-3), data, CLOTHES_STEPS, 64, 0)
    return model


@lru_cache(maxsize=1)
@torch.random.fork_rng(devices=[])
def trained_gpt(package: str) -> GPT:
    """A language model of 160,000 weights, trained on docstrings; copy it before training it further."""
    torch.manual_seed(0)
    model = GPT(CODES, CONTEXT, 64, 3)
    training = losses.language(model, codes(package), CONTEXT, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule, batches = falling(optimizer, GPT_STEPS), torch.Generator().manual_seed(0)
    for _ in range(GPT_STEPS):
        optimizer.zero_grad()
        training.loss(batches).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model
