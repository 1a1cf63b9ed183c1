"""Views of a tensor to another shape, splits of a dimension, and stacks of tensors, in terms of their axes.

Legend: see `nfn_optim.symmetry.axes` for `Dim`, `Dims` and atoms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from nfn_optim.symmetry.axes import Axis, Dim, Dims, Slice, fresh, localise, long_atoms_of, shape_of, size_of
from nfn_optim.symmetry.unification import factorise, fix, partition, slice_dim, unify


def view_as(dims: Dims, shape: Sequence[int]) -> Dims:
    """The dimensions of a tensor after a view to another shape.

    Axes are fixed where a new dimension ends in the middle of an axis that cannot be factorised there.

    Args:
        dims: The dimensions of the tensor.
        shape: The new shape, with the same number of entries.

    Raises:
        ValueError: The numbers of entries differ.
    """
    if math.prod(shape_of(dims)) != math.prod(shape):
        raise ValueError(f"expected a view of {shape_of(dims)}, found {tuple(shape)}")
    if 0 in shape:
        fix(*dims)
        return fresh(shape, fixed=True)
    pending = list(long_atoms_of(*dims))
    viewed: list[Dim] = []
    for d, size in enumerate(shape):
        factors: list[Axis] = []
        missing = size  # the product of the factors that the new dimension still lacks
        while missing > 1:
            axis = pending.pop(0)
            if missing % axis.size != 0:
                product = _as_product(axis, missing) if axis.size % missing == 0 else None
                if product is None:
                    misaligned = (*factors, axis, *pending)
                    count, stop = _next_common_boundary(misaligned, shape[d:])
                    fix(misaligned[:count])
                    rest = view_as((misaligned[count:],), shape[d + stop :])
                    return (*viewed, *fresh(shape[d : d + stop], fixed=True), *rest)
                pending = [*long_atoms_of(product), *pending]
                axis = pending.pop(0)
            factors.append(axis)
            missing //= axis.size
        viewed.append(tuple(factors))
    return tuple(viewed)


def _next_common_boundary(atoms: Dim, shape: Sequence[int]) -> tuple[int, int]:
    """The smallest numbers of leading atoms and of leading dimensions of the shape with the same product of sizes."""
    count = stop = 1
    atoms_size, shape_size = atoms[0].size, shape[0]
    while atoms_size != shape_size:
        if atoms_size < shape_size:
            atoms_size, count = atoms_size * atoms[count].size, count + 1
        else:
            shape_size, stop = shape_size * shape[stop], stop + 1
    return count, stop


def _as_product(axis: Axis, size: int) -> Dim | None:
    """An atom as the product of a slow dimension of `size` entries and a fast one; None if it is not one."""
    if axis.parts is None:
        factorise(axis, size)
        return (axis,)
    length = axis.size // size
    blocks = [slice_dim((axis,), start, start + length) for start in range(0, axis.size, length)]
    if any(block is None for block in blocks):
        return None
    index, (block_dim,) = stack_dims([(block.dim,) for block in blocks if block is not None])
    return (index, *block_dim)


def stack_dims(tensors: Sequence[Dims]) -> tuple[Axis, Dims]:
    """The dimensions of tensors of one shape after stacking.

    Returns:
        The axis along which they are stacked, and the other dimensions, which may be different for each entry of it.
    """
    index, dims = Axis(len(tensors)), fresh(shape_of(tensors[0]))
    index.fast_axes = [axis for (axis,) in dims]
    partition(index, [1] * len(tensors))
    for i, tensor in enumerate(tensors):
        for stacked, dim in zip(dims, tensor, strict=True):
            unify(localise(stacked, [(index, i)]), dim)
    return index, dims


def split_dim(dim: Dim, sizes: Sequence[int]) -> list[Slice] | None:
    """The slices of these sizes, which add up to the length of the dimension; None as for `slice_dim`."""
    sizes = [size for size in sizes if size]
    head, *rest = long_atoms_of(dim) or (Axis(1),)
    inner = size_of(tuple(rest))
    if head.parts is None and not head.fixed and len(sizes) > 1 and all(size % inner == 0 for size in sizes):
        partition(head, [size // inner for size in sizes])
    stops = list(itertools.accumulate(sizes))
    slices = [slice_dim(dim, stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
    return [part for part in slices if part is not None] if None not in slices else None
