"""Training of masked networks, and pruning by magnitude after training.

References:
    The Lottery Ticket Hypothesis (Frankle and Carbin, 2019), Sec. 1, arXiv:1803.03635
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nfn_optim.populations import Images, StepSettings, outputs, train_together

GROUP = 20
"""Networks that are trained together."""

Weights = dict[str, Tensor]
"""Name -> `(N, *shape)`; masks and scores of matrices only."""


class Masked(nn.Module):
    """A network whose matrices are multiplied by masks.

    Args:
        network: The network.
        names: Of the matrices.
    """

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        """Run. Inputs, and a mask for every matrix."""
        params = dict(self.network.named_parameters())
        kept = {name: params[name] * mask for name, mask in zip(self.names, masks, strict=True)}
        out: Tensor = functional_call(self.network, {**params, **kept}, (x,))
        return out


def largest(scores: Weights, density: float) -> Weights:
    """Masks of the largest scores of every network, all matrices together."""
    flat = torch.cat([x.flatten(1) for x in scores.values()], 1)
    chosen = torch.zeros_like(flat).scatter_(1, flat.topk(round(density * flat.shape[1]), 1).indices, 1.0)
    parts = torch.split(chosen, [x[0].numel() for x in scores.values()], 1)
    return {name: part.reshape(x.shape) for (name, x), part in zip(scores.items(), parts, strict=True)}


def largest_of_each(scores: Weights, densities: dict[str, float]) -> Weights:
    """Masks of the largest scores of every matrix of every network."""
    return {name: largest({name: x}, densities[name])[name] for name, x in scores.items()}


class Trainer:
    """Trains and scores masked networks, all on the same batches.

    Args:
        network: Architecture.
        images: What it classifies.
        steps: Of every training.
        rate: Learning rate of Adam.
        batch: Images of a step.
    """

    def __init__(self, network: nn.Module, images: Images, steps: int, rate: float, batch: int = 64) -> None:
        self.network, self.images, self.steps, self.rate, self.batch = network, images, steps, rate, batch
        self.names = [name for name, p in network.named_parameters() if p.dim() > 1]

    def trained(self, params: Weights, masks: Weights) -> Weights:
        """Train from the initial weights; what is masked stays as it is, and is zero in the network."""
        count, module = len(next(iter(params.values()))), Masked(self.network, self.names)
        inputs = [masks[name] for name in self.names]

        def batches() -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
            generator = torch.Generator().manual_seed(1)
            for _ in range(self.steps):
                index = torch.randint(self.images.train, (self.batch,), generator=generator)
                x, y = self.images.images[index], self.images.classes[index]
                yield (x.expand(count, *x.shape), *inputs), y.expand(count, -1)

        settings, last = StepSettings.same(count, self.rate), dict[str, Tensor]()
        start = {f"network.{name}": x for name, x in params.items()}
        for last in train_together(module, start, batches(), F.cross_entropy, settings):  # noqa: B007 - the last is kept
            pass
        return {name: last[f"network.{name}"].detach() for name in params}

    def accuracy(self, params: Weights, masks: Weights) -> Tensor:
        """Of every network, trained with its mask, on held-out images; `(N,)`."""
        found = []
        for start in range(0, len(next(iter(params.values()))), GROUP):
            rows = slice(start, start + GROUP)
            few, kept = ({n: x[rows] for n, x in both.items()} for both in (params, masks))
            after = self.trained(few, kept)
            after |= {name: after[name] * kept[name] for name in self.names}
            logits = outputs(self.network, after, self.images.images[self.images.train :])
            found.append((logits.argmax(-1) == self.images.classes[self.images.train :]).float().mean(1))
        return torch.cat(found)

    def dense(self, params: Weights) -> Weights:
        """Masks of everything."""
        return {name: torch.ones_like(params[name]) for name in self.names}

    def pruned(self, params: Weights, density: float, rounds: int) -> Weights:
        """Masks of iterative magnitude pruning: train, drop the smallest weights, go back to the initial ones."""
        masks = self.dense(params)
        for n in range(1, rounds + 1):
            after = self.trained(params, masks)
            masks = largest({name: after[name].abs() * masks[name] for name in self.names}, density ** (n / rounds))
        return masks
