"""Tensors partitioned into blocks in which every dimension is a single axis.

    out (a + b)         two blocks, (out, a) and (out, b)
    (h > d) (c y x)     one block with the dimensions h, d, c, y, x

Sums split a tensor into blocks, products are unflattened. An axis may occur in several dimensions of a block. A
dimension whose axis is nested knows its *parents*, the block's dimensions of the axes that it is nested in: those from
the same dimension of the tensor, otherwise the only ones in the tensor.

An axis nested in a *fixed* axis is a separate axis for each entry of the fixed one, so tensors are split along that
fixed axis as well. A free axis of size 1 has no permutations and counts as fixed.

References:
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.expression import Expression, Product

BlockId = tuple[str, int]
"""Name of the tensor, index of the block in the tensor."""


@dataclass(frozen=True)
class BlockDim:
    """A dimension of a block: one occurrence of an axis.

    Attributes:
        axis: Name of the axis, with the entries of the fixed axes that it is nested in, if any (`d@g=1`).
        size: Number of entries.
        free: Whether the axis may be permuted.
        parents: The free dimensions of the block that it is nested in.
    """

    axis: str
    size: int
    free: bool
    parents: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A tensor, or a part of one, in which every dimension is a single axis.

    Attributes:
        tensor: Name of the tensor.
        index: Index of the block in the tensor.
        dims: The dimensions.
    """

    tensor: str
    index: int
    dims: tuple[BlockDim, ...]

    @property
    def id(self) -> BlockId:
        """Key of the block in dictionaries."""
        return self.tensor, self.index

    @property
    def free_dims(self) -> tuple[int, ...]:
        """The dimensions of free axes."""
        return tuple(d for d, dim in enumerate(self.dims) if dim.free)

    @property
    def fixed_dims(self) -> tuple[int, ...]:
        """The dimensions of fixed axes."""
        return tuple(d for d, dim in enumerate(self.dims) if not dim.free)

    @property
    def num_positions(self) -> int:
        """Number of joint positions on the fixed axes; equivariant maps have separate coefficients for each."""
        return math.prod([self.dims[d].size for d in self.fixed_dims])

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return tuple(dim.size for dim in self.dims)


class BlockPartition:
    """The blocks of all tensors of a symmetry: splits features into blocks and joins them.

    Args:
        symmetry: The tensors and their axes.

    Attributes:
        tensors: Tensor name -> its partition.
        blocks: All blocks, tensor by tensor.

    Raises:
        ValueError: It is ambiguous which dimension a nested axis belongs to.
    """

    def __init__(self, symmetry: Symmetry) -> None:
        self.tensors = {name: TensorPartition(symmetry, name) for name in symmetry.dims}
        self.blocks = tuple(block for tensor in self.tensors.values() for block in tensor.blocks)

    def split(self, features: Mapping[str, Tensor], channels: int) -> tuple[torch.Size, dict[BlockId, Tensor]]:
        """Split features into blocks.

        Args:
            features: Tensor name -> `(*batch, *shape, C)`.
            channels: The expected C.

        Returns:
            The batch shape, and `(N, *block.shape, C)` for every block in the order of `blocks`, N = prod(batch).

        Raises:
            ValueError: The tensors are not those of the symmetry, or have other channels or different batch shapes.
        """
        shapes = {name: (*tensor.shape, channels) for name, tensor in self.tensors.items()}
        batch = batch_shape_of(shapes, features)
        parts: list[Tensor] = []
        for name, tensor in self.tensors.items():
            parts += tensor.split(features[name].reshape(-1, *shapes[name]))
        return batch, {block.id: x for block, x in zip(self.blocks, parts, strict=True)}

    def join(self, batch: torch.Size, parts: Iterable[Tensor]) -> dict[str, Tensor]:
        """The inverse of `split`; `parts` in the order of `blocks`, consumed one tensor at a time."""
        remaining = iter(parts)
        joined = {}
        for name, tensor in self.tensors.items():
            x = tensor.join([next(remaining) for _ in tensor.blocks])
            joined[name] = x.reshape(*batch, *tensor.shape, x.shape[-1])
        return joined


class TensorPartition:
    """The blocks of one tensor.

    Args:
        symmetry: The tensors and their axes.
        name: Name of the tensor.

    Attributes:
        shape: Shape of the tensor.
        blocks: One for every combination of the summands of its dimensions.

    Raises:
        ValueError: It is ambiguous which dimension a nested axis belongs to.
    """

    def __init__(self, symmetry: Symmetry, name: str) -> None:
        self.shape = symmetry.shape_of(name)
        parents = {p for above in symmetry.nested.values() for p in above}
        split_axes = {p for p in parents if p in symmetry.fixed and symmetry.sizes[p] > 1}
        self._summands = [_summands_of(e, symmetry, split_axes) for e in symmetry.expressions_of(name)]
        self.blocks = tuple(
            _block_of(symmetry, name, index, summands, split_axes)
            for index, summands in enumerate(itertools.product(*self._summands))
        )
        self._orders: list[Tensor | None] = []
        for summands in self._summands:
            rows = torch.tensor([row for summand in summands for row in summand.rows], dtype=torch.int64)
            order = rows.argsort()
            self._orders.append(None if torch.equal(order, torch.arange(len(rows))) else order)

    def split(self, x: Tensor) -> list[Tensor]:
        """`(N, *shape, C)` -> `(N, *block.shape, C)` for every block."""
        parts = [x]
        for dim, summands in enumerate(self._summands, 1):
            if len(summands) > 1:
                parts = [_select_rows(part, summand, dim) for part in parts for summand in summands]
        if len(parts) == 1 and x.shape[1:-1] == self.blocks[0].shape:
            return parts
        return [
            part.reshape(x.shape[0], *block.shape, x.shape[-1]) for part, block in zip(parts, self.blocks, strict=True)
        ]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        n, channels = parts[0].shape[0], parts[0].shape[-1]
        combinations = itertools.product(*self._summands)
        flat = [
            part.reshape(n, *(len(summand.rows) for summand in summands), channels)
            for part, summands in zip(parts, combinations, strict=True)
        ]
        for dim in range(len(self._summands), 0, -1):
            count = len(self._summands[dim - 1])
            if count > 1:
                flat = [torch.cat(flat[i : i + count], dim) for i in range(0, len(flat), count)]
                order = self._orders[dim - 1]
                if order is not None:
                    flat = [x.index_select(dim, order.to(x.device)) for x in flat]
        return flat[0]


@dataclass(frozen=True)
class _Summand:
    """A product of axes that is one summand of an expanded dimension.

    Attributes:
        axes: The factors.
        rows: Entries of the dimension that it covers.
        entries: (axis, entry) for the axes that were split into their entries.
    """

    axes: tuple[str, ...]
    rows: tuple[int, ...]
    entries: tuple[tuple[str, int], ...]

    @property
    def span(self) -> tuple[int, int] | None:
        """First row and number of rows, if they are contiguous."""
        start = self.rows[0] if self.rows else 0
        return (start, len(self.rows)) if self.rows == tuple(range(start, start + len(self.rows))) else None


def batch_shape_of(shapes: Mapping[str, tuple[int, ...]], features: Mapping[str, Tensor]) -> torch.Size:
    """The leading dimensions, which all tensors have in common; `shapes` are the last ones, channels included.

    Raises:
        ValueError: The tensors are others, or have other channels or different batch shapes.
    """
    if set(features) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(features)), sorted(set(features) - set(shapes))
        raise ValueError(f"expected the tensors of the symmetry: missing {missing}, not in the symmetry {unknown}")
    common: torch.Size | None = None
    for name, expected in shapes.items():
        shape = features[name].shape
        batch = shape[: -len(expected)]
        if shape[-len(expected) :] != expected or common not in (None, batch):
            raise ValueError(
                f"expected {name!r} of shape (*batch, {', '.join(map(str, expected))}) and the same "
                f"batch for all, found {tuple(shape)} after batch {None if common is None else tuple(common)}"
            )
        common = batch
    return common or torch.Size()


def _select_rows(x: Tensor, summand: _Summand, dim: int) -> Tensor:
    if summand.span is not None:
        return x.narrow(dim, *summand.span)
    return x.index_select(dim, torch.tensor(summand.rows, device=x.device))


def _summands_of(expression: Expression, symmetry: Symmetry, split_axes: set[str]) -> list[_Summand]:
    """Expand an expression into a sum of products."""
    if isinstance(expression, str):
        size = symmetry.sizes[expression]
        if expression in split_axes:
            return [_Summand((), (entry,), ((expression, entry),)) for entry in range(size)]
        return [_Summand((expression,), tuple(range(size)), ())]
    if isinstance(expression, Product):
        summands = [_Summand((), (0,), ())]
        for factor in expression.factors:
            inner = _summands_of(factor, symmetry, split_axes)
            length = sum(len(summand.rows) for summand in inner)
            summands = [
                _Summand(a.axes + b.axes, tuple(i * length + j for i in a.rows for j in b.rows), a.entries + b.entries)
                for a in summands
                for b in inner
            ]
        return summands
    summands, start = [], 0
    for part in expression.parts:
        inner = _summands_of(part, symmetry, split_axes)
        summands += [_Summand(s.axes, tuple(start + row for row in s.rows), s.entries) for s in inner]
        start += sum(len(s.rows) for s in inner)
    return summands


def _block_of(symmetry: Symmetry, name: str, index: int, summands: Sequence[_Summand], split_axes: set[str]) -> Block:
    occurrences = [(axis, dim) for dim, summand in enumerate(summands) for axis in summand.axes]
    entries = [(axis, entry, dim) for dim, summand in enumerate(summands) for axis, entry in summand.entries]
    dims = []
    for axis, dim in occurrences:
        suffixes, parents = [], []
        for parent in (p for p in symmetry.nested.get(axis, ()) if symmetry.sizes[p] > 1):
            if parent in split_axes:
                candidates = [(entry, d) for a, entry, d in entries if a == parent]
                suffixes.append(f"{parent}={_unambiguous(candidates, dim, (name, axis, parent))}")
            else:
                candidates = [(n, d) for n, (a, d) in enumerate(occurrences) if a == parent]
                parents.append(_unambiguous(candidates, dim, (name, axis, parent)))
        size = symmetry.sizes[axis]
        free = axis not in symmetry.fixed and size > 1
        dims.append(BlockDim("@".join([axis, *suffixes]), size, free, tuple(parents) if free else ()))
    return Block(name, index, tuple(dims))


def _unambiguous(candidates: list[tuple[int, int]], dim: int, names: tuple[str, str, str]) -> int:
    """The candidate from the same dimension of the tensor, otherwise the only one.

    Args:
        candidates: (value, dimension of the tensor).
        dim: The dimension of the nested axis.
        names: Tensor, nested axis and parent, for the error.
    """
    nearest = [c for c in candidates if c[1] == dim] or candidates
    if len(nearest) != 1:
        name, axis, parent = names
        raise ValueError(
            f"expected one occurrence of {parent!r}, in which {axis!r} is nested, in {name!r}, found {len(nearest)}; "
            f"give them different names or make {axis!r} fixed"
        )
    return nearest[0][0]
