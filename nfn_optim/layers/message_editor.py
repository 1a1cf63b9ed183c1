r"""Changed weights from vectors of neurons that have travelled through the network in both directions.

Vectors are propagated forwards, as activations are (`nfn_optim.layers.propagation`), and backwards, as gradients are:

    f_k        of every neuron, from the weights and neurons that it reads
    b_j        from those that read it: a perceptron of (sum_k W_kjt b_k, for every tap t) and f_j
    U'_kj = U_kj + g_T r(p(f_k, b_k) + q(f_j, b_j) + s U_kj)        r a perceptron, p, q, s linear, g_T learned
    U'_k  = U_k  + g_T r(f_k, b_k, U_k)                              for vectors

So the change of a weight depends on what both of its neurons compute and on what becomes of it, not only on means of
weights. Weights are standardised first, sums over neurons divided by the square root of their number, and every g_T
starts small, in standard deviations of its tensor. A weight costs a perceptron of `channels` neurons.

References:
    Graph Neural Networks for Learning Equivariant Representations of Neural Networks (Kofinas et al., 2024),
    arXiv:2403.12143
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfn_optim.layers.editor import START
from nfn_optim.layers.propagation import Propagation
from nfn_optim.layers.standardise import Standardise
from nfn_optim.symmetry import Symmetry


class MessageEditor(nn.Module):
    r"""From weights to weights, equivariant to the order of hidden neurons.

    Call `fit` with a training population before training, for the moments of its weights. Signs of neurons that make
    no difference to the networks should be canonical (`nfn_optim.layers.canonical`).

    Args:
        symmetry: The tensors and their axes, as of `Propagation`.
        channels: Length of the vectors.
        outputs: Edited networks for every network.

    Raises:
        ValueError: As of `Propagation`.

    Example:
        >>> s = Symmetry.parse("0.weight h in\n0.bias h\n2.weight out h\n2.bias out\nfree h=8\nfixed in=4 out=2")
        >>> features = {name: torch.randn(5, *s.shape_of(name), 1) for name in s.dims}
        >>> edited = MessageEditor(s, outputs=3).fit(features)(features)
        >>> tuple(edited["0.weight"].shape)
        (5, 8, 4, 3)
    """

    def __init__(self, symmetry: Symmetry, *, channels: int = 32, outputs: int = 1) -> None:
        super().__init__()
        self.outputs = outputs
        self.standardise = Standardise(symmetry, 1)
        self.forwards = Propagation(symmetry, channels)
        self._dims, self._fixed, sizes = dict(symmetry.dims), symmetry.fixed, symmetry.sizes
        taps = {name: math.prod(symmetry.shape_of(name)[2:]) for name in symmetry.dims}
        lengths = dict(self.forwards.out_channels)
        matrices = {name: dims for name, dims in symmetry.dims.items() if len(dims) > 1}
        self._widths = {name: sizes[dims[1]] for name, dims in matrices.items() if dims[1] in lengths}
        self._reversed = [(name, *matrices[name][:2]) for name in reversed(self._widths)]
        self.backwards = nn.ModuleList()
        known: set[str] = set()
        for name, axis, source in self._reversed:
            sent = channels if axis in known else sizes[axis] if axis in self._fixed else 1
            self.backwards.append(_perceptron(sent * taps[name] + self.forwards.out_channels[source], channels))
            known.add(source)
        lengths |= {axis: lengths[axis] + channels for axis in known}
        positions = {axis: n if axis in self._fixed else 1 for axis, n in sizes.items()}
        self.readers = nn.ModuleList()
        for name, dims in symmetry.dims.items():
            columns = (positions | lengths)[dims[1]] if name in matrices else 0
            self.readers.append(_Reader(lengths[dims[0]], columns, taps[name], channels, outputs))
        self.factors = nn.Parameter(torch.full((len(symmetry.dims),), START))

    def fit(self, features: Mapping[str, Tensor]) -> MessageEditor:
        """Take the moments of a training population. Name -> `(N, *shape, 1)`."""
        self.standardise.fit(features)
        return self

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Edit. Name -> `(N, *shape, 1)` to name -> `(N, *shape, outputs)`."""
        weights = self.standardise(features)
        vectors = self._vectors(weights)
        edited = {}
        for (name, dims), reader, factor in zip(self._dims.items(), self.readers, self.factors, strict=True):
            columns = None
            if len(dims) > 1:
                columns = vectors[dims[1]] if dims[1] in vectors else self._positions(weights[name], dims[1])
            change = reader(weights[name].flatten(min(len(dims), 2) + 1), vectors[dims[0]], columns)
            change = change.reshape(*features[name].shape[:-1], self.outputs)
            edited[name] = features[name] + factor * self.standardise.deviation(name) * change
        return edited

    def _vectors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Axis -> f and, where something reads from it, b, `(N, size, length)`."""
        forwards: dict[str, Tensor] = self.forwards(
            {name: x / self._widths.get(name, 1) ** 0.5 for name, x in weights.items()}
        )
        backwards: dict[str, Tensor] = {}
        for (name, axis, source), perceptron in zip(self._reversed, self.backwards, strict=True):
            weight = weights[name].flatten(3).transpose(1, 2)  # (N, size of source, size of axis, taps)
            sent = self.forwards.messages(weight, axis, backwards.get(axis))
            sent = sent / weight.shape[2] ** 0.5 if axis in backwards else sent
            arrived = perceptron(torch.cat([sent, forwards[source]], -1))
            backwards[source] = arrived if source not in backwards else backwards[source] + arrived
        return forwards | {axis: torch.cat([forwards[axis], b], -1) for axis, b in backwards.items()}

    def _positions(self, weight: Tensor, axis: str) -> Tensor:
        """What tells the columns apart where nothing has arrived: fixed positions, `(1, columns, length)`."""
        size = weight.shape[2]
        return (torch.eye(size) if axis in self._fixed else torch.ones(size, 1)).to(weight).unsqueeze(0)


class _Reader(nn.Module):
    """The change of every entry of a tensor, from the vectors of its neurons and the entry.

    Args:
        rows: Length of the vectors of rows.
        columns: Likewise; 0 without columns.
        taps: Entries for every row and column.
        channels: Of the perceptron.
        outputs: Changes of every entry.
    """

    def __init__(self, rows: int, columns: int, taps: int, channels: int, outputs: int) -> None:
        super().__init__()
        self.rows, self.own = nn.Linear(rows, channels), nn.Linear(taps, channels, bias=False)
        self.columns = nn.Linear(columns, channels, bias=False) if columns else None
        self.hidden, self.last = nn.Linear(channels, channels), nn.Linear(channels, taps * outputs)

    def forward(self, weight: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
        """`(N, rows[, columns], taps)` and vectors `(N, size, length)` to `(N, rows[, columns], taps * outputs)`."""
        h: Tensor = self.rows(rows)
        if self.columns is not None and columns is not None:
            h = h.unsqueeze(2) + self.columns(columns).unsqueeze(1)
        h = F.gelu(h + self.own(weight))
        out: Tensor = self.last(F.gelu(self.hidden(h)))
        return out


def _perceptron(size: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, channels), nn.GELU(), nn.Linear(channels, channels), nn.GELU())
