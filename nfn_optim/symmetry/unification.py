"""A union-find of axes whose members can be factorised and partitioned.

`unify` records that two dimensions have the same axes; if one of them is a flattened product or a concatenation, the
other is divided in the same way. `fix` records that the order of an axis is meaningful. All operations only ever remove
freedom: an axis that is unified, divided or fixed unnecessarily costs symmetry, never soundness.

Partitioning the slow factor X of a product (X F) into parts X_0 + X_1 + ... leaves open whether F is the same axis in
every part. It is assumed to be different in each, `F.per_part`, as long as F never occurs without X;
`nfn_optim.symmetry.naming` checks this after tracing and calls `collapse` where it does. The rows of a fused projection
(3 head dim) are therefore three different sets of neurons.

Legend: see `nfn_optim.symmetry.axes` for `Dim`, `Dims` and atoms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nfn_optim.symmetry.axes import (
    PLAIN,
    Axis,
    Dim,
    PerPart,
    Slice,
    atoms_of,
    components_of,
    fresh,
    localise,
    long_atoms_of,
    owner_of,
    root_of,
    size_of,
)


def fix(*dims: Dim, role: int = PLAIN) -> None:
    """Record that the order of these dimensions is meaningful."""
    for atom in atoms_of(*dims):
        if atom.fixed and atom.role <= role:
            continue
        atom.fixed = True
        atom.role = min(atom.role, role)
        fix(*(atom.parts or ()), role=role)
        if atom.per_part is not None:
            fix(atom.per_part.instances, role=role)


def unify(left: Dim, right: Dim) -> None:
    """Record that two dimensions have the same axes.

    Where their factors do not align, as with (2 3) and (3 2), both are fixed.

    Raises:
        ValueError: They have different sizes.
    """
    if size_of(left) != size_of(right):
        raise ValueError(f"expected dimensions of one size, found {size_of(left)} and {size_of(right)}")
    if size_of(left) <= 1:
        ones = [atom for atom in atoms_of(left, right) if atom.size == 1]
        for atom in ones[1:]:
            _join(root_of(ones[0]), root_of(atom))
        return
    one, other = list(long_atoms_of(left)), list(long_atoms_of(right))
    while one and other:
        if one[0].size < other[0].size:
            one, other = other, one
        a, b = one[0], other[0]
        if a.size == b.size:
            _join(a, b)
            one, other = one[1:], other[1:]
        elif a.parts is None and a.size % b.size == 0:
            factorise(a, b.size)
        elif a.parts is not None and (count := _count_with_size(other, a.size)) is not None:
            _unify_sum(a, tuple(other[:count]))
            one, other = one[1:], other[count:]
        else:
            fix(tuple(one), tuple(other))
            return
        one, other = list(long_atoms_of(tuple(one))), list(long_atoms_of(tuple(other)))


def _count_with_size(atoms: Sequence[Axis], size: int) -> int | None:
    """The number of leading atoms whose product has this size; None if there is no such number."""
    sizes = [math.prod(atom.size for atom in atoms[: count + 1]) for count in range(len(atoms))]
    return sizes.index(size) + 1 if size in sizes else None


def _unify_sum(axis: Axis, dim: Dim) -> None:
    """Unify the parts of an axis with the corresponding slices of a dimension."""
    start = 0
    for part in axis.parts or ():
        piece = slice_dim(dim, start, start + size_of(part))
        start += size_of(part)
        if piece is None:
            fix((axis,), dim)
            return
        unify(piece.dim, part)


def _join(a: Axis, b: Axis) -> None:
    """Merge two atoms of the same size."""
    a, b = root_of(a), root_of(b)
    if a is b:
        return
    if b.parts is not None and a.parts is None:
        a, b = b, a
    parts = b.parts
    if (
        a.per_part is not None
        and b.per_part is not None
        and not (owner_of(a) is owner_of(b) and len(a.per_part.instances) == len(b.per_part.instances))
    ):
        collapse(b)
        _join(a, b)
        return
    pairs = list(zip(a.per_part.instances, b.per_part.instances, strict=True)) if a.per_part and b.per_part else []
    if a.fixed != b.fixed or a.role != b.role:
        role = min(a.role, b.role)
        if a.fixed or b.fixed:
            fix((a,), (b,), role=role)
        a.role = role
    b.parent = a
    a.per_part = a.per_part or b.per_part
    a.fast_axes += b.fast_axes
    for x, y in pairs:
        unify((x,), (y,))
    if parts is not None:
        start = 0
        for part in parts:
            piece = slice_dim((a,), start, start + size_of(part))
            start += size_of(part)
            if piece is None:
                fix((a,), *parts)
                return
            unify(piece.dim, part)


def collapse(axis: Axis) -> None:
    """Record that an axis is the same in every part of its owner."""
    axis = root_of(axis)
    if axis.per_part is None:
        return
    owner, instances = owner_of(axis), axis.per_part.instances
    axis.per_part = None
    for instance in instances:
        unify((axis,), (instance,))
    for component in components_of(axis):
        if owner_of(root_of(component)) is owner:
            collapse(component)


# --------------------------------------------------------------------------------------------------- slices and sums


def slice_dim(dim: Dim, start: int, stop: int) -> Slice | None:
    """The entries `start` to `stop` of a dimension, which is partitioned there.

    Returns:
        The slice; None if a boundary is in the middle of a factor, or the order of the dimension is meaningful and it
        is not known to be a sum.
    """
    slices = _slices(dim, start, stop)
    if slices is None:
        return None
    if len(slices) == 1:
        return slices[0]
    return Slice(concat_dims([piece.dim for piece in slices]))


def concat_dims(parts: Sequence[Dim]) -> Dim:
    """The dimension made of other dimensions laid end to end."""
    parts = [part for part in parts if size_of(part)]
    if len(parts) == 1:
        return parts[0]
    whole = Axis(sum(size_of(part) for part in parts))
    whole.parts = tuple(parts)
    return (whole,)


def _slices(dim: Dim, start: int, stop: int) -> list[Slice] | None:
    """The entries `start` to `stop` of a dimension, one slice for each part that they meet."""
    if start == 0 and stop == size_of(dim):
        return [Slice(dim)]
    head, *rest = long_atoms_of(dim)
    inner = size_of(tuple(rest))
    if head.parts is None:
        if head.fixed or start % inner or stop % inner:
            return None
        bounds = (start // inner, stop // inner, head.size)
        lengths = [high - low for low, high in zip((0, *bounds), bounds, strict=False)]
        partition(head, [length for length in lengths if length])
    slices: list[Slice] = []
    first = 0
    for index, part in enumerate(head.parts or ()):
        last = first + size_of(part) * inner
        low, high = max(start, first), min(stop, last)
        if low < high:
            step = ((head, index),)
            within = _slices(part + localise(tuple(rest), step), low - first, high - first)
            if within is None:
                return None
            slices += [Slice(piece.dim, step + piece.path) for piece in within]
        first = last
    return slices


# ------------------------------------------------------------------------------------------------------ dividing axes


def factorise(axis: Axis, size: int) -> None:
    """Make an atom the product of a slow axis of `size` entries and a fast one."""
    slow, fast = Axis(size, axis.fixed, axis.role), Axis(axis.size // size, axis.fixed, axis.role)
    axis.factors = (slow, fast)
    slow.fast_axes, fast.fast_axes = [fast, *axis.fast_axes], list(axis.fast_axes)
    if axis.per_part is not None:
        pairs = [(Axis(slow.size), Axis(fast.size)) for _ in axis.per_part.instances]
        owner = axis.per_part.owner
        slow.per_part, fast.per_part = (PerPart(owner, instances) for instances in zip(*pairs, strict=True))
        for instance, pair in zip(axis.per_part.instances, pairs, strict=True):
            unify((instance,), pair)


def partition(axis: Axis, sizes: Sequence[int]) -> None:
    """Make an atom the sum of new axes, and let the fast axes of its products be different in each part."""
    parts = [Axis(size, axis.fixed, axis.role) for size in sizes]
    axis.parts = tuple((part,) for part in parts)
    if axis.per_part is not None:
        wholes = [concat_dims(fresh(sizes)) for _ in axis.per_part.instances]
        for index, part in enumerate(parts):
            instances = tuple((whole[0].parts or (whole,))[index][0] for whole in wholes)
            part.per_part = PerPart(axis.per_part.owner, instances)
        for instance, whole in zip(axis.per_part.instances, wholes, strict=True):
            unify((instance,), whole)
    for fast in axis.fast_axes:
        _instantiate(fast, axis)
    for index, part in enumerate(parts):
        for fast in map(root_of, axis.fast_axes):
            if fast.per_part is not None and owner_of(fast) is axis:
                part.fast_axes.append(fast.per_part.instances[index])


def _instantiate(axis: Axis, owner: Axis) -> bool:
    """Let an axis and its components be different in each part of `owner`; returns whether they can be."""
    axis = root_of(axis)
    if axis.per_part is not None:
        return owner_of(axis) is owner
    if axis is owner:
        return False
    if not all(_instantiate(component, owner) for component in components_of(axis)):
        return False
    count = len(owner.parts or ())
    axis.per_part = PerPart(owner, tuple(Axis(axis.size, axis.fixed, axis.role) for _ in range(count)))

    def instance_of(component: Axis, index: int) -> Axis:
        per_part = root_of(component).per_part
        assert per_part is not None
        return per_part.instances[index]

    for index, instance in enumerate(axis.per_part.instances):
        if axis.factors is not None:
            instance.factors = (instance_of(axis.factors[0], index), instance_of(axis.factors[1], index))
        if axis.parts is not None:
            instance.parts = tuple(tuple(instance_of(atom, index) for atom in part) for part in axis.parts)
        for fast in map(root_of, axis.fast_axes):
            if fast.per_part is not None and owner_of(fast) is owner:
                instance.fast_axes.append(fast.per_part.instances[index])
    return True


def differ_by_part(axis: Axis, fast: Axis) -> None:
    """Let an axis be different in each part of another one, now and once it is divided further."""
    axis, fast = root_of(axis), root_of(fast)
    if axis is fast or any(root_of(other) is axis for other in fast.fast_axes):
        return
    if axis.parts is None:
        if all(root_of(other) is not fast for other in axis.fast_axes):
            axis.fast_axes.append(fast)
    elif (fast.per_part is not None or _instantiate(fast, axis)) and owner_of(fast) is axis:
        assert fast.per_part is not None
        for part, instance in zip(axis.parts, fast.per_part.instances, strict=True):
            for atom in long_atoms_of(part):
                differ_by_part(atom, instance)


def divide_further(axis: Axis, max_size: int, depth: int = 0) -> None:
    """Divide what is left of an axis that loses one entry after the other, so that parts lie in few others."""
    for atom in long_atoms_of(*(root_of(axis).parts or ())):
        if atom.parts is not None:
            divide_further(atom, max_size, depth + 1)
        elif depth and atom.factors is None and not atom.fixed and atom.size <= max_size:
            partition(atom, [1] * atom.size)
