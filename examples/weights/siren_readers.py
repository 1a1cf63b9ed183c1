"""Classifiers that read the weights of SIRENs, and one that runs them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfn_optim.layers import Head, Propagation, canonical_signs
from nfn_optim.populations import Population, Siren, outputs


class Messages(nn.Module):
    """Vectors of neurons, propagated through the SIREN's weights, and a perceptron on what arrives at its output.

    With sines the signs of neurons make no difference, and running the SIREN at learned points is a special case.

    Args:
        population: SIRENs. Their weights are multiplied by the frequency of the sines, as in the SIREN; the last layer
            has none and is divided by root mean squares.
        frequency: Of their sines.
        classes: Number of classes.
        sines: Whether the perceptrons have sines and no biases, instead of GELU.
        channels: Length of the vectors.
    """

    def __init__(
        self, population: Population, frequency: float, classes: int, *, sines: bool = False, channels: int = 64
    ) -> None:
        super().__init__()
        self.factors = dict.fromkeys(population.params, frequency)
        for name in list(population.params)[-2:]:
            self.factors[name] = float(1 / population.params[name].square().mean().sqrt())
        symmetry = population.symmetry
        self.propagation = Propagation(symmetry, channels, activation=torch.sin if sines else F.gelu, bias=not sines)
        self.output = symmetry.dims[name][0]
        self.head = Head(symmetry.sizes[self.output] * self.propagation.out_channels[self.output], classes, dropout=0.2)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Classify. Name -> `(N, *shape, 1)` to `(N, classes)`."""
        vectors = self.propagation({name: x * self.factors[name] for name, x in features.items()})
        out: Tensor = self.head(vectors[self.output].flatten(1))
        return out


class Moved(nn.Module):
    """In training, move the images that the networks represent, by their first layer: u(A x + t) for random A and t.

    Args:
        body: The classifier.
        population: SIRENs.
        module: Their architecture.
        canonical: Whether signs are made canonical again.
        strength: Standard deviation of the entries of A - 1 and t; images reach from -1 to 1.
    """

    def __init__(
        self, body: nn.Module, population: Population, module: Siren, canonical: bool, strength: float = 0.1
    ) -> None:
        super().__init__()
        self.body, self.symmetry, self.canonical, self.strength = body, population.symmetry, canonical, strength
        self.half_period = module.half_period
        self.first = list(population.params)[:2]

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Name -> `(N, *shape, 1)` to what the body returns."""
        if self.training:
            weight, bias = (features[name][..., 0] for name in self.first)  # (N, h, 2), (N, h)
            matrix = torch.eye(2) + self.strength * torch.randn(len(weight), 2, 2)
            shift = weight @ (self.strength * torch.randn(len(weight), 2, 1))
            moved = zip(self.first, ((weight @ matrix).unsqueeze(-1), bias.unsqueeze(-1) + shift), strict=True)
            features = {**features, **dict(moved)}
            if self.canonical:
                features = canonical_signs(features, self.symmetry, half_period=self.half_period)
        out: Tensor = self.body(features)
        return out


class Queries(nn.Module):
    """A perceptron on what the networks compute at some points: not weights only.

    Args:
        module: The architecture.
        points: `(points, 2)`.
        classes: Number of classes.
        learned: Whether points are trained, too.
    """

    def __init__(self, module: Siren, points: Tensor, classes: int, learned: bool) -> None:
        super().__init__()
        self.points = nn.Parameter(points.clone(), requires_grad=learned)
        self.run = lambda params, x: outputs(module, params, x, chunk=None)
        self.head = Head(len(points), classes, dropout=0.2)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Classify. Name -> `(N, *shape, 1)` to `(N, classes)`."""
        out: Tensor = self.head(self.run({name: x[..., 0] for name, x in features.items()}, self.points)[..., 0])
        return out
