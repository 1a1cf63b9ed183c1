"""Implicit neural representations: a network is fitted to the pixels of one image as a function of the position.

References:
    Implicit Neural Representations with Periodic Activation Functions (Sitzmann et al., 2020), arXiv:2006.09661
    Fourier Features Let Networks Learn High Frequency Functions (Tancik et al., 2020), arXiv:2006.10739
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from meta_train.tasks.activation import ACTIVATIONS
from meta_train.tasks.augment import Augment
from meta_train.tasks.data import Examples
from meta_train.tasks.family import Draws, Family
from meta_train.tasks.images import images
from meta_train.tasks.losses import REGRESSION
from meta_train.tasks.module import ModuleTask
from meta_train.tasks.perceptron import Perceptron


@dataclass(frozen=True)
class INRShape:
    """The hyperparameters of an INR task.

    Args:
        data: A name for `images`.
        image: Index of the image.
        sine: Whether the network is a SIREN, else a perceptron on Fourier features of the position.
        frequency: Of the sines, or standard deviation of the Fourier frequencies, in radians per half image.
        widths: Hidden neurons of each layer.
        activation: One of `ACTIVATIONS`; unused by a SIREN.
        loss: One of `REGRESSION`.
        batch_size: Pixels in a batch.
    """

    data: str
    image: int
    sine: bool
    frequency: float
    widths: tuple[int, ...]
    activation: str
    loss: str
    batch_size: int


class Siren(nn.Module):
    """A perceptron with sine activations.

    Args:
        sizes: Inputs, hidden neurons of each layer, outputs.
        frequency: Factor of the argument of every sine.
    """

    def __init__(self, sizes: tuple[int, ...], frequency: float) -> None:
        super().__init__()
        self.frequency = frequency
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes))
        for i, (layer, fan_in) in enumerate(zip(self.layers, sizes, strict=False)):
            bound = math.sqrt(6 / fan_in) / frequency if i else 1 / fan_in
            nn.init.uniform_(layer.weight, -bound, bound)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """`(batch_size, 2) -> (batch_size, 1)`."""
        for layer in self.layers[:-1]:
            x = torch.sin(self.frequency * layer(x))
        y: Tensor = self.layers[-1](x)
        return y


def pixels_of(shape: INRShape) -> Examples:
    """The pixels of an image with positions between -1 and 1 or their Fourier features as inputs. A fifth is held out.

    For 14x14 pixels: positions `(196, 2)` or features `(196, 16)`, and pixels `(196, 1)`, in random order.
    """
    image = images(shape.data).x[shape.image, 0]  # (height, width)
    generator = torch.Generator().manual_seed(shape.image)
    axis = torch.linspace(-1, 1, len(image))
    x = torch.cartesian_prod(axis, axis)  # (pixels, 2)
    if not shape.sine:
        phase = shape.frequency * x @ torch.randn(2, 8, generator=generator)  # (pixels, 8)
        x = torch.cat([phase.sin(), phase.cos()], -1)
    order = torch.randperm(len(x), generator=generator)
    return Examples("pixels", x[order], image.reshape(-1, 1)[order], 0, len(x) * 4 // 5)


@dataclass(frozen=True)
class INRDistribution(Family[ModuleTask, INRShape]):
    """SIRENs and Fourier-feature networks of one to three hidden layers on images of 14x14 or 16x16 pixels.

    Args:
        data: Names for `images`, equally likely.
        width: Smallest and largest number of hidden neurons, log-uniform.
        batch_size: Smallest and largest batch, in pixels, log-uniform.
        augment: Augmentation of the members of a task.
    """

    shape_class = INRShape
    data: tuple[str, ...] = ("mnist14", "mnist16")
    width: tuple[int, int] = (12, 48)
    batch_size: tuple[int, int] = (32, 196)
    augment: Augment = field(
        default_factory=lambda: Augment(label_noise=0.2, pixel_noise=0.0, rescale=0.25, loss_scale=0.5)
    )

    def shape(self, draws: Draws) -> INRShape:
        """Draw an image, an architecture and a batch size."""
        data = draws.one_of(self.data)
        return INRShape(
            data=data,
            image=draws.one_of(range(images(data).train)),
            sine=draws.one_in(2),
            frequency=2 + 8 * draws.unit(),
            widths=draws.widths(*self.width, depths=(1, 2, 2, 3)),
            activation=draws.one_of(list(ACTIVATIONS)),
            loss=draws.one_of(list(REGRESSION)),
            batch_size=draws.log_uniform(*self.batch_size),
        )

    def task(self, shape: INRShape) -> ModuleTask:
        """The task with these hyperparameters."""
        data = pixels_of(shape)
        sizes = (data.x.shape[1], *shape.widths, 1)
        return ModuleTask(
            lambda: Siren(sizes, shape.frequency) if shape.sine else Perceptron(sizes, shape.activation),
            data,
            REGRESSION[shape.loss],
            shape.batch_size,
            self.augment,
            "inr-" + "-".join(map(str, sizes)),
        )
