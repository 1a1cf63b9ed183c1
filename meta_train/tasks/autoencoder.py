"""Autoencoders of images by perceptrons; denoising ones with pixel noise."""

from __future__ import annotations

from dataclasses import dataclass, field

from meta_train.tasks.activation import ACTIVATIONS
from meta_train.tasks.augment import Augment
from meta_train.tasks.family import Draws, Family
from meta_train.tasks.images import images
from meta_train.tasks.initialisation import INITIALISATIONS, initialise
from meta_train.tasks.losses import LOSSES, REGRESSION
from meta_train.tasks.module import ModuleTask
from meta_train.tasks.perceptron import NORMS, Perceptron


@dataclass(frozen=True)
class AutoencoderShape:
    """The hyperparameters of an autoencoder task.

    Args:
        data: A name for `images`.
        widths: Hidden neurons of each layer of the encoder, the code last; the decoder mirrors them.
        activation: One of `ACTIVATIONS`.
        norm: One of `NORMS`.
        loss: One of `LOSSES`.
        initialisation: One of `INITIALISATIONS`.
        batch_size: Images in a batch.
    """

    data: str
    widths: tuple[int, ...]
    activation: str
    norm: str
    loss: str
    initialisation: str
    batch_size: int


@dataclass(frozen=True)
class AutoencoderDistribution(Family[ModuleTask, AutoencoderShape]):
    """Autoencoders of 8x8 images with one or two layers to the code.

    Args:
        data: Names for `images`, equally likely.
        width: Smallest and largest number of hidden neurons, log-uniform.
        code: Smallest and largest number of neurons of the code, log-uniform.
        batch_size: Smallest and largest batch, in images, log-uniform.
        augment: Augmentation of the members of a task.
    """

    shape_class = AutoencoderShape
    data: tuple[str, ...] = ("digits", "mnist5k")
    width: tuple[int, int] = (16, 64)
    code: tuple[int, int] = (4, 32)
    batch_size: tuple[int, int] = (16, 128)
    augment: Augment = field(
        default_factory=lambda: Augment(label_noise=0.0, pixel_noise=0.5, rescale=0.25, loss_scale=0.5)
    )

    def shape(self, draws: Draws) -> AutoencoderShape:
        """Draw an architecture, data and a batch size."""
        return AutoencoderShape(
            data=draws.one_of(self.data),
            widths=(*draws.widths(*self.width, depths=(0, 1)), draws.log_uniform(*self.code)),
            activation=draws.one_of(list(ACTIVATIONS)),
            norm=draws.one_of(NORMS),
            loss=draws.one_of(list(REGRESSION)),
            initialisation=draws.one_of(INITIALISATIONS),
            batch_size=draws.log_uniform(*self.batch_size),
        )

    def task(self, shape: AutoencoderShape) -> ModuleTask:
        """The task with these hyperparameters."""
        data = images(shape.data).reconstruction()
        inputs = data.x.shape[1]
        sizes = (inputs, *shape.widths, *shape.widths[-2::-1], inputs)
        return ModuleTask(
            lambda: initialise(Perceptron(sizes, shape.activation, shape.norm), shape.initialisation),
            data,
            LOSSES[shape.loss],
            shape.batch_size,
            self.augment,
            "autoencoder-" + "-".join(map(str, sizes)),
        )
