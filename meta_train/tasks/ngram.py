"""Character language models by perceptrons on a fixed number of preceding characters."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from meta_train.tasks.activation import ACTIVATIONS
from meta_train.tasks.augment import Augment
from meta_train.tasks.family import Draws, Family
from meta_train.tasks.initialisation import INITIALISATIONS, initialise
from meta_train.tasks.losses import CLASSIFICATION
from meta_train.tasks.module import ModuleTask
from meta_train.tasks.perceptron import NORMS, Perceptron
from meta_train.tasks.text import Text


@dataclass(frozen=True)
class NgramShape:
    """The hyperparameters of an n-gram task.

    Args:
        data: One of `TEXTS`.
        embedding: Embedding channels of a character.
        widths: Hidden neurons of each layer.
        activation: One of `ACTIVATIONS`.
        norm: One of `NORMS`.
        loss: One of `CLASSIFICATION`.
        initialisation: One of `INITIALISATIONS`.
        context: Characters of the passage.
        batch_size: Passages in a batch.
    """

    data: str
    embedding: int
    widths: tuple[int, ...]
    activation: str
    norm: str
    loss: str
    initialisation: str
    context: int
    batch_size: int


class Ngram(nn.Module):
    """A perceptron on the concatenated embeddings of a passage.

    Args:
        shape: Its hyperparameters.
        vocabulary: Number of characters.
    """

    def __init__(self, shape: NgramShape, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, shape.embedding)
        sizes = (shape.context * shape.embedding, *shape.widths, vocabulary)
        self.mlp = Perceptron(sizes, shape.activation, shape.norm)

    def forward(self, x: Tensor) -> Tensor:
        """Logits. `(batch_size, context) -> (batch_size, vocabulary)`."""
        logits: Tensor = self.mlp(self.embedding(x))
        return logits


@dataclass(frozen=True)
class NgramDistribution(Family[ModuleTask, NgramShape]):
    """Character models of one or two hidden layers.

    Args:
        data: Names in `TEXTS`, equally likely.
        embedding: Smallest and largest number of embedding channels, log-uniform.
        width: Smallest and largest number of hidden neurons, log-uniform.
        context: Smallest and largest passage, in characters, log-uniform.
        batch_size: Smallest and largest batch, in passages, log-uniform.
        losses: Names in `CLASSIFICATION`, equally likely.
        augment: Augmentation of the members of a task.
    """

    shape_class = NgramShape
    data: tuple[str, ...] = ("prose", "code")
    embedding: tuple[int, int] = (4, 16)
    width: tuple[int, int] = (16, 64)
    context: tuple[int, int] = (2, 8)
    batch_size: tuple[int, int] = (32, 128)
    losses: tuple[str, ...] = ("cross_entropy", "cross_entropy", "smoothed")
    augment: Augment = field(default_factory=lambda: Augment(label_noise=0.2, rescale=0.25, loss_scale=0.5))

    def shape(self, draws: Draws) -> NgramShape:
        """Draw an architecture, data and a batch size."""
        return NgramShape(
            data=draws.one_of(self.data),
            embedding=draws.log_uniform(*self.embedding),
            widths=draws.widths(*self.width, depths=(1, 2)),
            activation=draws.one_of(list(ACTIVATIONS)),
            norm=draws.one_of(NORMS),
            loss=draws.one_of(self.losses),
            initialisation=draws.one_of(INITIALISATIONS),
            context=draws.log_uniform(*self.context),
            batch_size=draws.log_uniform(*self.batch_size),
        )

    def task(self, shape: NgramShape) -> ModuleTask:
        """The task with these hyperparameters."""
        data = Text(shape.data, shape.context, every_position=False)
        return ModuleTask(
            lambda: initialise(Ngram(shape, data.classes), shape.initialisation),
            data,
            CLASSIFICATION[shape.loss],
            shape.batch_size,
            self.augment,
            "ngram-" + "-".join(map(str, shape.widths)),
        )
