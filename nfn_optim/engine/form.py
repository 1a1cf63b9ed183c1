"""How a tensor is seen: as one tensor, or as several that lie in one memory.

    (experts, out, in)     a stack: the tensors at every entry of one dimension
    (q + k + v, in)        parts: slices of one dimension

Every *member* is a matrix (a vector, a kernel) of its own: it has its own statistics, scale, direction and state, and
nothing of it depends on its being stored with others. Members are views; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nfn_optim.engine.sharding import Shard


@dataclass(frozen=True)
class Form:
    """The members of a tensor.

    Attributes:
        stack: The dimension along which they are stacked, and its size; None if they are not.
        parts: A dimension, of those that remain, and the sizes of its slices; None if it is not divided.
    """

    stack: tuple[int, int] | None = None
    parts: tuple[int, tuple[int, ...]] | None = None

    @property
    def count(self) -> int:
        """Number of members."""
        return (self.stack[1] if self.stack else 1) * (len(self.parts[1]) if self.parts else 1)

    def members_of(self, tensor: Tensor, batch_dims: int = 0) -> list[Tensor]:
        """Views of the members of a tensor `(*batch, *shape)`."""
        members = [tensor]
        if self.stack is not None:
            members = [tensor.select(batch_dims + self.stack[0], i) for i in range(self.stack[1])]
        if self.parts is not None:
            dim, sizes = self.parts
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            slices = list(zip(starts, sizes, strict=True))
            members = [x.narrow(batch_dims + dim, start, size) for x in members for start, size in slices]
        return members

    def join(self, members: Sequence[Tensor], batch_dims: int = 0) -> Tensor:
        """The inverse of `members_of`; differentiable."""
        if self.parts is not None:
            dim, n = self.parts[0] + batch_dims, len(self.parts[1])
            members = [torch.cat(list(members[i : i + n]), dim) for i in range(0, len(members), n)]
        return members[0] if self.stack is None else torch.stack(list(members), self.stack[0] + batch_dims)

    def local_members_of(self, tensor: Tensor, shard: Shard) -> list[tuple[Tensor, Shard]]:
        """Views of the local parts of the members of a sharded tensor; empty ones where nothing is local."""
        members = [(tensor, shard)]
        if self.stack is not None:
            members = [_select(tensor, shard, self.stack[0], i) for i in range(self.stack[1])]
        if self.parts is not None:
            dim, sizes = self.parts
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            slices = list(zip(starts, sizes, strict=True))
            members = [_narrow(x, of_x, dim, start, size) for x, of_x in members for start, size in slices]
        return members


def _select(tensor: Tensor, shard: Shard, dim: int, entry: int) -> tuple[Tensor, Shard]:
    """The local part of one entry of a dimension."""
    span, shape = shard.spans[dim], shard.shape[:dim] + shard.shape[dim + 1 :]
    spans = shard.spans[:dim] + shard.spans[dim + 1 :]
    if span.start <= entry < span.stop:
        return tensor.select(dim, entry - span.start), replace(shard, shape=shape, spans=spans)
    spans = (slice(0, 0), *spans[1:])
    local = tensor.new_empty([s.stop - s.start for s in spans])
    return local, replace(shard, shape=shape, spans=spans)


def _narrow(tensor: Tensor, shard: Shard, dim: int, start: int, size: int) -> tuple[Tensor, Shard]:
    """The local part of a slice of a dimension."""
    span = shard.spans[dim]
    first = min(max(span.start, start), start + size)
    last = max(min(span.stop, start + size), first)
    local = tensor.narrow(dim, first - span.start if last > first else 0, last - first)
    spans = (*shard.spans[:dim], slice(first - start, last - start), *shard.spans[dim + 1 :])
    shape = (*shard.shape[:dim], size, *shard.shape[dim + 1 :])
    return local, replace(shard, shape=shape, spans=spans)
