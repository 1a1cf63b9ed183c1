"""Tables of users and items whose ids follow a power law, so that most rows of an embedding rarely have a gradient."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor, nn

from meta_train.evaluation.datasets import Examples
from meta_train.evaluation.networks import mlp

EXPONENT = 0.8  # the probability of the k-th most frequent id falls with k to this power
LATENT = 6  # dimensions of the hidden properties of ids


def power_law(vocabulary: int, count: int, generator: torch.Generator) -> Tensor:
    """Random ids `(count,)`; the frequent ones have no particular place in the table."""
    probability = torch.arange(1, vocabulary + 1).float() ** -EXPONENT
    ranks = torch.multinomial(probability, count, replacement=True, generator=generator)
    return torch.randperm(vocabulary, generator=generator)[ranks]


@lru_cache(maxsize=2)
def interactions(vocabularies: tuple[int, ...], count: int, *, clicks: bool) -> Examples:
    """Ids of each field `(count, fields)` and a rating `(count, 1)`: hidden properties, in pairs, and noise.

    Args:
        vocabularies: Number of ids of each field, such as users and items.
        count: Of all; a tenth is held out.
        clicks: Whether targets are 0 or 1, drawn with the logistic function of the rating as probability.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([power_law(size, count, generator) for size in vocabularies], -1)
    tables = [torch.randn(size, LATENT, generator=generator) for size in vocabularies]
    biases = sum(
        torch.randn(size, generator=generator)[column] for size, column in zip(vocabularies, ids.T, strict=True)
    )
    hidden = [table[column] for table, column in zip(tables, ids.T, strict=True)]
    rating = biases + sum((one * other).sum(-1) for one, other in combinations(hidden, 2)) / LATENT**0.5
    rating = rating / rating.std() + 0.3 * torch.randn(count, generator=generator)
    if clicks:
        rating = (torch.rand(count, generator=generator) < (2 * rating - 1).sigmoid()).float()
    border, y = count * 9 // 10, rating.unsqueeze(-1)
    return Examples(ids[:border], y[:border], ids[border:], y[border:])


class Recommender(nn.Module):
    """A bias for every id, products of embeddings in pairs, and a network of all embeddings.

    Args:
        vocabularies: Number of ids of each field.
        width: Channels of the embeddings.
        hidden: Neurons of each hidden layer.

    References:
        Deep Learning Recommendation Model (Naumov et al., 2019), arXiv:1906.00091
    """

    def __init__(self, vocabularies: tuple[int, ...], width: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.biases = nn.ModuleList(nn.Embedding(size, 1) for size in vocabularies)
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in vocabularies)
        for table in (*self.biases, *self.tables):
            nn.init.normal_(table.weight, std=0.05)
        pairs = len(vocabularies) * (len(vocabularies) - 1) // 2
        self.net = mlp(len(vocabularies) * width + pairs, *hidden, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """`(batch, fields) -> (batch, 1)`."""
        bias = torch.cat([table(column) for table, column in zip(self.biases, ids.T, strict=True)], -1)
        found = [table(column) for table, column in zip(self.tables, ids.T, strict=True)]
        products = torch.stack([(one * other).sum(-1) for one, other in combinations(found, 2)], -1)
        y: Tensor = self.net(torch.cat([*found, products], -1))
        return y + (bias.sum(-1) + products.sum(-1)).unsqueeze(-1)
