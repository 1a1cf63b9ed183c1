"""Character language models by small transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.tasks.activation import Activation
from meta_train.tasks.augment import Augment
from meta_train.tasks.family import Draws, Family
from meta_train.tasks.initialisation import INITIALISATIONS, initialise
from meta_train.tasks.losses import CLASSIFICATION
from meta_train.tasks.module import ModuleTask
from meta_train.tasks.text import Text


@dataclass(frozen=True)
class TransformerShape:
    """The hyperparameters of a transformer task.

    Args:
        data: Name of the data set.
        width: Channels of the residual stream.
        heads: Attention heads; a divisor of the width.
        depth: Blocks.
        norm: "layer" or "rms".
        qk_norm: Whether queries and keys are normalised. Otherwise their gradients are small but the steps of an
            adaptive optimizer are not, so that long unrolls are chaotic.
        activation: One of `ACTIVATIONS`.
        fused: Whether queries, keys and values are projected by one matrix.
        bias: Whether linear layers have biases.
        initialisation: One of `INITIALISATIONS`.
        loss: One of `CLASSIFICATION`.
        context: Tokens per sequence.
        batch_size: Sequences in a batch.
    """

    data: str
    width: int
    heads: int
    depth: int
    norm: str
    qk_norm: bool
    activation: str
    fused: bool
    bias: bool
    initialisation: str
    loss: str
    context: int
    batch_size: int


class Attention(nn.Module):
    """Scaled dot-product attention without fused kernels, which have no second derivative.

    Args:
        shape: Hyperparameters of the transformer.
        causal: Whether a token attends only to itself and to previous ones.
    """

    def __init__(self, shape: TransformerShape, causal: bool) -> None:
        super().__init__()
        width, self.heads, self.qk_norm, self.causal = shape.width, shape.heads, shape.qk_norm, causal
        sizes = (3 * width,) if shape.fused else (width, width, width)
        self.qkv = nn.ModuleList(nn.Linear(width, size, bias=shape.bias) for size in sizes)
        self.out = nn.Linear(width, width, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch_size, tokens, width) -> (batch_size, tokens, width)`."""
        projected = [linear(x) for linear in self.qkv]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch_size, heads, tokens, width / heads)
            for part in (projected if len(projected) > 1 else projected[0].chunk(3, -1))
        )
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:], eps=1e-5), F.rms_norm(k, k.shape[-1:], eps=1e-5)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (batch_size, heads, tokens, tokens)
        if self.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(mask, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)  # (batch_size, tokens, width)
        out: Tensor = self.out(mixed)
        return out


class Block(nn.Module):
    """A pre-norm residual block of attention and an MLP of one hidden layer.

    Args:
        shape: Hyperparameters of the transformer.
        causal: Whether a token attends only to itself and to previous ones.
    """

    def __init__(self, shape: TransformerShape, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention = norm_of(shape), Attention(shape, causal)
        self.norm2 = norm_of(shape)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 2 * shape.width, bias=shape.bias),
            Activation(shape.activation),
            nn.Linear(2 * shape.width, shape.width, bias=shape.bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(batch_size, tokens, width) -> (batch_size, tokens, width)`."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


def norm_of(shape: TransformerShape) -> nn.Module:
    """A norm over channels."""
    return nn.RMSNorm(shape.width) if shape.norm == "rms" else nn.LayerNorm(shape.width, bias=shape.bias)


class Transformer(nn.Module):
    """A causal language model.

    Args:
        shape: Its hyperparameters.
        vocabulary: Number of tokens.
    """

    def __init__(self, shape: TransformerShape, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, shape.width)
        self.position = nn.Parameter(torch.randn(shape.context, shape.width) * 0.1)
        self.blocks = nn.Sequential(*(Block(shape, causal=True) for _ in range(shape.depth)))
        self.norm = norm_of(shape)
        self.last = nn.Linear(shape.width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits. `(batch_size, context) -> (batch_size, context, vocabulary)`."""
        logits: Tensor = self.last(self.norm(self.blocks(self.embedding(x) + self.position)))
        return logits


def transformer_shape(
    draws: Draws, data: str, width: tuple[int, int], context: int, batch_size: int
) -> TransformerShape:
    """Draw the hyperparameters that language models and vision transformers share."""
    heads = draws.one_of((1, 2, 4))
    return TransformerShape(
        data=data,
        width=4 * round(draws.log_uniform(*width) / 4),
        heads=heads,
        depth=draws.one_of((1, 1, 1, 2)),
        norm=draws.one_of(("layer", "rms")),
        qk_norm=not draws.one_in(3),
        activation=draws.one_of(("relu", "gelu", "silu")),
        fused=not draws.one_in(3),
        bias=draws.one_in(3),
        initialisation=draws.one_of(INITIALISATIONS),
        loss=draws.one_of(("cross_entropy", "cross_entropy", "smoothed")),
        context=context,
        batch_size=batch_size,
    )


@dataclass(frozen=True)
class TransformerDistribution(Family[ModuleTask, TransformerShape]):
    """Causal character models of one or two blocks.

    Args:
        data: Names in `TEXTS`, equally likely.
        width: Smallest and largest number of channels, log-uniform, then made divisible by 4.
        context: Smallest and largest context, in characters, log-uniform.
        characters: Smallest and largest number of targets in a batch, log-uniform.
        augment: Augmentation of the members of a task.
    """

    shape_class = TransformerShape
    data: tuple[str, ...] = ("prose", "code")
    width: tuple[int, int] = (12, 32)
    context: tuple[int, int] = (8, 24)
    characters: tuple[int, int] = (64, 256)
    augment: Augment = field(default_factory=lambda: Augment(label_noise=0.2, rescale=0.25, loss_scale=0.5))

    def shape(self, draws: Draws) -> TransformerShape:
        """Draw an architecture, data and a batch size."""
        context = draws.log_uniform(*self.context)
        batch_size = max(2, draws.log_uniform(*self.characters) // context)
        return transformer_shape(draws, draws.one_of(self.data), self.width, context, batch_size)

    def task(self, shape: TransformerShape) -> ModuleTask:
        """The task with these hyperparameters."""
        data = Text(shape.data, shape.context)
        return ModuleTask(
            lambda: initialise(Transformer(shape, data.classes), shape.initialisation),
            data,
            CLASSIFICATION[shape.loss],
            shape.batch_size,
            self.augment,
            f"transformer-{shape.depth}x{shape.width}",
        )
