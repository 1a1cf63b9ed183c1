"""Tensors of which every process holds a part: what they say together, and what of it concerns this process.

Under FSDP2 and tensor parallelism parameters are DTensors. This process has, of a tensor of shape `shape`, the entries

    spans[d].start ... spans[d].stop        of every dimension d

and a rule's passes over the weights run on these alone. Between the passes stands what rows, columns and tensors say to
each other; that costs O(neurons), and every process does all of it. So means are all that has to be communicated: each
process adds its share of the mean of every row and every tensor, zero where it has none of it,

    mean of row r  =  sum over processes of  (entries of r here / entries of r) x mean of r here

in one all-reduce for the whole network. It makes no difference how the tensors were divided, evenly or not. Orthogonal
directions (`nfn_optim.rule.subspace`) are sums over processes in the same way.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from nfn_optim.engine.blocks import Pooled

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True)
class Shard:
    """The part of one tensor that is here.

    Attributes:
        mesh: The processes that hold the tensor.
        shape: Of the whole tensor.
        spans: Which entries of every dimension are here.
        counts: Whether this part is the one to be counted of several copies.
    """

    mesh: DeviceMesh
    shape: tuple[int, ...]
    spans: tuple[slice, ...]
    counts: bool

    def share(self, pooled: Pooled) -> list[Tensor]:
        """What this part adds to the means over the whole tensor, those of every dimension first."""
        rows, whole = pooled
        lengths = [span.stop - span.start for span in self.spans]
        if not self.counts or 0 in lengths:
            return [*(whole.new_zeros((size, *whole.shape)) for size in self.shape), torch.zeros_like(whole)]
        fractions = [length / size for length, size in zip(lengths, self.shape, strict=True)]
        shares = []
        for d, (means, span) in enumerate(zip(rows, self.spans, strict=True)):
            share = means.new_zeros((self.shape[d], *means.shape[1:]))
            share[span] = means * math.prod(fractions[:d] + fractions[d + 1 :])
            shares.append(share)
        return [*shares, whole * math.prod(fractions)]

    def placed(self, value: Tensor, first: int, last: int) -> Tensor:
        """What this process adds to a sum that has the dimensions `first` to `last` of the tensor.

        Args:
            value: For the part that is here, `(*lengths of spans[first:last], ...)`.
            first: A dimension.
            last: One past another.

        Returns:
            `(*shape[first:last], ...)`, zero but for the part.
        """
        whole = value.new_zeros((*self.shape[first:last], *value.shape[last - first :]))
        if self.counts:
            whole[self.spans[first:last]] = value
        return whole


@dataclass(frozen=True)
class Shards:
    """The parts that are here of those tensors of a network that are divided.

    Attributes:
        by_name: Name -> part; other tensors are whole on every process.
    """

    by_name: Mapping[str, Shard]

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> Shards | None:
        """The parts of parameters; None if all of them are whole."""
        by_name = {name: shard_of(p) for name, p in params.items() if is_divided(p)}
        return cls(by_name) if by_name else None

    def gather(self, names: Sequence[str], pooled: Sequence[Pooled]) -> list[Pooled]:
        """Means over the whole tensors, on every process the same; one all-reduce for each mesh.

        Args:
            names: Of the tensors, the same on every process.
            pooled: Means over the parts that are here.
        """
        found = dict(zip(names, pooled, strict=True))
        shares = {name: shard.share(found[name]) for name, shard in self.by_name.items()}
        for name, (*rows, whole) in self.added(shares).items():
            found[name] = rows, whole
        return list(found.values())

    def added(self, shares: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
        """Sums over all processes that hold a part of a tensor; one all-reduce for each mesh.

        Args:
            shares: Name -> what this process adds, the same names and shapes on every process; of tensors that are
                not divided, what is returned as it is.
        """
        found = {name: list(share) for name, share in shares.items()}
        for mesh in dict.fromkeys(shard.mesh for shard in self.by_name.values()):
            mine = [name for name in shares if name in self.by_name and self.by_name[name].mesh == mesh]
            parts = [part for name in mine for part in shares[name]]
            if not parts:
                continue
            flat = _reduced(torch.cat([part.flatten() for part in parts]), mesh, dist.ReduceOp.SUM)
            sums = iter(torch.split(flat, [part.numel() for part in parts]))
            for name in mine:
                found[name] = [next(sums).reshape(part.shape) for part in shares[name]]
        return found

    def part(self, name: str, dim: int) -> slice:
        """Which entries of a dimension are here."""
        shard = self.by_name.get(name)
        return shard.spans[dim] if shard is not None and shard.spans else slice(None)


def is_divided(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor. Nobody has one who has not imported their module, so neither do we."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The part of a tensor that is here, sharing its memory; a plain tensor as it is.

    Args:
        tensor: Perhaps a DTensor.
        like: Divide it as this one first: a gradient as its parameter.
    """
    if not is_divided(tensor):
        return tensor
    if like is not None and is_divided(like) and tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    part: Tensor = tensor.to_local()
    return part


def everywhere(condition: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether a condition holds on every process that has a part of one of these tensors."""
    for mesh in dict.fromkeys(t.device_mesh for t in tensors if is_divided(t)):
        condition = bool(_reduced(torch.tensor(float(condition)), mesh, dist.ReduceOp.MIN).item())
    return condition


def shard_of(tensor: DTensor) -> Shard:
    """The part of a DTensor that is here."""
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    return Shard(mesh, shape, *_place(mesh, tensor.placements, shape))


@lru_cache(maxsize=4096)
def _place(
    mesh: DeviceMesh, placements: tuple[Placement, ...], shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], bool]:
    """The spans of a part, and whether it counts."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415 - see is_divided

    lengths, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    spans = tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))
    where = mesh.get_coordinate() or [0] * mesh.ndim
    copies = [place for place, placement in zip(where, placements, strict=True) if not placement.is_shard()]
    return spans, not any(copies)


def _reduced(value: Tensor, mesh: DeviceMesh, op: dist.ReduceOp.RedOpType) -> Tensor:
    """Combine a tensor over all processes of a mesh."""
    there = value.to(mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(there, op, mesh.get_group(dim))
    return there.to(value.device)
