"""Text as tokens of a vocabulary of thousands, and a network that predicts the next one."""

from __future__ import annotations

import re
import zlib
from functools import lru_cache

import torch
from torch import Tensor, nn

from meta_train.evaluation.datasets import Examples, docstrings
from meta_train.evaluation.networks import mlp


@lru_cache(maxsize=2)
def tokens(package: str, pattern: str, vocabulary: int) -> Tensor:
    """The docstrings of a package as hashed tokens `(count,)`.

    Args:
        package: Its name.
        pattern: Regular expression of a token, such as a word or two characters.
        vocabulary: Number of different hashes.
    """
    found = re.findall(pattern, docstrings(package))
    return torch.tensor([zlib.crc32(token.encode()) % vocabulary for token in found])


@lru_cache(maxsize=1)
def windows(package: str, pattern: str, vocabulary: int, context: int) -> Examples:
    """Tokens `(count, context)` and the next one `(count,)`; the last tenth is held out."""
    found = tokens(package, pattern, vocabulary).unfold(0, context + 1, 1)
    border = len(found) * 9 // 10
    held = found[border :: (len(found) - border) // 2000 + 1]
    return Examples(found[:border, :-1], found[:border, -1], held[:, :-1], held[:, -1])


class NextToken(nn.Module):
    """A perceptron on the embeddings of the tokens before.

    References:
        A Neural Probabilistic Language Model (Bengio et al., 2003)
    """

    def __init__(self, vocabulary: int, context: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.net = mlp(context * width, hidden, vocabulary, act=nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, context) -> (batch, vocabulary)`."""
        y: Tensor = self.net(self.embed(x))
        return y
