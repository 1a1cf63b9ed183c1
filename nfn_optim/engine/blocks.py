"""Blocks: the tensors of a network as the arrays `(*batch, rows, rest)` that the passes over the weights read.

A matrix or a kernel is a block by itself: its first dimension, and all others in memory order. All vectors and scalars
of a network form one block, row after row, with a rest of 1, since they are many and small. Without a batch, small
matrices of one shape may be stacked, `(count, rows, rest)`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

MAX_STACK = 2**18  # entries of small matrices that are stacked in one block

Sums = tuple[list[Tensor], Tensor]
"""Sums over one tensor: for every dimension over the rest, `(*batch, shape[d], C)`; and over all, `(*batch, C)`."""


@lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cached constant tensor; copying numbers to a device synchronises."""
    return torch.tensor(values, dtype=dtype, device=device)


@dataclass(frozen=True)
class Matrix:
    """One tensor of two dimensions or more.

    Attributes:
        index: Of the tensor in the network.
        batch: Sizes of the batch dimensions.
        order: Its dimensions as they lie in memory, the first one first.
        sizes: Their sizes.
    """

    index: int
    batch: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """Of the tensors in the block."""
        return (self.index,)

    def fold(self, tensors: Sequence[Tensor]) -> Tensor:
        """`(*batch, *shape) -> (*batch, rows, rest)`, a view where that can be."""
        (x,) = tensors
        x = x.permute(*range(len(self.batch)), *(len(self.batch) + d for d in self.order))
        return x.reshape(*self.batch, self.sizes[0], math.prod(self.sizes[1:]))

    def unfold(self, array: Tensor) -> list[Tensor]:
        """The inverse of `fold`."""
        x = array.reshape(*self.batch, *self.sizes)
        return [
            x.permute(*range(len(self.batch)), *(len(self.batch) + self.order.index(d) for d in sorted(self.order)))
        ]

    def gather_rows(self, values: Sequence[Tensor]) -> Tensor:
        """Values of each tensor's rows, `(*batch, rows, C)` each, for the rows of the array."""
        return values[0]

    def expand_to_rows(self, value: Tensor) -> Tensor:
        """Values of all tensors, `(*batch, T, C)`, for the rows of the array: `(*batch, 1, C)`."""
        return value[..., self.index : self.index + 1, :]

    def sums(self, by_row: Tensor, by_column: Tensor) -> dict[int, Sums]:
        """Sums by tensor, from those over rows `(*batch, rows, C)` and over columns `(*batch, rest, C)`."""
        sums = {0: by_row}
        taps = torch.unflatten(by_column, -2, self.sizes[1:])  # (*batch, *sizes[1:], C)
        dims = range(len(self.batch), taps.dim() - 1)
        for dim, d in zip(dims, self.order[1:], strict=True):
            others = [other for other in dims if other != dim]
            sums[d] = taps.sum(others) if others else taps
        return {self.index: ([sums[d] for d in sorted(sums)], by_row.sum(-2))}

    def fold_basis(self, basis: Tensor) -> Tensor:
        """`(*batch, *shape[1:], k) -> (*batch, rest, k)`, for the columns of the array."""
        return basis.permute(*self._columns(), -1).reshape(*self.batch, math.prod(self.sizes[1:]), basis.shape[-1])

    def unfold_basis(self, basis: Tensor) -> Tensor:
        """The inverse of `fold_basis`."""
        columns = self._columns()
        x = basis.reshape(*self.batch, *self.sizes[1:], basis.shape[-1])
        return x.permute(*(columns.index(d) for d in range(len(columns))), -1)

    def _columns(self) -> list[int]:
        """The dimensions of a basis in memory order, without the last one."""
        return [*range(len(self.batch)), *(len(self.batch) + d - 1 for d in self.order[1:])]

    def gain(self, gains: Sequence[Sequence[Tensor]]) -> Tensor:
        """The product of the gains of all dimensions but the first, `(*batch, shape[d])` each: `(*batch, 1, rest)`."""
        first, *others = (gains[0][d - 1] for d in self.order[1:])
        for other in others:
            first = (first.unsqueeze(-1) * other.unsqueeze(-2)).flatten(-2)
        return first.unsqueeze(-2)


@dataclass(frozen=True)
class Vectors:
    """All tensors of at most one dimension.

    Attributes:
        indices: Of the tensors in the network.
        batch: Sizes of the batch dimensions.
        shapes: Their shapes.
    """

    indices: tuple[int, ...]
    batch: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def lengths(self) -> list[int]:
        """Their numbers of rows."""
        return [sum(shape) if shape else 1 for shape in self.shapes]

    def fold(self, tensors: Sequence[Tensor]) -> Tensor:
        """`(*batch, *shape)` each `-> (*batch, rows, 1)`."""
        return torch.cat([x.reshape(*self.batch, -1) for x in tensors], -1).unsqueeze(-1)

    def unfold(self, array: Tensor) -> list[Tensor]:
        """The inverse of `fold`."""
        parts = torch.split(array.squeeze(-1), self.lengths, -1)
        return [x.reshape((*self.batch, *shape)) for x, shape in zip(parts, self.shapes, strict=True)]

    def gather_rows(self, values: Sequence[Tensor]) -> Tensor:
        """Values of each tensor's rows, `(*batch, rows, C)` each, for the rows of the array."""
        return torch.cat(list(values), -2)

    def expand_to_rows(self, value: Tensor) -> Tensor:
        """Values of all tensors, `(*batch, T, C)`, for the rows of the array: `(*batch, rows, C)`."""
        parts = [value[..., n : n + 1, :] for n in self.indices]
        return torch.cat([x.expand(*x.shape[:-2], n, -1) for x, n in zip(parts, self.lengths, strict=True)], -2)

    def sums(self, by_row: Tensor, by_column: Tensor) -> dict[int, Sums]:
        """Sums by tensor, from those over rows `(*batch, rows, C)`; those over columns mix tensors."""
        del by_column
        parts = torch.split(by_row, self.lengths, -2)
        sums = (([x] * len(shape), x.sum(-2)) for x, shape in zip(parts, self.shapes, strict=True))
        return dict(zip(self.indices, sums, strict=True))

    def gain(self, gains: Sequence[Sequence[Tensor]]) -> None:
        """Vectors have no columns."""
        del gains


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape, stacked; there is no batch.

    Attributes:
        indices: Of the tensors in the network.
        each: The layout of one of them, with the stack as its batch.
    """

    indices: tuple[int, ...]
    each: Matrix

    @property
    def batch(self) -> tuple[int, ...]:
        """Their number, as a shape."""
        return self.each.batch

    def fold(self, tensors: Sequence[Tensor]) -> Tensor:
        """`shape` each `-> (count, rows, rest)`."""
        return self.each.fold([torch.stack(list(tensors))])

    def unfold(self, array: Tensor) -> list[Tensor]:
        """The inverse of `fold`."""
        return list(self.each.unfold(array)[0].unbind())

    def gather_rows(self, values: Sequence[Tensor]) -> Tensor:
        """Values of each tensor's rows, `(rows, C)` each, for the rows of the array; bases likewise."""
        return torch.stack(list(values))

    def expand_to_rows(self, value: Tensor) -> Tensor:
        """Values of all tensors, `(T, C)`, for the rows of the array: `(count, 1, C)`."""
        return value.index_select(0, constant(self.indices, torch.int64, value.device)).unsqueeze(-2)

    def sums(self, by_row: Tensor, by_column: Tensor) -> dict[int, Sums]:
        """Sums by tensor, from those over rows `(count, rows, C)` and over columns `(count, rest, C)`."""
        rows, whole = self.each.sums(by_row, by_column)[self.each.index]
        parts = zip(*(x.unbind() for x in rows), strict=True)
        return {i: (list(part), x) for i, part, x in zip(self.indices, parts, whole.unbind(), strict=True)}

    def fold_basis(self, basis: Tensor) -> Tensor:
        """`(count, *shape[1:], k) -> (count, rest, k)`."""
        return self.each.fold_basis(basis)

    def unfold_basis(self, basis: Tensor) -> Tensor:
        """The inverse of `fold_basis`."""
        return self.each.unfold_basis(basis)

    def gain(self, gains: Sequence[Sequence[Tensor]]) -> Tensor:
        """The product of the gains of all dimensions but the first, `(shape[d],)` each: `(count, 1, rest)`."""
        return self.each.gain([[torch.stack(x) for x in zip(*gains, strict=True)]])


Layout = Matrix | Vectors | Stack


def layouts_of(
    params: Sequence[Tensor], batch_dims: int, stack_below: int = 0, kinds: Sequence[object] | None = None
) -> list[Layout]:
    """Assign the tensors of a network to blocks.

    Args:
        params: Tensors `(*batch, *shape)`.
        batch_dims: How many leading dimensions are batch.
        stack_below: Matrices of at most this many entries are stacked with others of their shape; no batch.
        kinds: For every tensor a value that must agree within a block, such as its dtype; None if all may share one.
    """
    batch = tuple(params[0].shape[:batch_dims])
    kinds = kinds or [None] * len(params)
    small: dict[object, list[int]] = {}
    matrices: list[Layout] = []
    for i, p in enumerate(params):
        if p.dim() - batch_dims < 2:  # noqa: PLR2004 - a matrix has two dimensions
            small.setdefault(kinds[i], []).append(i)
            continue
        order = list(range(p.dim() - batch_dims))
        if not p.is_contiguous():
            order[1:] = sorted(order[1:], key=lambda d, p=p: -p.stride(d + batch_dims))  # type: ignore[misc]
        matrices.append(Matrix(i, batch, tuple(order), tuple(p.shape[batch_dims + d] for d in order)))
    vectors = (
        Vectors(tuple(some), batch, tuple(tuple(params[i].shape[batch_dims:]) for i in some)) for some in small.values()
    )
    layouts = [*vectors, *matrices]
    return _stacked(layouts, params, stack_below, kinds) if stack_below else layouts


def _stacked(layouts: Sequence[Layout], params: Sequence[Tensor], size: int, kinds: Sequence[object]) -> list[Layout]:
    """Stack small matrices of one shape."""
    stacked: list[Layout] = []
    alike: dict[object, list[Matrix]] = {}
    for layout in layouts:
        if isinstance(layout, Matrix) and math.prod(layout.sizes) <= size:
            kind = layout.order, layout.sizes, params[layout.index].dtype, kinds[layout.index]
            alike.setdefault(kind, []).append(layout)
        else:
            stacked.append(layout)
    for several in alike.values():
        count = max(MAX_STACK // max(math.prod(several[0].sizes), 1), 1)
        for some in (several[first : first + count] for first in range(0, len(several), count)):
            indices = tuple(layout.index for layout in some)
            stacked.append(Stack(indices, replace(some[0], batch=(len(some),))) if len(some) > 1 else some[0])
    return stacked


@dataclass(frozen=True)
class Block:
    """The tensors of a layout, and the arrays of them.

    Attributes:
        layout: Which tensors, in which form.
        tensors: For parameter, gradient and every moment the tensors `(*batch, *shape)`.
        arrays: Parameters, gradients, moments as arrays `(*batch, rows, rest)`, and `constants` for their rows.
    """

    layout: Layout
    tensors: tuple[tuple[Tensor, ...], ...]
    arrays: tuple[Tensor, Tensor, list[Tensor], Tensor]

    @classmethod
    def of(cls, layout: Layout, tensors: Sequence[Sequence[Tensor]], constants: Tensor) -> Block:
        """Arrange tensors as arrays.

        Args:
            layout: Which, in which form.
            tensors: For every tensor of the network its parameter, gradient and moments.
            constants: `(*batch, T, 6)`.
        """
        kinds = tuple(zip(*(tensors[i] for i in layout.indices), strict=True))
        p, g, *moments = (layout.fold(kind) for kind in kinds)
        return cls(layout, kinds, (p, g, moments, layout.expand_to_rows(constants)))

    def write_back(self, frozen: Collection[int]) -> None:
        """Copy parameters and moments back to their tensors where the arrays are not views of them.

        Args:
            frozen: Indices of tensors whose parameter does not change.
        """
        torch.autograd.graph.increment_version(self.tensors[0])  # compiled passes do not
        p, _, moments, _ = self.arrays
        ps, _, *kinds = self.tensors
        pairs: list[tuple[Tensor, Tensor]] = []
        for kind, array in zip((ps, *kinds), (p, *moments), strict=True):
            if array.data_ptr() != kind[0].data_ptr():
                values = zip(self.layout.indices, kind, self.layout.unfold(array), strict=True)
                pairs += [(old, value) for i, old, value in values if kind is not ps or i not in frozen]
        if pairs:
            torch._foreach_copy_([old for old, _ in pairs], [value for _, value in pairs])


def blocks_of(
    tensors: Sequence[Sequence[Tensor]], constants: Tensor, batch_dims: int, stack_below: int = 0
) -> list[Block]:
    """The blocks of a network; arguments as of `Block.of` and `layouts_of`."""
    layouts = layouts_of([x[0] for x in tensors], batch_dims, stack_below, [x[-1].dtype for x in tensors])
    return [Block.of(layout, tensors, constants) for layout in layouts]
