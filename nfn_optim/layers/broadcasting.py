"""Sums of pooled values that are broadcast back to a block, the adjoint of pooling.

Values are added from small to large, each to the smallest one that it broadcasts to, so that the block itself is
written once per axis; in place where the memory is not shared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nfn_optim.layers.block import Block
from nfn_optim.layers.equality_pattern import EqualityPattern
from nfn_optim.layers.mixing import add_into

Addend = tuple[EqualityPattern, Tensor]
"""A pattern of the block, and values on its kept classes, `(N, *kept classes, P * C)`."""


def broadcast_sum(block: Block, whole: Addend, others: Sequence[Addend], in_place: bool) -> Tensor:
    """Broadcast values to a block and sum them up.

    Args:
        block: The block.
        whole: The values of the identity pattern.
        others: The values of other patterns: zero off the diagonals, constant along classes that are not kept.
        in_place: Whether the tensor of `whole` may be overwritten.

    Returns:
        `(N, *block.shape, C)`.
    """
    pattern, out = whole  # (N, *free dims in the order of the pattern, P * C)
    order = pattern.kept_dims
    for value in _merge_small([_expand_dims(block, order, other) for other in others]):
        out, in_place = (add_into(out, value) if in_place else out + value), True
    return _restore_dims(block, out, order)


def _expand_dims(block: Block, order: list[int], addend: Addend) -> Tensor:
    """One dimension per dimension in `order`, of size 1 where the values are constant; zero off the diagonals."""
    pattern, value = addend
    value = _align(value, pattern.kept_dims, order)
    for members in pattern.classes:
        size = block.dims[members[0]].size
        for other in members[1:]:
            shape = [size if d in (members[0], other) else 1 for d in order]
            value = value * torch.eye(size, device=value.device, dtype=value.dtype).reshape(1, *shape, 1)
    return value


def _align(value: Tensor, kept: list[int], order: list[int]) -> Tensor:
    """`(N, *kept, C)` to one dimension per dimension in `order`, of size 1 where it is not kept."""
    sequence = [kept.index(d) for d in order if d in kept]
    if sequence != sorted(sequence):
        value = value.permute(0, *(1 + n for n in sequence), value.dim() - 1)
    sizes = iter(value.shape[1:-1])
    return value.reshape(value.shape[0], *(next(sizes) if d in kept else 1 for d in order), value.shape[-1])


def _merge_small(values: list[Tensor]) -> list[Tensor]:
    """Add every value to the smallest larger one that it broadcasts to, if there is any."""
    pending = sorted(values, key=torch.Tensor.numel)
    merged = []
    while pending:
        value = pending.pop(0)
        for n, other in enumerate(pending):
            if all(own in (1, size) for own, size in zip(value.shape, other.shape, strict=True)):
                pending[n] = other + value
                break
        else:
            merged.append(value)
    return merged


def _restore_dims(block: Block, out: Tensor, order: list[int]) -> Tensor:
    """`(N, *order, P * C)` -> `(N, *block.shape, C)`."""
    labels = [*order, *block.fixed_dims]
    if block.fixed_dims:
        sizes = [block.dims[d].size for d in block.fixed_dims]
        out = out.reshape(*out.shape[:-1], *sizes, out.shape[-1] // block.num_positions)
    wanted = list(range(len(block.dims)))
    if labels == wanted:
        return out
    return out.permute(0, *(1 + labels.index(d) for d in wanted), out.dim() - 1)
