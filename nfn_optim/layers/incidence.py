"""Which pooled rows belong to which neuron: a `Symmetry` laid out for gather and scatter.

Pooling a tensor over all its dimensions but one gives one feature vector for every entry of that dimension, a *row*.
The rows of all dimensions of all tensors are concatenated, grouped by *role* (the dimension's place in its tensor),

    rows       N x channels    one for every entry of every dimension of every tensor
    neurons    A x channels    one for every entry of every axis
    tensors    T x channels    one for every tensor

and two index lists relate them: a row of a plain dimension is one neuron; a row of a product `(c h w)` belongs to one
neuron of every factor; a row of a sum to one neuron of its part. A nested axis has neurons for every entry of the axis
that it is nested in. Where a tensor carries a nested axis in one dimension and the axis that it is nested in in
another, pooling would add unrelated neurons; such a dimension is *masked*: all its rows carry the features of the
tensor.

Sums over these lists are all the communication that an equivariant map between axes needs: O(neurons), however many
weights there are. Means can be restricted to *active* rows and tensors, those that have gradients: whatever the others
are, and however many, makes no difference then.

References:
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.expression import Expression, axes_of, entries_within

ROLES = ("vector", "row", "column", "tap")
"""What a dimension is in its tensor: the only one, the first (outputs), the second (inputs), or a later one (taps)."""


@dataclass(frozen=True)
class Segment:
    """The rows `start ... start + length` that belong to dimension `dim` of tensor number `tensor`."""

    tensor: int
    dim: int
    role: str
    start: int
    length: int
    masked: bool


class Incidence:
    """Index lists between rows, neurons and tensors.

    Args:
        symmetry: The axes of every tensor.

    Attributes:
        names: Tensor names, in order.
        ndims: Number of dimensions of each tensor.
        segments: The segments of every tensor, `segments[t][d]`.
        role_spans: Role -> (first row, one past the last row); rows of one role are contiguous.
        lengths: Number of *leading rows* of each tensor, those of its first dimension; 1 for a scalar, without rows.
        has_masked: Whether there are masked rows.
        plain: Whether every row belongs to exactly one neuron.
        indices: The lists, by name. `row`, `neuron` and `pair_weight`: pairs that belong together, and the weight of
        the
            row in the mean of the neuron. `tensor_of_row`; `row_weight`, in the mean of its tensor; `masked`, rows.
            `group`: of every pair, those of one neuron in one place of one dimension; `neuron_of_group`.
            `segment_of_row`: number of the tensor times `max_ndim`, plus the dimension.
            `gathered`: position of every row in the order tensor 0, tensor 1, ... . `leading`: the row that every
            leading row is (N for that of a scalar), with `tensor_of_leading`. `neighbours`: tensors that share an axis,
            see `_neighbours`. `matrix`: tensors of two dimensions or more. `sides`: the
            shorter side of each of them as `(shape[0], rest)`, else 0. `order`: `(T, ORDERS)`, whether a tensor has
            at most one dimension, two, or more.
    """

    ORDERS = 3

    def __init__(self, symmetry: Symmetry) -> None:
        self.names = tuple(symmetry.dims)
        shapes = [symmetry.shape_of(name) for name in self.names]
        expressions = [symmetry.expressions_of(name) for name in self.names]
        self.ndims = tuple(len(shape) for shape in shapes)
        self.max_ndim = width = max(2, *self.ndims, 0)
        self.segments: list[list[Segment]] = [[] for _ in self.names]
        self.role_spans: dict[str, tuple[int, int]] = {}
        start = 0
        for role in ROLES:
            first = start
            for t, shape in enumerate(shapes):
                for d, length in enumerate(shape):
                    if role_of(d, len(shape)) == role:
                        masked = not _is_whole(symmetry, expressions[t][d])
                        self.segments[t].append(Segment(t, d, role, start, length, masked))
                        start += length
            self.role_spans[role] = (first, start)
        self.rows = start
        for segments in self.segments:
            segments.sort(key=lambda segment: segment.dim)

        offsets, total = {}, 0
        for axis, size in symmetry.sizes.items():
            offsets[axis], total = total, total + symmetry.copies_of(axis) * size
        self.neurons = total
        all_segments = [s for segments in self.segments for s in segments]
        unmasked = [s for s in all_segments if not s.masked]
        tensor_of_row, row_weight = torch.zeros(self.rows, dtype=torch.int64), torch.zeros(self.rows)
        is_masked = torch.zeros(self.rows, dtype=torch.bool)
        for segment in all_segments:
            span = slice(segment.start, segment.start + segment.length)
            tensor_of_row[span] = segment.tensor
            row_weight[span] = 1.0 / max(segment.length * self.ndims[segment.tensor], 1)
            is_masked[span] = segment.masked
        self.has_masked = bool(is_masked.any())
        self.lengths = [shape[0] if shape else 1 for shape in shapes]
        leading = [torch.arange(s[0].length) + s[0].start if s else torch.tensor([self.rows]) for s in self.segments]
        order = sorted(all_segments, key=lambda s: s.start)
        position = {(s.tensor, s.dim): k for k, s in enumerate(all_segments)}
        starts = torch.tensor([0, *(s.length for s in all_segments)]).cumsum(0)
        gathered = [torch.arange(s.length) + starts[position[s.tensor, s.dim]] for s in order]
        empty = torch.zeros(0, dtype=torch.int64)
        pairs = _pairs(symmetry, [(s.start, expressions[s.tensor][s.dim]) for s in unmasked], offsets)
        self.plain = torch.equal(pairs["row"], torch.arange(self.rows))
        self.indices = pairs | {
            "segment_of_row": torch.cat([empty, *(torch.full((s.length,), s.tensor * width + s.dim) for s in order)]),
            "no_segment": torch.tensor([[float(d >= n) for d in range(width)] for n in self.ndims]).reshape(-1, width),
            "tensor_of_row": tensor_of_row,
            "masked": is_masked[:, None],
            "gathered": torch.cat([empty, *gathered]),
            "leading": torch.cat([empty, *leading]),
            "tensor_of_leading": torch.repeat_interleave(torch.arange(len(shapes)), torch.tensor(self.lengths)),
            "row_weight": row_weight[:, None],
            "neighbours": _neighbours(symmetry, shapes),
            "matrix": torch.tensor([float(len(shape) > 1) for shape in shapes]),
            "sides": torch.tensor([float(min(s[0], math.prod(s[1:]))) if len(s) > 1 else 0.0 for s in shapes]),
            "ndims": torch.tensor(self.ndims, dtype=torch.float32),
            "order": F.one_hot(torch.tensor(self.ndims, dtype=torch.int64).clamp(1, 3) - 1, self.ORDERS).float(),
        }
        self._placed: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def at(self, like: Tensor) -> dict[str, Tensor]:
        """The index lists on the device of `like`, real-valued ones in its dtype; made once for each."""
        key = (like.device, like.dtype)
        if key not in self._placed:
            self._placed[key] = {
                name: value.to(like.device, like.dtype if value.is_floating_point() else None)
                for name, value in self.indices.items()
            }
        return self._placed[key]

    def counts_of(self, active: Tensor) -> Tensor:
        """Number of active rows of every dimension of every tensor, or the sum of other weights of rows.

        Args:
            active: 1 for active rows, else 0; `(*batch, N)`.

        Returns:
            `(*batch, T, max_ndim)`, 1 where a tensor has no such dimension.
        """
        index = self.at(active)
        start = index["no_segment"].flatten().expand(*active.shape[:-1], -1)
        counts = start.index_add(-1, index["segment_of_row"], active)
        return counts.reshape(*active.shape[:-1], len(self.names), self.max_ndim)

    def of_segments(self, values: Tensor) -> Tensor:
        """Copy a value of every dimension of every tensor to its rows. `(*batch, T, max_ndim) -> (*batch, N)`."""
        return values.flatten(-2).index_select(-1, self.at(values)["segment_of_row"])

    def mean_weights(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of rows in means over active rows only.

        Args:
            active: 1 for active rows, else 0; `(*batch, N)`.

        Returns:
            Of every pair in the mean of its neuron, `(*batch, pairs, 1)`: all dimensions with an active row weigh the
            same; and of every row in the mean of its tensor, `(*batch, N, 1)`.
        """
        index, batch = self.at(active), active.shape[:-1]
        in_pairs = active.index_select(-1, index["row"])
        groups = active.new_zeros((*batch, len(index["neuron_of_group"]))).index_add(-1, index["group"], in_pairs)
        zeros = active.new_zeros((*batch, self.neurons))
        carriers = zeros.index_add(-1, index["neuron_of_group"], groups.sign()).clamp(min=1)
        others = groups.clamp(min=1).index_select(-1, index["group"]) * carriers.index_select(-1, index["neuron"])
        counts = self.of_segments(self.counts_of(active)).clamp(min=1)
        by_row = active / (counts * index["ndims"].index_select(-1, index["tensor_of_row"]))
        return (in_pairs / others).unsqueeze(-1), by_row.unsqueeze(-1)

    def rows_to_neurons(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over all the rows of a neuron, or with `mean_weights`. `(*batch, N, C) -> (*batch, A, C)`."""
        index = self.at(rows)
        weights = index["pair_weight"] if weights is None else weights
        messages = (rows if self.plain else rows.index_select(-2, index["row"])) * weights  # (*batch, pairs, C)
        zeros = rows.new_zeros((*rows.shape[:-2], self.neurons, rows.shape[-1]))
        return zeros.index_add(-2, index["neuron"], messages)

    def neurons_to_rows(self, neurons: Tensor) -> Tensor:
        """Sum over the factors of a row's dimension. `(*batch, A, C) -> (*batch, N, C)`."""
        index = self.at(neurons)
        messages = neurons.index_select(-2, index["neuron"])  # (*batch, pairs, C)
        if self.plain:
            return messages
        zeros = neurons.new_zeros((*neurons.shape[:-2], self.rows, neurons.shape[-1]))
        return zeros.index_add(-2, index["row"], messages)

    def rows_to_tensors(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over the rows of a tensor, each dimension weighing the same, or with `mean_weights`.

        `(*batch, N, C) -> (*batch, T, C)`.
        """
        index = self.at(rows)
        weights = index["row_weight"] if weights is None else weights
        zeros = rows.new_zeros((*rows.shape[:-2], len(self.names), rows.shape[-1]))
        return zeros.index_add(-2, index["tensor_of_row"], rows * weights)

    def tensors_to_rows(self, tensors: Tensor) -> Tensor:
        """Copy to every row of a tensor. `(*batch, T, C) -> (*batch, N, C)`."""
        return tensors.index_select(-2, self.at(tensors)["tensor_of_row"])


def _pairs(symmetry: Symmetry, dims: Sequence[tuple[int, Expression]], offsets: Mapping[str, int]) -> dict[str, Tensor]:
    """`row`, `neuron`, `pair_weight`, `group` and `neuron_of_group` of `Incidence.indices`.

    Args:
        symmetry: Of the network.
        dims: The first row of a dimension, and its expression.
        offsets: Of the neurons of every axis.
    """
    carriers = Counter(axis for _, expression in dims for axis in axes_of(expression))
    row, neuron, weight, group, neuron_of_group = ([torch.zeros(0, dtype=torch.int64)] for _ in range(5))
    groups = 0
    for start, expression in dims:
        occurrences = symmetry.occurrences_of(expression)
        for o in occurrences:
            size = symmetry.sizes[o.axis]
            copy = entries_within(o, occurrences, symmetry.nested.get(o.axis, ()), symmetry.sizes)
            assert copy is not None
            entry = copy * size + o.entries
            row.append(start + o.rows)
            neuron.append(offsets[o.axis] + entry)
            weight.append(1.0 / torch.bincount(entry)[entry] / carriers[o.axis])
            group.append(groups + entry)
            neuron_of_group.append(offsets[o.axis] + torch.arange(symmetry.copies_of(o.axis) * size))
            groups += len(neuron_of_group[-1])
    rows, by_row = torch.sort(torch.cat(row), stable=True)
    return {
        "row": rows,
        "neuron": torch.cat(neuron)[by_row],
        "pair_weight": torch.cat(weight).to(torch.get_default_dtype())[by_row, None],
        "group": torch.cat(group)[by_row],
        "neuron_of_group": torch.cat(neuron_of_group),
    }


def _is_whole(symmetry: Symmetry, expression: Expression) -> bool:
    """Whether a dimension contains every axis that its axes are nested in."""
    occurrences = symmetry.occurrences_of(expression)
    nested = [(o, symmetry.nested.get(o.axis, ())) for o in occurrences]
    return all(entries_within(o, occurrences, above, symmetry.sizes) is not None for o, above in nested)


def role_of(dim: int, ndim: int) -> str:
    """The role of dimension `dim` in a tensor of `ndim` dimensions."""
    return "vector" if ndim == 1 else ROLES[min(dim, 2) + 1]


def _neighbours(symmetry: Symmetry, shapes: list[tuple[int, ...]]) -> Tensor:
    """`(T, T)`: 1 in row t for every other matrix (two dimensions or more) that shares an axis with t."""
    axes = [set(symmetry.axes_of(name)) for name in symmetry.dims]
    neighbours = torch.zeros(len(axes), len(axes))
    for t, own in enumerate(axes):
        for other, its_axes in enumerate(axes):
            if other != t and len(shapes[other]) > 1 and own & its_axes:
                neighbours[t, other] = 1.0
    return neighbours
