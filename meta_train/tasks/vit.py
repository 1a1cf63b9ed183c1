"""Image classification by small vision transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from meta_train.tasks.augment import Augment
from meta_train.tasks.family import Draws, Family
from meta_train.tasks.images import images
from meta_train.tasks.initialisation import initialise
from meta_train.tasks.losses import CLASSIFICATION
from meta_train.tasks.module import ModuleTask
from meta_train.tasks.transformer import Block, TransformerShape, norm_of, transformer_shape

PATCH = 4  # pixels


@dataclass(frozen=True)
class ViTShape(TransformerShape):
    """The hyperparameters of a vision transformer task; the context is the number of patches.

    Args:
        flatten: Whether the input of the last linear layer is all tokens, concatenated, else their mean.
    """

    flatten: bool


class ViT(nn.Module):
    """A transformer on patches of 4x4 pixels.

    Position embeddings are initialised with half the scale of patch embeddings: if they are smaller, a network of this
    size takes hundreds of steps to distinguish positions, and its unrolls are chaotic; likewise with smaller patches.

    Args:
        shape: Its hyperparameters.
        channels: Of the images.
        classes: Number of classes.
    """

    def __init__(self, shape: ViTShape, channels: int, classes: int) -> None:
        super().__init__()
        self.flatten = shape.flatten
        self.patch = nn.Linear(channels * PATCH**2, shape.width)
        self.position = nn.Parameter(torch.randn(shape.context, shape.width) * 0.5)
        self.blocks = nn.Sequential(*(Block(shape, causal=False) for _ in range(shape.depth)))
        self.norm = norm_of(shape)
        self.last = nn.Linear(shape.width * (shape.context if shape.flatten else 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits. `(batch_size, channels, height, width) -> (batch_size, classes)`."""
        rows, columns = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        patches = x.reshape(len(x), -1, rows, PATCH, columns, PATCH)
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (batch_size, rows, columns, channels, 4, 4)
        embedded = self.patch(patches.flatten(3).flatten(1, 2))  # (batch_size, patches, width)
        tokens = self.norm(self.blocks(embedded + self.position))
        logits: Tensor = self.last(tokens.flatten(1) if self.flatten else tokens.mean(1))
        return logits


@dataclass(frozen=True)
class ViTDistribution(Family[ModuleTask, ViTShape]):
    """Vision transformers of one or two blocks on images of 8x8 or 16x16 pixels, with normalised queries and keys.

    Args:
        data: Names for `images`, equally likely.
        width: Smallest and largest number of channels, log-uniform, then made divisible by 4.
        batch_size: Smallest and largest batch, in images, log-uniform.
        augment: Augmentation of the members of a task.
    """

    shape_class = ViTShape
    data: tuple[str, ...] = ("digits", "mnist5k", "mnist16")
    width: tuple[int, int] = (12, 32)
    batch_size: tuple[int, int] = (8, 24)
    augment: Augment = field(default_factory=lambda: Augment(rescale=0.25, loss_scale=0.5))

    def shape(self, draws: Draws) -> ViTShape:
        """Draw an architecture, data and a batch size."""
        data, batch_size = draws.one_of(self.data), draws.log_uniform(*self.batch_size)
        patches = (images(data).x.shape[-1] // PATCH) ** 2
        common = transformer_shape(draws, data, self.width, patches, batch_size)
        return ViTShape(**{**asdict(common), "qk_norm": True}, flatten=draws.one_in(2))

    def task(self, shape: ViTShape) -> ModuleTask:
        """The task with these hyperparameters."""
        data = images(shape.data)
        return ModuleTask(
            lambda: initialise(ViT(shape, data.x.shape[1], data.classes), shape.initialisation),
            data,
            CLASSIFICATION[shape.loss],
            shape.batch_size,
            self.augment,
            f"vit-{shape.depth}x{shape.width}",
        )
