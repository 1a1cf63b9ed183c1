"""Training a network over weights on a population, the best epoch on a validation population kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nfn_optim.layers import random_orbit
from nfn_optim.populations.population import Population, check_disjoint

Loss = Callable[[Any, dict[str, Tensor]], Tensor]
"""Of the network's output and the columns of a batch: one number for every network, `(N,)`."""


@dataclass(frozen=True)
class FitSettings:
    """How `fit` trains.

    Attributes:
        epochs: Over the training population.
        batch: Networks in a step.
        learning_rate: AdamW's at its peak; it rises over the first twentieth of the steps and falls as a half cosine.
        weight_decay: AdamW's.
        clip: Largest norm of the gradient.
        permute: Whether every batch is put into a random order of hidden neurons (for networks not invariant to it).
        seed: Of the order of batches and permutations.
    """

    epochs: int = 30
    batch: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    clip: float = 1.0
    permute: bool = False
    seed: int = 0


@dataclass
class Fit:
    """What `fit` found.

    Attributes:
        model: With the parameters of the best epoch, in evaluation mode.
        best_epoch: Its number, from 1.
        losses: Mean validation loss after every epoch.
    """

    model: nn.Module
    best_epoch: int = 0
    losses: list[float] = field(default_factory=list)


def fit(
    model: nn.Module, train: Population, validation: Population, loss: Loss, settings: FitSettings | None = None
) -> Fit:
    """Train a network over weights.

    Args:
        model: From features to anything that `loss` takes.
        train: Networks to train on.
        validation: Networks that choose the epoch, of other runs.
        loss: See `Loss`.
        settings: Default `FitSettings()`.

    Raises:
        ValueError: A run is in both populations.
        FloatingPointError: The loss is not finite in every epoch.
    """
    settings = settings or FitSettings()
    check_disjoint(train, validation)
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(train) / settings.batch)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(n / steps, 1.0))))
    )
    found, best = Fit(model), copy.deepcopy(model.state_dict())
    for epoch in range(1, settings.epochs + 1):
        model.train()
        for features, index in train.batches(settings.batch, generator):
            if len(index) < 2:  # noqa: PLR2004 - batch normalisation needs two
                continue
            inputs = random_orbit(features, train.symmetry, generator) if settings.permute else features
            optimizer.zero_grad()
            loss(model(inputs), rows_of(train, index)).mean().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            schedule.step()
        found.losses.append(_mean_loss(model, validation, loss))
        if found.losses[-1] == min(x for x in [*found.losses, math.inf] if not math.isnan(x)):
            found.best_epoch, best = epoch, copy.deepcopy(model.state_dict())
    if not any(math.isfinite(x) for x in found.losses):
        raise FloatingPointError(f"expected a finite validation loss in some epoch, found {found.losses[:3]}, ...")
    model.load_state_dict(best)
    model.eval()
    return found


@torch.no_grad()
def apply(model: nn.Module, population: Population, batch: int = 256) -> Any:
    """The outputs of a network for a whole population: a tensor `(N, ...)`, or features."""
    model.eval()
    features = population.features()
    parts = [
        model({name: x[index] for name, x in features.items()})
        for index in torch.split(torch.arange(len(population)), batch)
    ]
    if isinstance(parts[0], Mapping):
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return torch.cat(parts)


def rows_of(population: Population, index: Tensor) -> dict[str, Tensor]:
    """The columns of some networks."""
    return {name: x[index] for name, x in population.columns.items()}


@torch.no_grad()
def _mean_loss(model: nn.Module, population: Population, loss: Loss) -> float:
    model.eval()
    features, total = population.features(), 0.0
    for index in torch.split(torch.arange(len(population)), 256):
        out = model({name: x[index] for name, x in features.items()})
        total += float(loss(out, rows_of(population, index)).sum())
    return total / len(population)
