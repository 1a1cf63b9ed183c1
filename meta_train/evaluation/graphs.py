"""Graphs, and networks that pass messages along their edges."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.evaluation.datasets import images
from meta_train.evaluation.networks import mlp
from meta_train.evaluation.task import Scores, Training

NEIGHBOURS = 8


@dataclass(frozen=True)
class Graph:
    """Nodes with directed edges from the nearest neighbours of each.

    Attributes:
        x: Inputs of the nodes `(nodes, channels)`.
        y: Targets of the nodes, `(nodes,)` or `(nodes, 1)`; those from `border` on are held out.
        neighbours: Indices `(nodes, NEIGHBOURS)`.
        length: Lengths of the edges `(nodes, NEIGHBOURS)`.
        border: Number of nodes to train on.
    """

    x: Tensor
    y: Tensor
    neighbours: Tensor
    length: Tensor
    border: int


def _nearest(place: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths and indices of the edges from the nearest neighbours, `(nodes, NEIGHBOURS)` each."""
    found = torch.cdist(place, place).topk(NEIGHBOURS + 1, largest=False)
    return found.values[:, 1:], found.indices[:, 1:]


@lru_cache(maxsize=1)
def similar_images(folder: Path, file: str, side: int, nodes: int) -> Graph:
    """Images and their labels, joined to the most similar ones; a third of them is held out."""
    found = images(folder, file, side, nodes)
    x = found.x.flatten(1)
    length, neighbours = _nearest(x)
    return Graph(x, found.y, neighbours, length, len(x) * 2 // 3)


@lru_cache(maxsize=1)
def points(nodes: int = 1200) -> Graph:
    """Points in a square with random channels; the target spreads over two edges, near neighbours counting more."""
    generator = torch.Generator().manual_seed(0)
    place, x = torch.rand(nodes, 2, generator=generator), torch.randn(nodes, 6, generator=generator)
    length, neighbours = _nearest(place)
    near = (-30 * length).softmax(-1).unsqueeze(-1)
    h = torch.tanh(x @ torch.randn(6, 12, generator=generator))
    for _ in range(2):
        h = torch.tanh((near * h[neighbours]).sum(1) @ torch.randn(12, 12, generator=generator) + h)
    y = h @ torch.randn(12, 1, generator=generator)
    return Graph(x, (y - y.mean()) / y.std(), neighbours, 30 * length, nodes * 3 // 4)


class GraphConvolutions(nn.Module):
    """Two layers that average a linear map of the neighbours.

    References:
        Semi-Supervised Classification with Graph Convolutional Networks (Kipf and Welling, 2017), arXiv:1609.02907
    """

    def __init__(self, given: int, width: int, made: int) -> None:
        super().__init__()
        self.first = nn.Linear(given, width)
        self.second = nn.Linear(width, made)

    def forward(self, graph: Graph) -> Tensor:
        """Outputs of all nodes `(nodes, made)`."""
        h = F.relu(self._average(self.first(graph.x), graph))
        return self._average(self.second(h), graph)

    @staticmethod
    def _average(h: Tensor, graph: Graph) -> Tensor:
        return (h + F.embedding(graph.neighbours, h).sum(1)) / (NEIGHBOURS + 1)


class MessagePassing(nn.Module):
    """Residual rounds of messages: a network of both ends and the length of an edge, averaged over edges.

    References:
        Neural Message Passing for Quantum Chemistry (Gilmer et al., 2017), Sec. 2, arXiv:1704.01212
    """

    def __init__(self, given: int, width: int, rounds: int) -> None:
        super().__init__()
        self.embed = nn.Linear(given, width)
        self.messages = nn.ModuleList(mlp(2 * width + 1, width, width) for _ in range(rounds))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(rounds))
        self.head = mlp(width, width, 1)

    def forward(self, graph: Graph) -> Tensor:
        """Outputs of all nodes `(nodes, 1)`."""
        h = self.embed(graph.x)
        for message, norm in zip(self.messages, self.norms, strict=True):
            z = norm(h)
            ends = (z.unsqueeze(1).expand(-1, NEIGHBOURS, -1), F.embedding(graph.neighbours, z))
            edges = torch.cat([*ends, graph.length.unsqueeze(-1)], -1)  # (nodes, NEIGHBOURS, 2 width + 1)
            h = h + message(edges.flatten(0, 1)).unflatten(0, edges.shape[:2]).mean(1)
        y: Tensor = self.head(h)
        return y


def node_prediction(model: nn.Module, graph: Graph, batch_size: int) -> Training:
    """Cross-entropy, in nats, of labels or squared error of numbers, at a batch of nodes of the whole graph."""
    labels = graph.y.dim() == 1
    error = F.cross_entropy if labels else F.mse_loss

    def loss(batches: torch.Generator) -> Tensor:
        index = torch.randint(graph.border, (batch_size,), generator=batches)
        return error(model(graph)[index], graph.y[index])

    def held_out() -> Scores:
        found, target = model(graph)[graph.border :], graph.y[graph.border :]
        right = {"accuracy": (found.argmax(-1) == target).float().mean().item()} if labels else {}
        return {"loss": error(found, target).item(), **right}

    return Training(model, loss, held_out)
