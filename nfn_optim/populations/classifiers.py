"""Populations of small classifiers, trained with hyperparameters that differ from network to network.

Every run draws its learning rate, L2 penalty, dropout, scale of the initial weights, activation, optimizer and fraction
of the training images, and keeps snapshots on the way; labels are accuracies on held-out images.

References:
    Predicting Neural Network Accuracy from Weights (Unterthiner et al., 2020), Sec. 4, arXiv:2002.11448
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfn_optim.populations.images import Images
from nfn_optim.populations.outputs import outputs
from nfn_optim.populations.population import Population
from nfn_optim.populations.storage import generate
from nfn_optim.populations.training import StepSettings, stacked, train_together
from nfn_optim.symmetry import Symmetry, symmetry_of

GROUP = 50
"""Runs that are trained together; one activation each group."""

ACTIVATIONS = ("relu", "tanh")
FRACTIONS = (0.1, 0.25, 0.5, 1.0)


class Perceptron(nn.Module):
    """A perceptron for images of `sizes[0]` pixels.

    Args:
        sizes: Inputs, hidden neurons of each layer, classes.
        activation: One of `ACTIVATIONS`.
    """

    def __init__(self, sizes: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor, dropout: Tensor | None = None) -> Tensor:
        """Classify. `(batch, 1, side, side)` to `(batch, classes)`; `dropout` is a probability, 0-dimensional."""
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = _dropped(_activated(layer(x), self.activation), dropout)
        out: Tensor = self.layers[-1](x)
        return out


class SmallCNN(nn.Module):
    """Three convolutions of stride 2, the mean over positions, one linear layer: the Small CNN Zoo's network.

    Args:
        channels: Of every convolution.
        classes: Outputs.
        activation: One of `ACTIVATIONS`.
    """

    def __init__(self, channels: int = 16, classes: int = 10, activation: str = "relu") -> None:
        super().__init__()
        self.activation = activation
        self.convs = nn.ModuleList(nn.Conv2d(n, channels, 3, stride=2, padding=1) for n in (1, channels, channels))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor, dropout: Tensor | None = None) -> Tensor:
        """Classify. `(batch, 1, side, side)` to `(batch, classes)`; `dropout` is a probability, 0-dimensional."""
        for conv in self.convs:
            x = _dropped(_activated(conv(x), self.activation), dropout)
        out: Tensor = self.head(x.mean((-2, -1)))
        return out


@dataclass(frozen=True)
class ClassifierZoo:
    """The definition of a population of classifiers.

    Attributes:
        network: `mlp` or `cnn`.
        sizes: Sizes of the perceptron, or (channels, classes) of the CNN.
        runs: Number of training runs.
        steps: Of every run.
        snapshots: Kept of every run, the last after the last step, the others at equal ratios of steps.
        batch: Images for every network and step.
        seed: Of everything.
    """

    network: str
    sizes: tuple[int, ...]
    runs: int
    steps: int
    snapshots: int = 1
    batch: int = 64
    seed: int = 0

    def module(self, activation: str = "relu") -> nn.Module:
        """A network of the architecture.

        Raises:
            ValueError: `network` is unknown.
        """
        if self.network == "mlp":
            return Perceptron(self.sizes, activation)
        if self.network == "cnn":
            channels, classes = self.sizes
            return SmallCNN(channels, classes, activation)
        raise ValueError(f"expected the network 'mlp' or 'cnn', found {self.network!r}")

    def symmetry(self, images: Images) -> Symmetry:
        """Of the architecture."""
        return symmetry_of(self.module(), images.images[:2])


def classifiers(zoo: ClassifierZoo, images: Images, folder: str | Path) -> Population:
    """Train the population, or read what was trained before.

    Args:
        zoo: Definition.
        images: What they classify.
        folder: Where groups of runs are kept.

    Returns:
        Columns `accuracy` and `loss` (held out), `train_loss`, the settings, and `step`.
    """
    symmetry = zoo.symmetry(images)
    definition = {**zoo.__dict__, "name": f"{zoo.network} {images.name}", "held_out": images.held_out, "version": 1}
    del definition["runs"]  # more runs are more groups of the same population
    groups = math.ceil(zoo.runs / GROUP)
    population = generate(folder, definition, groups, lambda group: _group(zoo, images, symmetry, group))
    return population.select(population.runs < zoo.runs)


def _group(zoo: ClassifierZoo, images: Images, symmetry: Symmetry, group: int) -> Population:
    """Train one group of runs."""
    generator = torch.Generator().manual_seed(1_000_003 * zoo.seed + group)
    settings = _settings(generator)
    activation = ACTIVATIONS[group % len(ACTIVATIONS)]
    settings["tanh"] = torch.full((GROUP,), float(activation == "tanh"))
    module = zoo.module(activation)
    with torch.random.fork_rng():
        torch.manual_seed(1_000_003 * zoo.seed + group)
        params = stacked([zoo.module(activation) for _ in range(GROUP)])
        for name, x in params.items():
            if x.dim() > 2:  # noqa: PLR2004 - a matrix or kernel
                params[name] = x * settings["init_scale"].reshape(-1, *(1,) * (x.dim() - 1))
        ratio = 10.0 ** (1 / max(zoo.snapshots - 1, 1))
        kept = sorted({max(1, round(zoo.steps / ratio**n)) for n in range(zoo.snapshots)})
        steps = StepSettings(settings["learning_rate"], settings["l2"], settings["adam"] > 0)
        batches = _batches(zoo, images, settings, generator)
        parts = []
        for step, values in enumerate(train_together(module, params, batches, F.cross_entropy, steps), start=1):
            if step in kept:
                snapshot = {name: x.detach().clone() for name, x in values.items()}
                columns = {**settings, "step": torch.full((GROUP,), float(step)), **_labels(module, snapshot, images)}
                runs = GROUP * group + torch.arange(GROUP)
                part = Population(symmetry, snapshot, columns, runs)
                parts.append(part.select(_finite(part)))
    return Population.concatenate(parts)


def _settings(generator: torch.Generator) -> dict[str, Tensor]:
    """Hyperparameters of a group; `(GROUP,)` each."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(GROUP, generator=generator)

    adam = (torch.rand(GROUP, generator=generator) < 0.5).float()  # noqa: PLR2004 - half of them
    fraction = torch.tensor(FRACTIONS)[torch.randint(len(FRACTIONS), (GROUP,), generator=generator)]
    return {
        "learning_rate": 10.0 ** uniform(-3.5, -1.3),
        "l2": 10.0 ** uniform(-8, -2),
        "dropout": uniform(0, 0.7),
        "init_scale": 10.0 ** uniform(-0.5, 0.3),
        "adam": adam,
        "fraction": fraction,
    }


def _batches(
    zoo: ClassifierZoo, images: Images, settings: dict[str, Tensor], generator: torch.Generator
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Every run draws from the first images of a random order of its own."""
    orders = torch.rand(GROUP, images.train, generator=generator).argsort(1)
    counts = (settings["fraction"] * images.train).long().clamp(min=1)
    for _ in range(zoo.steps):
        drawn = (torch.rand(GROUP, zoo.batch, generator=generator) * counts[:, None]).long()
        index = orders.gather(1, drawn)
        yield (images.images[index], settings["dropout"]), images.classes[index]


@torch.no_grad()
def _labels(module: nn.Module, params: dict[str, Tensor], images: Images) -> dict[str, Tensor]:
    """Accuracy and loss on the held-out images, and loss on as many training images."""
    held_out, classes = images.images[images.train :], images.classes[images.train :]
    logits = outputs(module, params, held_out)  # (N, images, classes)
    seen = outputs(module, params, images.images[: images.held_out])

    def loss(values: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(values.movedim(-1, 1), target.expand(len(values), -1), reduction="none").mean(-1)

    return {
        "accuracy": (logits.argmax(-1) == classes).float().mean(-1),
        "loss": loss(logits, classes),
        "train_loss": loss(seen, images.classes[: images.held_out]),
    }


def _finite(population: Population) -> Tensor:
    """Which networks have finite weights and labels, `(N,)`."""
    tensors = [*population.params.values(), *population.columns.values()]
    return torch.stack([x.isfinite().flatten(1).all(1) if x.dim() > 1 else x.isfinite() for x in tensors]).all(0)


def _activated(x: Tensor, activation: str) -> Tensor:
    return x.relu() if activation == "relu" else x.tanh()


def _dropped(x: Tensor, dropout: Tensor | None) -> Tensor:
    """Dropout with a probability that is a tensor, since it differs from network to network."""
    if dropout is None:
        return x
    return x * (torch.rand_like(x) >= dropout) / (1 - dropout)
