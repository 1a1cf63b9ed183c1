"""What a block hears: values over some of its neurons, added along all the others.

The values are added from small to large, each into the smallest that covers it, so that the block itself is written
once for every neuron axis; in place, since nothing else holds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nfn_optim.layers.block import Block
from nfn_optim.layers.equality_pattern import View
from nfn_optim.layers.mixing import add_into

Term = tuple[View, Tensor]
"""By which view, `(N, *kept classes, P * C)`."""


def spread(block: Block, whole: Term, terms: Sequence[Term], shared: bool) -> Tensor:
    """Sum up what a block hears.

    Args:
        block: Which block.
        whole: The term that keeps every atom.
        terms: All the others.
        shared: Whether the tensor of `whole` must not be written to.

    Returns:
        `(N, *atoms, C)`.
    """
    view, out = whole  # (N, *free atoms in the order kept, P * C)
    order = [view.classes[n][0] for n in view.kept]
    for value in _folded([_placed(block, order, term, value) for term, value in terms]):
        out, shared = (out + value if shared else add_into(out, value)), False
    return _laid_out(block, out, order)


def _placed(block: Block, order: list[int], view: View, value: Tensor) -> Tensor:
    """One dimension for every atom of `order`, of one entry where nothing depends on it; zero off the diagonals."""
    value = _aligned(value, [view.classes[n][0] for n in view.kept], order)
    for members in view.classes:
        size = block.atoms[members[0]].size
        for other in members[1:]:
            shape = [size if label in (members[0], other) else 1 for label in order]
            value = value * torch.eye(size, device=value.device, dtype=value.dtype).reshape(1, *shape, 1)
    return value


def _aligned(value: Tensor, kept: list[int], order: list[int]) -> Tensor:
    """One dimension for every label of `order`, of one entry where it is not kept. The last dimension stays."""
    sequence = [kept.index(label) for label in order if label in kept]
    if sequence != sorted(sequence):
        value = value.permute(0, *(1 + place for place in sequence), value.dim() - 1)
    shape, sizes = [value.shape[0]], iter(value.shape[1:-1])
    shape += [next(sizes) if label in kept else 1 for label in order]
    return value.reshape(*shape, value.shape[-1])


def _folded(values: list[Tensor]) -> list[Tensor]:
    """Add small values into larger ones that they fit in."""
    pending = sorted(values, key=torch.Tensor.numel)
    found = []
    while pending:
        value = pending.pop(0)
        for n, other in enumerate(pending):
            if all(own in (1, length) for own, length in zip(value.shape, other.shape, strict=True)):
                pending[n] = other + value
                break
        else:
            found.append(value)
    return found


def _laid_out(block: Block, out: Tensor, order: list[int]) -> Tensor:
    """`(N, *order, P * C)` -> `(N, *atoms, C)`."""
    labels = [*order, *block.fixed]
    if block.fixed:
        sizes = [block.atoms[n].size for n in block.fixed]
        channels = out.shape[-1] // block.positions
        out = out.reshape(*out.shape[:-1], *sizes, channels)
    wanted = list(range(len(block.atoms)))
    if labels == wanted:
        return out
    return out.permute(0, *(1 + labels.index(n) for n in wanted), out.dim() - 1)
