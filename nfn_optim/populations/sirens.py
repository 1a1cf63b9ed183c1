"""Populations of SIRENs, each fitted to one image: implicit neural representations, many at a time.

    u(x, y) = sum_k c_k sin(w (... sin(w (a x + b)) ...)) + d,   (x, y) from -1 to 1, pixels from -1 to 1

All networks of a group take their steps together on random pixels, another subset for each. Weights stay in the units
of the published populations: `w` multiplies the argument of every sine and is not part of the weights.

References:
    Implicit Neural Representations with Periodic Activation Functions (Sitzmann et al., 2020), arXiv:2006.09661
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), App. D.3, arXiv:2302.14040
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
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

GROUP = 100
"""Networks that are fitted together."""


class Siren(nn.Module):
    """A perceptron with sine activations, from positions to grey values.

    Args:
        sizes: Inputs, hidden neurons of each layer, outputs.
        frequency: Factor of the argument of every sine.
    """

    def __init__(self, sizes: Sequence[int] = (2, 32, 32, 1), frequency: float = 30.0) -> None:
        super().__init__()
        self.frequency = frequency
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        for n, layer in enumerate(self.layers):
            bound = 1 / sizes[n] if n == 0 else math.sqrt(6 / sizes[n]) / frequency
            nn.init.uniform_(layer.get_parameter("weight"), -bound, bound)

    @property
    def half_period(self) -> float:
        """Of the biases of sine neurons: a shift by it negates the neuron."""
        return math.pi / self.frequency

    def forward(self, positions: Tensor) -> Tensor:
        """Evaluate. `(points, inputs)` to `(points, outputs)`."""
        x = positions
        for layer in self.layers[:-1]:
            x = torch.sin(self.frequency * layer(x))
        out: Tensor = self.layers[-1](x)
        return out


@dataclass(frozen=True)
class SirenZoo:
    """The definition of a population of SIRENs.

    Attributes:
        sizes: Inputs, hidden neurons, outputs.
        count: Number of images, the first of the training part.
        held_out: Number of images of the test part.
        views: Networks for every image, from other initial weights.
        steps: Of every network.
        pixels: Of the image, drawn anew for every step.
        learning_rate: Adam's at the first step; it falls as a half cosine.
        frequency: Factor of the argument of every sine; 30 is the published one, images of few pixels need less.
        seed: Of initial weights and pixels.
    """

    sizes: tuple[int, ...] = (2, 32, 32, 1)
    count: int = 2000
    held_out: int = 500
    views: int = 1
    steps: int = 1000
    pixels: int = 78
    learning_rate: float = 3e-3
    frequency: float = 30.0
    seed: int = 0

    def module(self) -> Siren:
        """A network of the architecture."""
        return Siren(self.sizes, self.frequency)

    def symmetry(self) -> Symmetry:
        """Of the architecture."""
        return symmetry_of(self.module(), positions(4))


def positions(side: int, offset: float = 0.0) -> Tensor:
    """Centres of the pixels of a square image, `(side * side, 2)`: row and column from -1 to 1.

    Args:
        side: Pixels in a row.
        offset: Shift of all positions, in pixels: 0.5 lies between pixels.
    """
    line = torch.linspace(-1, 1, side) + offset * 2 / (side - 1)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)


def render(module: nn.Module, params: Mapping[str, Tensor], side: int, offset: float = 0.0) -> Tensor:
    """The images that SIRENs represent, `(N, side, side)`, about 0 to 1; differentiable."""
    points = positions(side, offset).to(next(iter(params.values())).device)
    values = outputs(module, params, points, chunk=None)  # (N, side * side, 1)
    return (values.reshape(-1, side, side) + 1) / 2


def fit_images(
    module: nn.Module, params: Mapping[str, Tensor], images: Tensor, zoo: SirenZoo, generator: torch.Generator
) -> dict[str, Tensor]:
    """Fit networks to images, all together.

    Args:
        module: The architecture.
        params: Initial weights, name -> `(N, *shape)`.
        images: `(N, side, side)`, from 0 to 1.
        zoo: Steps, pixels and learning rate.
        generator: Of the pixels.

    Returns:
        The fitted weights, name -> `(N, *shape)`.

    Raises:
        ValueError: There are not as many images as networks, or they are not square.
    """
    count, side = len(next(iter(params.values()))), images.shape[-1]
    if images.shape != (count, side, side):
        raise ValueError(f"expected {count} square images (N, side, side), found {tuple(images.shape)}")
    points, values = positions(side), 2 * images.flatten(1).unsqueeze(-1) - 1  # (side^2, 2), (N, side^2, 1)

    def batches() -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for _ in range(zoo.steps):
            index = torch.randint(side * side, (count, zoo.pixels), generator=generator)
            yield (points[index],), values.gather(1, index.unsqueeze(-1))

    settings = StepSettings.same(count, zoo.learning_rate)
    fitted: Mapping[str, Tensor] = params
    for fitted in train_together(  # noqa: B007 - the last one is kept
        module, params, batches(), F.mse_loss, settings, lambda n: 0.5 * (1 + math.cos(math.pi * n / zoo.steps))
    ):
        pass
    return {name: x.detach().clone() for name, x in fitted.items()}


def sirens(zoo: SirenZoo, images: Images, folder: str | Path) -> Population:
    """Fit the population, or read what was fitted before.

    Returns:
        Columns `image` (index), `class`, `view`, `test` (whether of the test part) and `psnr` (of the fit, in dB);
        the run of a network is its image.

    Raises:
        ValueError: There are not enough images.
    """
    if zoo.count > images.train or zoo.held_out > images.held_out:
        raise ValueError(
            f"expected at least {zoo.count} training and {zoo.held_out} test images, found {images.train} and "
            f"{images.held_out} in {images.name}"
        )
    index = torch.cat([torch.arange(zoo.count), images.train + torch.arange(zoo.held_out)]).repeat_interleave(zoo.views)
    views = torch.arange(zoo.views).repeat(zoo.count + zoo.held_out)
    symmetry, module = zoo.symmetry(), zoo.module()
    definition = {**zoo.__dict__, "name": f"SIRENs {images.name}", "side": images.images.shape[-1], "version": 1}

    def group(number: int) -> Population:
        rows = slice(number * GROUP, (number + 1) * GROUP)
        chosen, generator = index[rows], torch.Generator().manual_seed(1_000_003 * zoo.seed + number)
        with torch.random.fork_rng():
            torch.manual_seed(1_000_003 * zoo.seed + number)
            params = stacked([zoo.module() for _ in chosen])
        targets = images.images[chosen, 0]
        fitted = fit_images(module, params, targets, zoo, generator)
        with torch.no_grad():
            error = (render(module, fitted, targets.shape[-1]) - targets).square().mean((1, 2))
        columns = {
            "image": chosen,
            "class": images.classes[chosen],
            "view": views[rows],
            "test": chosen >= images.train,
            "psnr": -10 * error.log10(),
        }
        return Population(symmetry, fitted, columns, chosen)

    return generate(folder, definition, math.ceil(len(index) / GROUP), group)
