"""Tensors sharded over several processes: reductions over whole tensors, and the slices that are local.

Under FSDP2 and tensor parallelism parameters are DTensors. Of a tensor of shape `shape`, this process holds the entries

    spans[d].start ... spans[d].stop        of every dimension d

and the passes over the weights run on these alone. What lies between the passes costs O(neurons), and every process
computes all of it. Only sums over rows and tensors have to be communicated: each process contributes those over its own
entries, zero where it holds none, in one all-reduce for the whole network. How tensors are sharded, evenly or not,
makes no difference. Projections onto subspaces (`nfn_optim.rule.subspace`) are sums over processes in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from nfn_optim.engine.blocks import Sums

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True)
class Shard:
    """The local part of one tensor.

    Attributes:
        mesh: The processes that hold the tensor.
        shape: Of the whole tensor.
        spans: The local entries of every dimension.
        is_primary: Whether this part is the one that counts among replicas.
    """

    mesh: DeviceMesh
    shape: tuple[int, ...]
    spans: tuple[slice, ...]
    is_primary: bool

    def partial_sums(self, sums: Sums) -> list[Tensor]:
        """The contribution of this part to the sums over the whole tensor, those of every dimension first."""
        by_dim, whole = sums
        padded = [self.pad_to_whole(x, d, d + 1) for d, x in enumerate(by_dim)]
        return [*padded, whole if self.is_primary else torch.zeros_like(whole)]

    def pad_to_whole(self, value: Tensor, first: int, last: int) -> Tensor:
        """The contribution of this process to a sum with the dimensions `first` to `last` of the tensor.

        Args:
            value: Of the local part, `(*lengths of spans[first:last], ...)`.
            first: A dimension.
            last: One past another.

        Returns:
            `(*shape[first:last], ...)`, zero outside of the local part.
        """
        whole = value.new_zeros((*self.shape[first:last], *value.shape[last - first :]))
        if self.is_primary:
            whole[self.spans[first:last]] = value
        return whole


@dataclass(frozen=True)
class Shards:
    """The local parts of the sharded tensors of a network.

    Attributes:
        by_name: Name -> local part; other tensors are whole on every process.
    """

    by_name: Mapping[str, Shard]

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> Shards | None:
        """The local parts of parameters; None if none is sharded."""
        by_name = {name: shard_of(p) for name, p in params.items() if is_sharded(p)}
        return cls(by_name) if by_name else None

    def reduce_sums(self, names: Sequence[str], sums: Sequence[Sums]) -> list[Sums]:
        """Sums over the whole tensors, on every process the same; one all-reduce for each mesh.

        Args:
            names: Of the tensors, the same on every process.
            sums: Over the local parts.
        """
        by_name = dict(zip(names, sums, strict=True))
        partials = {name: shard.partial_sums(by_name[name]) for name, shard in self.by_name.items()}
        for name, (*by_dim, whole) in self.all_reduce(partials).items():
            by_name[name] = by_dim, whole
        return list(by_name.values())

    def all_reduce(self, partials: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
        """Sums over all processes that hold a part of a tensor; one all-reduce for each mesh.

        Args:
            partials: Name -> contributions of this process, the same names and shapes on every process; those of
                tensors that are not sharded are returned unchanged.
        """
        sums = {name: list(tensors) for name, tensors in partials.items()}
        for mesh in dict.fromkeys(shard.mesh for shard in self.by_name.values()):
            names = [name for name in partials if name in self.by_name and self.by_name[name].mesh == mesh]
            parts = [part for name in names for part in partials[name]]
            if not parts:
                continue
            flat = _reduced(torch.cat([part.flatten() for part in parts]), mesh, dist.ReduceOp.SUM)
            reduced = iter(torch.split(flat, [part.numel() for part in parts]))
            for name in names:
                sums[name] = [next(reduced).reshape(part.shape) for part in partials[name]]
        return sums

    def local_slice(self, name: str, dim: int) -> slice:
        """The local entries of a dimension."""
        shard = self.by_name.get(name)
        return shard.spans[dim] if shard is not None and shard.spans else slice(None)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor; checked without importing DTensor, which is slow."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The local part of a tensor, sharing its memory; a plain tensor unchanged.

    Args:
        tensor: Perhaps a DTensor.
        like: Redistribute it like this one first: a gradient like its parameter.
    """
    if not is_sharded(tensor):
        return tensor
    if like is not None and is_sharded(like) and tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    part: Tensor = tensor.to_local()
    return part


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor on every process that has a part of it; a plain tensor unchanged."""
    if not is_sharded(tensor):
        return tensor
    contribution = shard_of(tensor).pad_to_whole(local(tensor.detach()), 0, tensor.dim())
    return _reduced(contribution, tensor.device_mesh, dist.ReduceOp.SUM)


def all_processes(condition: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether a condition holds on every process that has a part of one of these tensors."""
    for mesh in dict.fromkeys(t.device_mesh for t in tensors if is_sharded(t)):
        condition = bool(_reduced(torch.tensor(float(condition)), mesh, dist.ReduceOp.MIN).item())
    return condition


def shard_of(tensor: DTensor) -> Shard:
    """The local part of a DTensor."""
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    return Shard(mesh, shape, *_spans(mesh, tensor.placements, shape))


@lru_cache(maxsize=4096)
def _spans(
    mesh: DeviceMesh, placements: tuple[Placement, ...], shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], bool]:
    """The spans of the local part, and whether it is primary."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415 - see is_sharded

    lengths, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    spans = tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    replicas = [i for i, placement in zip(coordinate, placements, strict=True) if not placement.is_shard()]
    return spans, not any(replicas)


def _reduced(value: Tensor, mesh: DeviceMesh, op: dist.ReduceOp.RedOpType) -> Tensor:
    """Reduce a tensor over all processes of a mesh."""
    on_mesh = value.to(mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(on_mesh, op, mesh.get_group(dim))
    return on_mesh.to(value.device)
