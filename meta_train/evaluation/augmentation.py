"""Random crops and reflections of images, drawn anew for every batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.evaluation.datasets import Examples
from meta_train.evaluation.losses import classification
from meta_train.evaluation.task import Training


def cropped_and_flipped(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift every image by at most `padding` pixels, zeros coming in, and reflect every second one.

    Args:
        x: Images `(batch, channels, side, side)`.
        padding: In pixels.
        generator: Of shifts and reflections.
    """
    count, side = len(x), x.shape[-1]
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    along = torch.arange(side)
    columns = torch.where(torch.randint(2, (count, 1), generator=generator).bool(), along, along.flip(0))
    wide = F.pad(x, (padding,) * 4)
    index = torch.arange(count)[:, None, None]
    return wide[index, :, (top + along)[:, :, None], (left + columns)[:, None, :]].permute(0, 3, 1, 2).contiguous()


def augmented_classification(model: nn.Module, data: Examples, batch_size: int, padding: int) -> Training:
    """Cross-entropy, in nats, of cropped and reflected images; held-out images are as they are."""

    def loss(batches: torch.Generator) -> Tensor:
        index = torch.randint(len(data.x), (batch_size,), generator=batches)
        return F.cross_entropy(model(cropped_and_flipped(data.x[index], padding, batches)), data.y[index])

    return Training(model, loss, classification(model, data, batch_size).held_out)
