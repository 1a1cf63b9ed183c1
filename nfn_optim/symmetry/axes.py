"""Axes that are found to be the same: a union-find whose members can be cut into products and sums.

An `Axis` is a set of neurons that has not been told apart from others yet. `unify` records that two dimensions are
the same one; where one of them is the flattened product of several axes, or is laid together from several, the other is
cut the same way. `fix` records that the order of an axis has a meaning. All of them only ever take freedom away:
whatever is unified, cut or fixed in vain costs symmetry, never soundness.

Cutting the slow factor X of a product (X F) into parts X_0 + X_1 + ... leaves open whether F is the same in every part.
It is taken to be another one in each, `F.each`, as long as F never occurs without X (`nfn_optim.symmetry.naming` looks
after the fact and `collapse`s it where it does): the rows of a fused projection (3 head dim) are three times other
neurons.

Legend: a `Dim` is one dimension of a tensor, the product of its axes, the first varying slowest; axes of size 1 may
be left out, so `()` is a dimension of size 1. A `Dims` has one `Dim` per dimension of a tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

IN, OUT, TAP, PLAIN = range(4)
"""Where an axis has been seen: network inputs, network outputs, kernel taps, elsewhere. The smaller one prevails."""


class Axis:
    """A set of `size` neurons; compare axes only after `atoms_of`.

    Args:
        size: Number of entries.
        fixed: Whether the order of the entries has a meaning.
        role: `IN`, `OUT`, `TAP` or `PLAIN`, for its name.

    Attributes:
        factors: The slow and the fast one, once it is known to be a product.
        parts: What it is laid together from, once it is known to be a sum.
        tails: The fast factors of the products in which it is the slow one.
        each: Itself as it is in every part of another axis.
    """

    __slots__ = ("each", "factors", "fixed", "parent", "parts", "role", "size", "tails")

    def __init__(self, size: int, fixed: bool = False, role: int = PLAIN) -> None:
        """See the class."""
        self.size = size
        self.fixed = fixed
        self.role = role
        self.parent: Axis | None = None
        self.factors: tuple[Axis, Axis] | None = None
        self.parts: tuple[Dim, ...] | None = None
        self.tails: list[Axis] = []
        self.each: Each | None = None


Dim: TypeAlias = tuple[Axis, ...]
Dims: TypeAlias = tuple[Dim, ...]


@dataclass(frozen=True)
class Each:
    """What an axis is in every part of its owner.

    Args:
        owner: The axis that has parts.
        instances: One axis for each part.
    """

    owner: Axis
    instances: tuple[Axis, ...]


@dataclass(frozen=True)
class Piece:
    """A stretch of a dimension.

    Args:
        dim: What it is made of.
        path: The parts in which it lies: (axis with parts, number of the part), the largest first.
    """

    dim: Dim
    path: tuple[tuple[Axis, int], ...] = ()

    def others(self, dims: Dims) -> Dims:
        """The other dimensions of a tensor of which only this piece is left."""
        return tuple(localise(dim, self.path) for dim in dims)


def fresh(shape: Sequence[int], fixed: bool = False, role: int = PLAIN) -> Dims:
    """New axes, one for each dimension of a tensor of this shape."""
    return tuple((Axis(int(size), fixed, role),) for size in shape)


def size_of(dim: Dim) -> int:
    """The length of a dimension."""
    return math.prod(axis.size for axis in dim)


def shape_of(dims: Dims) -> tuple[int, ...]:
    """The shape of a tensor with these dimensions."""
    return tuple(size_of(dim) for dim in dims)


def root_of(axis: Axis) -> Axis:
    """The representative of everything that is unified with an axis."""
    while axis.parent is not None:
        if axis.parent.parent is not None:
            axis.parent = axis.parent.parent
        axis = axis.parent
    return axis


def atoms_of(*dims: Dim) -> Dim:
    """The axes whose product the dimensions are by now, cut as far as known; a sum is one of them."""
    atoms: list[Axis] = []
    pending = [axis for dim in reversed(dims) for axis in reversed(dim)]
    while pending:
        axis = root_of(pending.pop())
        if axis.factors is None:
            atoms.append(axis)
        else:
            pending += reversed(axis.factors)
    return tuple(atoms)


def owner_of(axis: Axis) -> Axis | None:
    """The axis whose parts tell the instances of this one apart."""
    return None if axis.each is None else root_of(axis.each.owner)


def fix(*dims: Dim, role: int = PLAIN) -> None:
    """Record that the order of these dimensions has a meaning."""
    for atom in atoms_of(*dims):
        if atom.fixed and atom.role <= role:
            continue
        atom.fixed = True
        atom.role = min(atom.role, role)
        fix(*(atom.parts or ()), role=role)
        if atom.each is not None:
            fix(atom.each.instances, role=role)


def unify(left: Dim, right: Dim) -> None:
    """Record that two dimensions move together.

    Dimensions whose factors do not line up, such as (2 3) and (3 2), are fixed where they do not.

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
    one, other = list(_long_atoms_of(left)), list(_long_atoms_of(right))
    while one and other:
        if one[0].size < other[0].size:
            one, other = other, one
        a, b = one[0], other[0]
        if a.size == b.size:
            _join(a, b)
            one, other = one[1:], other[1:]
        elif a.parts is None and a.size % b.size == 0:
            _cut(a, b.size)
        elif a.parts is not None and (count := _count(other, a.size)) is not None:
            _lay(a, tuple(other[:count]))
            one, other = one[1:], other[count:]
        else:
            fix(tuple(one), tuple(other))
            return
        one, other = list(_long_atoms_of(tuple(one))), list(_long_atoms_of(tuple(other)))


def _count(atoms: Sequence[Axis], size: int) -> int | None:
    """How many of the first atoms have this size together; None if no number of them does."""
    sizes = [math.prod(atom.size for atom in atoms[: count + 1]) for count in range(len(atoms))]
    return sizes.index(size) + 1 if size in sizes else None


def _lay(axis: Axis, product: Dim) -> None:
    """Unify a sum with a product."""
    start = 0
    for part in axis.parts or ():
        piece = take(product, start, start + size_of(part))
        start += size_of(part)
        if piece is None:
            fix((axis,), product)
            return
        unify(piece.dim, part)


def regroup(dims: Dims, shape: Sequence[int]) -> Dims:
    """The dimensions of a tensor after a view to another shape.

    Where the new shape runs across the old factors, what it runs across is fixed.

    Args:
        dims: The dimensions of the tensor.
        shape: The new shape, of as many entries.

    Raises:
        ValueError: The numbers of entries differ.
    """
    if math.prod(shape_of(dims)) != math.prod(shape):
        raise ValueError(f"expected a view of {shape_of(dims)}, found {tuple(shape)}")
    if 0 in shape:
        fix(*dims)
        return fresh(shape, fixed=True)
    rest = list(_long_atoms_of(*dims))
    grouped: list[Dim] = []
    for number, size in enumerate(shape):
        taken: list[Axis] = []
        need = size
        while need > 1:
            axis = rest.pop(0)
            if need % axis.size != 0:
                cut = _divided(axis, need) if axis.size % need == 0 else None
                if cut is None:
                    across = (*taken, axis, *rest)
                    count, stop = _next_common(across, shape[number:])
                    fix(across[:count])
                    after = regroup((across[count:],), shape[number + stop :])
                    return (*grouped, *fresh(shape[number : number + stop], fixed=True), *after)
                rest = [*_long_atoms_of(cut), *rest]
                axis = rest.pop(0)
            taken.append(axis)
            need //= axis.size
        grouped.append(tuple(taken))
    return tuple(grouped)


def _next_common(atoms: Dim, shape: Sequence[int]) -> tuple[int, int]:
    """How many atoms, and how many dimensions of the shape, come before the next place where both may be cut."""
    count = stop = 1
    one, other = atoms[0].size, shape[0]
    while one != other:
        if one < other:
            one, count = one * atoms[count].size, count + 1
        else:
            other, stop = other * shape[stop], stop + 1
    return count, stop


def _divided(axis: Axis, size: int) -> Dim | None:
    """An atom as the product of a slow dimension of `size` entries and a fast one; None if that cannot be."""
    if axis.parts is None:
        _cut(axis, size)
        return (axis,)
    length = axis.size // size
    pieces = [take((axis,), start, start + length) for start in range(0, axis.size, length)]
    if any(piece is None for piece in pieces):
        return None
    which, blocks = side_by_side([(piece.dim,) for piece in pieces if piece is not None])
    return (which, *blocks[0])


def side_by_side(parts: Sequence[Dims]) -> tuple[Axis, Dims]:
    """Tensors of one shape as parts of a larger one.

    Returns:
        The axis that counts them, and dimensions that may be others in each of them.
    """
    which, dims = Axis(len(parts)), fresh(shape_of(parts[0]))
    which.tails = [axis for (axis,) in dims]
    _cut_in_parts(which, [1] * len(parts))
    for number, part in enumerate(parts):
        for own, dim in zip(dims, part, strict=True):
            unify(localise(own, [(which, number)]), dim)
    return which, dims


def take(dim: Dim, start: int, stop: int) -> Piece | None:
    """The entries `start` to `stop` of a dimension, which cuts it there.

    Returns:
        The piece; None if the cut runs across factors, or the order of the dimension has a meaning already and it is
        not known to be a sum.
    """
    pieces = _pieces(dim, start, stop)
    if pieces is None:
        return None
    if len(pieces) == 1:
        return pieces[0]
    return Piece(laid([piece.dim for piece in pieces]))


def laid(parts: Sequence[Dim]) -> Dim:
    """Dimensions laid end to end."""
    parts = [part for part in parts if size_of(part)]
    if len(parts) == 1:
        return parts[0]
    whole = Axis(sum(size_of(part) for part in parts))
    whole.parts = tuple(parts)
    return (whole,)


def cut(dim: Dim, sizes: Sequence[int]) -> list[Piece] | None:
    """Cut a dimension into pieces of these sizes, which add up to its own; None as for `take`."""
    sizes = [size for size in sizes if size]
    head, *rest = _long_atoms_of(dim) or (Axis(1),)
    inner = size_of(tuple(rest))
    if head.parts is None and not head.fixed and len(sizes) > 1 and all(size % inner == 0 for size in sizes):
        _cut_in_parts(head, [size // inner for size in sizes])
    stops = list(itertools.accumulate(sizes))
    pieces = [take(dim, stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
    return [piece for piece in pieces if piece is not None] if None not in pieces else None


def _pieces(dim: Dim, start: int, stop: int) -> list[Piece] | None:
    """What lies between two places of a dimension, one piece for each part that is touched."""
    if start == 0 and stop == size_of(dim):
        return [Piece(dim)]
    head, *rest = _long_atoms_of(dim)
    inner = size_of(tuple(rest))
    if head.parts is None:
        if head.fixed or start % inner or stop % inner:
            return None
        bounds = (start // inner, stop // inner, head.size)
        lengths = [high - low for low, high in zip((0, *bounds), bounds, strict=False)]
        _cut_in_parts(head, [length for length in lengths if length])
    found: list[Piece] = []
    first = 0
    for number, part in enumerate(head.parts or ()):
        last = first + size_of(part) * inner
        low, high = max(start, first), min(stop, last)
        if low < high:
            step = ((head, number),)
            within = _pieces(part + localise(tuple(rest), step), low - first, high - first)
            if within is None:
                return None
            found += [Piece(piece.dim, step + piece.path) for piece in within]
        first = last
    return found


def localise(dim: Dim, path: Sequence[tuple[Axis, int]]) -> Dim:
    """A dimension as it is within parts of other axes."""
    for axis, number in path:
        owner = root_of(axis)
        atoms = atoms_of(dim)
        if any(owner_of(atom) is owner for atom in atoms):
            dim = tuple(a.each.instances[number] if a.each and owner_of(a) is owner else a for a in atoms)
    return dim


def collapse(axis: Axis) -> None:
    """Record that an axis is the same in every part of its owner after all."""
    axis = root_of(axis)
    if axis.each is None:
        return
    owner, instances = owner_of(axis), axis.each.instances
    axis.each = None
    for instance in instances:
        unify((axis,), (instance,))
    for inner in _below(axis):
        if owner_of(root_of(inner)) is owner:
            collapse(inner)


def _below(axis: Axis) -> Dim:
    """What an axis is cut into."""
    return (*(axis.factors or ()), *(atom for part in axis.parts or () for atom in part))


def _long_atoms_of(*dims: Dim) -> Dim:
    return tuple(atom for atom in atoms_of(*dims) if atom.size != 1)


def _join(a: Axis, b: Axis) -> None:
    """Make two atoms of one size one."""
    a, b = root_of(a), root_of(b)
    if a is b:
        return
    if b.parts is not None and a.parts is None:
        a, b = b, a
    both = b.parts
    if (
        a.each is not None
        and b.each is not None
        and not (owner_of(a) is owner_of(b) and len(a.each.instances) == len(b.each.instances))
    ):
        collapse(b)
        _join(a, b)
        return
    pairs = list(zip(a.each.instances, b.each.instances, strict=True)) if a.each and b.each else []
    if a.fixed != b.fixed or a.role != b.role:
        role = min(a.role, b.role)
        if a.fixed or b.fixed:
            fix((a,), (b,), role=role)
        a.role = role
    b.parent = a
    a.each = a.each or b.each
    a.tails += b.tails
    for x, y in pairs:
        unify((x,), (y,))
    if both is not None:
        start = 0
        for part in both:
            piece = take((a,), start, start + size_of(part))
            start += size_of(part)
            if piece is None:
                fix((a,), *both)
                return
            unify(piece.dim, part)


def _cut(axis: Axis, size: int) -> None:
    """Write an atom as the product of a slow axis of `size` entries and a fast one."""
    slow, fast = Axis(size, axis.fixed, axis.role), Axis(axis.size // size, axis.fixed, axis.role)
    axis.factors = (slow, fast)
    slow.tails, fast.tails = [fast, *axis.tails], list(axis.tails)
    if axis.each is not None:
        pairs = [(Axis(slow.size), Axis(fast.size)) for _ in axis.each.instances]
        slow.each, fast.each = (Each(axis.each.owner, instances) for instances in zip(*pairs, strict=True))
        for instance, pair in zip(axis.each.instances, pairs, strict=True):
            unify((instance,), pair)


def _cut_in_parts(axis: Axis, sizes: Sequence[int]) -> None:
    """Write an atom as the sum of new axes, and let what it is the slow factor of be another in each."""
    parts = [Axis(size, axis.fixed, axis.role) for size in sizes]
    axis.parts = tuple((part,) for part in parts)
    if axis.each is not None:
        wholes = [laid(fresh(sizes)) for _ in axis.each.instances]
        for number, part in enumerate(parts):
            part.each = Each(axis.each.owner, tuple((whole[0].parts or (whole,))[number][0] for whole in wholes))
        for instance, whole in zip(axis.each.instances, wholes, strict=True):
            unify((instance,), whole)
    for tail in axis.tails:
        _instantiate(tail, axis)
    for number, part in enumerate(parts):
        for tail in map(root_of, axis.tails):
            if tail.each is not None and owner_of(tail) is axis:
                part.tails.append(tail.each.instances[number])


def _instantiate(axis: Axis, owner: Axis) -> bool:
    """Let an axis, and all that it is cut into, be another one in every part of `owner`; returns whether it is."""
    axis = root_of(axis)
    if axis.each is not None:
        return owner_of(axis) is owner
    if axis is owner:
        return False
    if not all(_instantiate(inner, owner) for inner in _below(axis)):
        return False
    count = len(owner.parts or ())
    axis.each = Each(owner, tuple(Axis(axis.size, axis.fixed, axis.role) for _ in range(count)))

    def within(inner: Axis, number: int) -> Axis:
        each = root_of(inner).each
        assert each is not None
        return each.instances[number]

    for number, instance in enumerate(axis.each.instances):
        if axis.factors is not None:
            instance.factors = (within(axis.factors[0], number), within(axis.factors[1], number))
        if axis.parts is not None:
            instance.parts = tuple(tuple(within(inner, number) for inner in part) for part in axis.parts)
        for tail in map(root_of, axis.tails):
            if tail.each is not None and owner_of(tail) is owner:
                instance.tails.append(tail.each.instances[number])
    return True
