"""Character language models by gated recurrent networks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from meta_train.tasks.augment import Augment
from meta_train.tasks.family import Draws, Family
from meta_train.tasks.initialisation import INITIALISATIONS, initialise
from meta_train.tasks.losses import CLASSIFICATION
from meta_train.tasks.module import ModuleTask
from meta_train.tasks.text import Text


@dataclass(frozen=True)
class GRUShape:
    """The hyperparameters of a GRU task.

    Args:
        data: One of `TEXTS`.
        embedding: Embedding channels of a character.
        width: Hidden neurons of each layer.
        depth: Layers.
        norm: Whether a LayerNorm follows every layer.
        initialisation: One of `INITIALISATIONS`.
        loss: One of `CLASSIFICATION`.
        context: Characters per passage; the initial hidden state is zero.
        batch_size: Passages in a batch.
    """

    data: str
    embedding: int
    width: int
    depth: int
    norm: bool
    initialisation: str
    loss: str
    context: int
    batch_size: int


class Layer(nn.Module):
    """A gated recurrent layer, written out because the fused kernels have no second derivative.

        r, z = sigmoid(W_x x + W_h h)    n = tanh(V_x x + r V_h h)    h' = n + z (h - n)

    Args:
        inputs: Input channels.
        width: Hidden neurons.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.input, self.recurrent = nn.Linear(inputs, 3 * width), nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch_size, context, inputs) -> (batch_size, context, width)`."""
        projected = self.input(x)  # (batch_size, context, 3 width)
        h = torch.zeros_like(projected[:, 0].chunk(3, -1)[0])  # (batch_size, width)
        states = []
        for x_t in projected.unbind(1):
            x_r, x_z, x_n = x_t.chunk(3, -1)
            h_r, h_z, h_n = self.recurrent(h).chunk(3, -1)
            n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
            h = n + torch.sigmoid(x_z + h_z) * (h - n)
            states.append(h)
        return torch.stack(states, 1)


class GRU(nn.Module):
    """A language model of gated recurrent layers.

    Args:
        shape: Its hyperparameters.
        vocabulary: Number of characters.
    """

    def __init__(self, shape: GRUShape, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, shape.embedding)
        parts: list[nn.Module] = []
        for inputs in (shape.embedding, *[shape.width] * (shape.depth - 1)):
            parts += [Layer(inputs, shape.width), *([nn.LayerNorm(shape.width)] if shape.norm else [])]
        self.layers = nn.Sequential(*parts, nn.Linear(shape.width, vocabulary))

    def forward(self, x: Tensor) -> Tensor:
        """Logits. `(batch_size, context) -> (batch_size, context, vocabulary)`."""
        logits: Tensor = self.layers(self.embedding(x))
        return logits


@dataclass(frozen=True)
class GRUDistribution(Family[ModuleTask, GRUShape]):
    """Character models of one or two recurrent layers.

    Args:
        data: Names in `TEXTS`, equally likely.
        width: Smallest and largest number of hidden neurons and of channels of a character, log-uniform.
        context: Smallest and largest context, in characters, log-uniform.
        batch_size: Smallest and largest batch, in passages, log-uniform.
        augment: Augmentation of the members of a task.
    """

    shape_class = GRUShape
    data: tuple[str, ...] = ("prose", "code")
    width: tuple[int, int] = (12, 48)
    context: tuple[int, int] = (6, 16)
    batch_size: tuple[int, int] = (8, 32)
    augment: Augment = field(default_factory=lambda: Augment(label_noise=0.2, rescale=0.25, loss_scale=0.5))

    def shape(self, draws: Draws) -> GRUShape:
        """Draw an architecture, data and a batch size."""
        return GRUShape(
            data=draws.one_of(self.data),
            embedding=draws.log_uniform(*self.width),
            width=draws.log_uniform(*self.width),
            depth=draws.one_of((1, 1, 1, 2)),
            norm=draws.one_in(3),
            initialisation=draws.one_of(INITIALISATIONS),
            loss=draws.one_of(("cross_entropy", "cross_entropy", "smoothed")),
            context=draws.log_uniform(*self.context),
            batch_size=draws.log_uniform(*self.batch_size),
        )

    def task(self, shape: GRUShape) -> ModuleTask:
        """The task with these hyperparameters."""
        data = Text(shape.data, shape.context)
        return ModuleTask(
            lambda: initialise(GRU(shape, data.classes), shape.initialisation),
            data,
            CLASSIFICATION[shape.loss],
            shape.batch_size,
            self.augment,
            f"gru-{shape.depth}x{shape.width}",
        )
