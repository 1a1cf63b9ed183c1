"""A language model with the sizes and initial weights that people use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from meta_train.evaluation.networks import Block

DEVIATION = 0.02


class GPT(nn.Module):
    """A decoder with tied embeddings; weights of deviation .02, those that write to the residual stream less by depth.

    Args:
        vocabulary: Number of tokens.
        context: Maximum length.
        width: Channels.
        depth: Blocks.

    References:
        Language Models are Unsupervised Multitask Learners (Radford et al., 2019), Sec. 2.3
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, 4, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=DEVIATION / (math.sqrt(2 * depth) if residual else 1))
            elif "norm" not in name:
                nn.init.zeros_(p)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, length) -> (batch, length, vocabulary)`."""
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        y: Tensor = self.head(self.norm(self.blocks(h)))
        return y
