"""Image classification by small vision transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from meta_train.tasks.augment import Augment
from meta_train.tasks.family import Draws, Family
from meta_train.tasks.images import IMAGES
from meta_train.tasks.initialisation import initialise
from meta_train.tasks.losses import cross_entropy
from meta_train.tasks.module import ModuleTask
from meta_train.tasks.transformer import Block, TransformerShape, norm_of, transformer_shape

PATCH = 2  # pixels


class ViT(nn.Module):
    """A transformer on patches of 2x2 pixels; its output is read off the mean token.

    Args:
        shape: What it is made of; the context is the number of patches.
        classes: Number of classes.
    """

    def __init__(self, shape: TransformerShape, classes: int) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH**2, shape.width)
        self.position = nn.Parameter(torch.randn(shape.context, shape.width) * 0.1)
        self.blocks = nn.Sequential(*(Block(shape, causal=False) for _ in range(shape.depth)))
        self.norm = norm_of(shape)
        self.last = nn.Linear(shape.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits. `(batch_size, 1, height, width) -> (batch_size, classes)`."""
        rows, columns = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        cut = x.reshape(-1, rows, PATCH, columns, PATCH).transpose(2, 3)  # (batch_size, rows, columns, 2, 2)
        tokens = cut.reshape(-1, rows * columns, PATCH**2)  # (batch_size, patches, 4)
        logits: Tensor = self.last(self.norm(self.blocks(self.patch(tokens) + self.position)).mean(1))
        return logits


@dataclass(frozen=True)
class ViTDistribution(Family[ModuleTask, TransformerShape]):
    """Vision transformers of one or two blocks on 8x8 images.

    Args:
        data: Some of `IMAGES`, equally likely.
        width: Smallest and largest number of channels, log-uniform, then made divisible by 4.
        batch_size: Smallest and largest batch, in images, log-uniform.
        augment: How the members of a task differ.
    """

    made_of = TransformerShape
    data: tuple[str, ...] = ("digits", "mnist5k")
    width: tuple[int, int] = (12, 32)
    batch_size: tuple[int, int] = (8, 32)
    augment: Augment = field(default_factory=lambda: Augment(rescale=0.25, loss_scale=0.5))

    def shape(self, draws: Draws) -> TransformerShape:
        """Draw an architecture, data and a batch size."""
        patches = (8 // PATCH) ** 2
        data = draws.one_of(self.data)
        return transformer_shape(draws, data, self.width, patches, draws.log_uniform(*self.batch_size))

    def task(self, shape: TransformerShape) -> ModuleTask:
        """The task of a shape."""
        data = IMAGES[shape.data]()
        return ModuleTask(
            lambda: initialise(ViT(shape, data.classes), shape.start),
            data,
            cross_entropy,
            shape.batch_size,
            self.augment,
            f"vit-{shape.depth}x{shape.width}",
        )
