"""Which pooled rows belong to which neuron: a `Symmetry` laid out for gather and scatter.

Pooling a tensor over all its dimensions but one gives one feature vector for every entry of that dimension, a *row*.
The rows of all dimensions of all tensors are concatenated, grouped by *role* (the dimension's place in its tensor),

    rows       N x channels    one for every entry of every dimension of every tensor
    neurons    A x channels    one for every entry of every axis
    tensors    T x channels    one for every tensor

and two index lists say how they meet: a row of a plain dimension is one neuron; a row of a product `(c h w)` meets one
neuron of every factor; a row of a sum one of its block. A nested axis has neurons for every entry of what it is nested
in. Where a tensor carries a nested axis in one dimension and what it is nested in in another, pooling would add neurons
that have nothing to do with each other; such a dimension is *mute*: all its rows say the same.

Sums over these lists are all the communication that an equivariant map between axes needs: it costs O(neurons),
however many weights there are.

References:
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
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
    mute: bool


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
        mutes: Whether there are mute rows.
        plain: Whether every row meets one neuron, and only one.
        indices: The lists. `row` and `neuron` meet with weight `share`; `tensor_of_row`, and `row_share`, the weight of
            a row in the mean of its tensor; `mute` rows; `gathered`, the place of every row where the rows of tensor 0
            come first, then those of tensor 1; `leading`, the row that every leading row is (N for that of a scalar),
            with `tensor_of_leading` and `leading_share`, its weight in a mean; `kin`, who shares an axis; `matrix`,
            which tensors have two dimensions or more; `static`,
            what never changes about a tensor, `(T, STATIC)`: its order, log sizes, log number of entries.
    """

    STATIC = 6

    def __init__(self, symmetry: Symmetry) -> None:
        self.names = tuple(symmetry.dims)
        shapes = [symmetry.shape_of(name) for name in self.names]
        expressions = [symmetry.expressions_of(name) for name in self.names]
        self.ndims = tuple(len(shape) for shape in shapes)
        self.segments: list[list[Segment]] = [[] for _ in self.names]
        self.role_spans: dict[str, tuple[int, int]] = {}
        start = 0
        for role in ROLES:
            first = start
            for t, shape in enumerate(shapes):
                for d, length in enumerate(shape):
                    if role_of(d, len(shape)) == role:
                        mute = not _is_whole(symmetry, expressions[t][d])
                        self.segments[t].append(Segment(t, d, role, start, length, mute))
                        start += length
            self.role_spans[role] = (first, start)
        self.rows = start
        for segments in self.segments:
            segments.sort(key=lambda segment: segment.dim)

        offsets, total = {}, 0
        for axis, size in symmetry.sizes.items():
            offsets[axis], total = total, total + symmetry.copies_of(axis) * size
        self.neurons = total
        everyone = [s for segments in self.segments for s in segments]
        spoken = [s for s in everyone if not s.mute]
        carriers = Counter(axis for s in spoken for axis in axes_of(expressions[s.tensor][s.dim]))
        row, neuron, share = [], [], []
        tensor_of_row, row_share = torch.zeros(self.rows, dtype=torch.int64), torch.zeros(self.rows)
        silent = torch.zeros(self.rows, dtype=torch.bool)
        for segment in everyone:
            span = slice(segment.start, segment.start + segment.length)
            tensor_of_row[span] = segment.tensor
            row_share[span] = 1.0 / max(segment.length * self.ndims[segment.tensor], 1)
            silent[span] = segment.mute
        self.mutes = bool(silent.any())
        self.lengths = [shape[0] if shape else 1 for shape in shapes]
        leading = [torch.arange(s[0].length) + s[0].start if s else torch.tensor([self.rows]) for s in self.segments]
        order = sorted(everyone, key=lambda s: s.start)
        position = {(s.tensor, s.dim): k for k, s in enumerate(everyone)}
        starts = torch.tensor([0, *(s.length for s in everyone)]).cumsum(0)
        gathered = [torch.arange(s.length) + starts[position[s.tensor, s.dim]] for s in order]
        for segment in spoken:
            occurrences = symmetry.occurrences_of(expressions[segment.tensor][segment.dim])
            for o in occurrences:
                size = symmetry.sizes[o.axis]
                copy = entries_within(o, occurrences, symmetry.nested.get(o.axis, ()), symmetry.sizes)
                assert copy is not None
                entry = copy * size + o.entries
                row.append(segment.start + o.rows)
                neuron.append(offsets[o.axis] + entry)
                share.append(1.0 / torch.bincount(entry)[entry] / carriers[o.axis])
        empty = torch.zeros(0, dtype=torch.int64)
        rows, by_row = torch.sort(torch.cat([empty, *row]), stable=True)
        self.plain = torch.equal(rows, torch.arange(self.rows))
        self.indices = {
            "row": rows,
            "neuron": torch.cat([empty, *neuron])[by_row],
            "share": torch.cat([torch.zeros(0), *share])[by_row, None],
            "tensor_of_row": tensor_of_row,
            "mute": silent[:, None],
            "gathered": torch.cat([empty, *gathered]),
            "leading": torch.cat([empty, *leading]),
            "leading_share": torch.cat([torch.full((n,), 1.0 / max(n, 1)) for n in self.lengths]),
            "tensor_of_leading": torch.repeat_interleave(torch.arange(len(shapes)), torch.tensor(self.lengths)),
            "row_share": row_share[:, None],
            "kin": _kinship(symmetry, shapes),
            "entries": torch.tensor([float(shape.numel()) for shape in map(torch.Size, shapes)]),
            "matrix": torch.tensor([float(len(shape) > 1) for shape in shapes]),
            "static": torch.tensor([_static(shape) for shape in shapes]).reshape(len(shapes), self.STATIC),
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

    def rows_to_neurons(self, rows: Tensor) -> Tensor:
        """Mean over all the rows of a neuron. `(*batch, N, C) -> (*batch, A, C)`."""
        index = self.at(rows)
        messages = (rows if self.plain else rows.index_select(-2, index["row"])) * index["share"]  # (*batch, pairs, C)
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

    def rows_to_tensors(self, rows: Tensor) -> Tensor:
        """Mean over the rows of a tensor, each dimension weighing the same. `(*batch, N, C) -> (*batch, T, C)`."""
        index = self.at(rows)
        zeros = rows.new_zeros((*rows.shape[:-2], len(self.names), rows.shape[-1]))
        return zeros.index_add(-2, index["tensor_of_row"], rows * index["row_share"])

    def tensors_to_rows(self, tensors: Tensor) -> Tensor:
        """Copy to every row of a tensor. `(*batch, T, C) -> (*batch, N, C)`."""
        return tensors.index_select(-2, self.at(tensors)["tensor_of_row"])


def _is_whole(symmetry: Symmetry, expression: Expression) -> bool:
    """Whether a dimension contains all that its axes are nested in."""
    occurrences = symmetry.occurrences_of(expression)
    nested = [(o, symmetry.nested.get(o.axis, ())) for o in occurrences]
    return all(entries_within(o, occurrences, above, symmetry.sizes) is not None for o, above in nested)


def role_of(dim: int, ndim: int) -> str:
    """The role of dimension `dim` in a tensor of `ndim` dimensions."""
    return "vector" if ndim == 1 else ROLES[min(dim, 2) + 1]


def _static(shape: tuple[int, ...]) -> list[float]:
    logs = torch.tensor([max(length, 1) for length in (*shape, 1, 1)], dtype=torch.float64).log()
    order = len(shape)
    return [
        float(order <= 1),
        float(order == 2),  # noqa: PLR2004 - the number of dimensions of a matrix
        float(order > 2),  # noqa: PLR2004
        float(logs[0]) / 5,
        float(logs[1]) / 5,
        float(logs.sum()) / 10,
    ]


def _kinship(symmetry: Symmetry, shapes: list[tuple[int, ...]]) -> Tensor:
    """`(T, T)`: row t averages over the matrices (two dimensions or more), other than t, that share an axis with t."""
    axes = [set(symmetry.axes_of(name)) for name in symmetry.dims]
    kin = torch.zeros(len(axes), len(axes))
    for t, own in enumerate(axes):
        for other, theirs in enumerate(axes):
            if other != t and len(shapes[other]) > 1 and own & theirs:
                kin[t, other] = 1.0
    return kin
