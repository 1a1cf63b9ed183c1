"""An attention layer without anything around it learns the outputs of another one.

Queries and keys, and values and outputs, enter only as products: curvature depends on the partner of every matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.evaluation.task import Scores, Training

HELD = 64  # held-out sequences


class AttentionLayer(nn.Module):
    """Attention of four heads, without biases, mask or positions.

    Args:
        width: Channels.
        fused: Whether queries, keys and values are one matrix.
    """

    heads = 4

    def __init__(self, width: int, *, fused: bool) -> None:
        super().__init__()
        parts = 1 if fused else 3
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width // parts, bias=False) for _ in range(parts))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, length, width)` to the same."""
        found = [part(x) for part in self.qkv]
        found = found if len(found) > 1 else list(torch.chunk(found[0], 3, -1))
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2) for part in found)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


def imitation(width: int, scale: float, *, fused: bool, batch_size: int, length: int) -> Training:
    """Squared error against a teacher, the same for all seeds, on standard normal inputs.

    Args:
        width: Channels of student and teacher.
        scale: The teacher's weights are uniform between -scale and scale.
        fused: Whether queries, keys and values are one matrix.
        batch_size: Sequences.
        length: Positions of a sequence.
    """
    student, teacher = (AttentionLayer(width, fused=fused) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for weight in teacher.parameters():
        nn.init.uniform_(weight, -scale, scale, generator=generator)
    teacher.requires_grad_(False)

    def error(count: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(count, length, width, generator=generator)
        return F.mse_loss(student(x), teacher(x))

    def held_out() -> Scores:
        return {"loss": error(HELD, torch.Generator().manual_seed(1)).item()}

    return Training(student, lambda batches: error(batch_size, batches), held_out)
