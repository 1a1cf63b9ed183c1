"""Image classification by small convolutional networks, plain and residual, with and without normalisation."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from meta_train.tasks.activation import ACTIVATIONS, Activation
from meta_train.tasks.augment import Augment
from meta_train.tasks.family import Draws, Family
from meta_train.tasks.images import images
from meta_train.tasks.initialisation import INITIALISATIONS, initialise
from meta_train.tasks.losses import CLASSIFICATION
from meta_train.tasks.module import ModuleTask


@dataclass(frozen=True)
class CNNShape:
    """The hyperparameters of a CNN task.

    Args:
        data: A name for `images`.
        widths: Channels after each convolution. The first keeps the size of the image, the others halve it.
        residual: Whether those after the second keep size and channels instead, and are added to their input.
        norm: "none", "batch" (statistics of the batch, no running ones) or "group" (two groups).
        flatten: Whether the input of the linear layer at the end is every pixel, else their mean.
        activation: One of `ACTIVATIONS`.
        initialisation: One of `INITIALISATIONS`.
        loss: One of `CLASSIFICATION`.
        batch_size: Images in a batch.
    """

    data: str
    widths: tuple[int, ...]
    residual: bool
    norm: str
    flatten: bool
    activation: str
    initialisation: str
    loss: str
    batch_size: int


class CNN(nn.Module):
    """Convolutions of 3x3 taps, then a linear layer.

    Args:
        shape: Its hyperparameters.
        channels: Of the images.
        side: Height and width of the images.
        classes: Number of classes.
    """

    def __init__(self, shape: CNNShape, channels: int, side: int, classes: int) -> None:
        super().__init__()
        self.act, self.flatten = Activation(shape.activation), shape.flatten
        fan_in, convolutions, norms, self.residual = channels, [], [], []
        for i, fan_out in enumerate(shape.widths):
            residual = shape.residual and i > 1
            stride = 2 if i > 0 and not residual else 1
            convolutions.append(nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=shape.norm != "batch"))
            norms.append(_norm(shape.norm, fan_out))
            self.residual.append(residual)
            fan_in, side = fan_out, (side - 1) // stride + 1
        self.convolutions, self.norms = nn.ModuleList(convolutions), nn.ModuleList(norms)
        self.last = nn.Linear(fan_in * side * side if shape.flatten else fan_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits. `(batch_size, channels, height, width) -> (batch_size, classes)`."""
        for convolve, norm, residual in zip(self.convolutions, self.norms, self.residual, strict=True):
            y = self.act(norm(convolve(x)))
            x = x + y if residual else y
        logits: Tensor = self.last(x.flatten(1) if self.flatten else x.mean((2, 3)))
        return logits


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels, track_running_stats=False)
    return nn.GroupNorm(2, channels) if kind == "group" else nn.Identity()


@dataclass(frozen=True)
class CNNDistribution(Family[ModuleTask, CNNShape]):
    """CNNs on images of 8x8 and 14x14 pixels, of two to four convolutions.

    Args:
        data: Names for `images`, equally likely.
        width: Smallest and largest number of channels, log-uniform, then made even.
        batch_size: Smallest and largest batch, in images, log-uniform.
        losses: Names in `CLASSIFICATION`, equally likely.
        augment: Augmentation of the members of a task.
    """

    shape_class = CNNShape
    data: tuple[str, ...] = ("digits", "mnist5k", "mnist14")
    width: tuple[int, int] = (4, 16)
    batch_size: tuple[int, int] = (12, 48)
    losses: tuple[str, ...] = ("cross_entropy", "cross_entropy", "smoothed", "one_hot_error")
    augment: Augment = field(default_factory=lambda: Augment(rescale=0.25, loss_scale=0.5))

    def shape(self, draws: Draws) -> CNNShape:
        """Draw an architecture, data and a batch size."""
        residual, depth = draws.one_in(2), draws.one_of((2, 3, 3, 4))
        widths = [2 * round(draws.log_uniform(*self.width) / 2) for _ in range(depth)]
        return CNNShape(
            data=draws.one_of(self.data),
            widths=(*widths[:2], *(widths[1] if residual else width for width in widths[2:])),
            residual=residual,
            norm=draws.one_of(("none", "none", "batch", "batch", "group")),
            flatten=draws.one_in(2),
            activation=draws.one_of(list(ACTIVATIONS)),
            initialisation=draws.one_of(INITIALISATIONS),
            loss=draws.one_of(self.losses),
            batch_size=draws.log_uniform(*self.batch_size),
        )

    def task(self, shape: CNNShape) -> ModuleTask:
        """The task with these hyperparameters."""
        data = images(shape.data)
        return ModuleTask(
            lambda: initialise(CNN(shape, data.x.shape[1], data.x.shape[-1], data.classes), shape.initialisation),
            data,
            CLASSIFICATION[shape.loss],
            shape.batch_size,
            self.augment,
            f"cnn-{'residual' if shape.residual else 'plain'}-{shape.norm}-" + "-".join(map(str, shape.widths)),
        )
