"""Perceptrons on vectors: tables, images, random projections of both, teacher networks."""

from __future__ import annotations

from dataclasses import dataclass, field

from meta_train.tasks.activation import ACTIVATIONS
from meta_train.tasks.augment import Augment
from meta_train.tasks.data import Examples
from meta_train.tasks.family import Draws, Family
from meta_train.tasks.images import images
from meta_train.tasks.initialisation import INITIALISATIONS, initialise
from meta_train.tasks.losses import CLASSIFICATION, LOSSES
from meta_train.tasks.module import ModuleTask
from meta_train.tasks.perceptron import NORMS, Perceptron
from meta_train.tasks.tables import TABLES, teacher


@dataclass(frozen=True)
class VectorShape:
    """The hyperparameters of a task on vectors.

    Args:
        data: One of `TABLES`, "teacher", or a name for `images`.
        seed: Of the teacher or the projection.
        inputs: Width to which inputs are projected, 0 for no projection.
        widths: Hidden neurons of each layer.
        activation: One of `ACTIVATIONS`.
        norm: One of `NORMS`.
        loss: One of `LOSSES`.
        initialisation: One of `INITIALISATIONS`.
        batch_size: Examples in a batch.
    """

    data: str
    seed: int
    inputs: int
    widths: tuple[int, ...]
    activation: str
    norm: str
    loss: str
    initialisation: str
    batch_size: int


@dataclass(frozen=True)
class VectorDistribution(Family[ModuleTask, VectorShape]):
    """Perceptrons of one to three hidden layers; regression with a squared or Huber loss, and classification.

    Args:
        data: Names in `TABLES`, "teacher" or names for `images`, equally likely.
        width: Smallest and largest number of hidden neurons, and of projected inputs, log-uniform.
        batch_size: Smallest and largest batch, log-uniform.
        augment: Augmentation of the members of a task.
    """

    shape_class = VectorShape
    data: tuple[str, ...] = ("teacher", "teacher", "teacher", "diabetes", "breast_cancer", "wine", "mnist5k", "digits")
    width: tuple[int, int] = (8, 64)
    batch_size: tuple[int, int] = (16, 128)
    augment: Augment = field(
        default_factory=lambda: Augment(label_noise=0.3, pixel_noise=0.5, rescale=0.25, loss_scale=0.5)
    )

    def shape(self, draws: Draws) -> VectorShape:
        """Draw an architecture, data and a batch size."""
        data = draws.one_of(self.data)
        regression = data in ("teacher", "diabetes")
        return VectorShape(
            data=data,
            seed=draws.one_of(range(2**31)),
            inputs=draws.log_uniform(*self.width)
            if draws.one_in(4 if data in TABLES or data == "teacher" else 2)
            else 0,
            widths=draws.widths(*self.width, depths=(1, 2, 3)),
            activation=draws.one_of(list(ACTIVATIONS)),
            norm=draws.one_of(NORMS),
            loss=draws.one_of(("squared_error", "squared_error", "huber"))
            if regression
            else draws.one_of(list(CLASSIFICATION)),
            initialisation=draws.one_of(INITIALISATIONS),
            batch_size=draws.log_uniform(*self.batch_size),
        )

    def task(self, shape: VectorShape) -> ModuleTask:
        """The task with these hyperparameters."""
        data = _data_of(shape)
        sizes = (data.x[0].numel(), *shape.widths, data.classes or data.y.shape[1])
        return ModuleTask(
            lambda: initialise(Perceptron(sizes, shape.activation, shape.norm), shape.initialisation),
            data,
            LOSSES[shape.loss],
            shape.batch_size,
            self.augment,
            f"vector-{shape.data}-" + "-".join(map(str, sizes)),
        )


def _data_of(shape: VectorShape) -> Examples:
    if shape.data == "teacher":
        data = teacher(shape.seed)
    else:
        data = TABLES[shape.data]() if shape.data in TABLES else images(shape.data)
    return data.projected(shape.inputs, shape.seed) if shape.inputs else data
