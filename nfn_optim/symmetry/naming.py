"""From the axes that tracing has found to a `Symmetry`: what is nested in what, and what everything is called.

Tracing leaves the dimensions of all tensors, and the *joint spaces* of all ops: the index set over which an op
computes, `(batch, row, k, column)` for a batched matrix product. Relabelling the joint space of every op consistently
leaves the function of the network as it is. So an axis F may be permuted in another way for every entry of an axis S
if no joint space has F without S, or S twice, where it would not be clear which one is meant. From this follow

    the nested axes       every S that a free axis F never occurs without
    the collapsed axes    those that were taken for another one in every part of S, and do occur without S

References:
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from nfn_optim.symmetry import expression as dimension
from nfn_optim.symmetry.axes import (
    IN,
    OUT,
    PLAIN,
    TAP,
    Axis,
    Dim,
    Dims,
    atoms_of,
    collapse,
    localise,
    owner_of,
    size_of,
)
from nfn_optim.symmetry.expression import Expression, Sum, product_of, sum_of
from nfn_optim.symmetry.symmetry import Symmetry

_PREFIX = {IN: "in", OUT: "out", TAP: "k", PLAIN: "x"}


def symmetry_from(tensors: Mapping[str, Dims], joints: Sequence[Dims]) -> Symmetry:
    """Write what was found as a symmetry with readable names.

    Args:
        tensors: Name -> dimensions of what the symmetry describes.
        joints: The joint spaces of all ops.
    """
    spaces = [*tensors.values(), *joints]
    while _collapse_one_of(spaces, tensors.values()):
        pass
    leaves: dict[str, Axis] = {}
    trees = {name: tuple(_tree(dim, leaves) for dim in dims) for name, dims in tensors.items()}
    listed = list(leaves)
    read = [tuple(_tree(dim, leaves) for dim in dims) for dims in _expanded(joints)]
    seen = {leaf for dims in read for tree in dims for leaf in dimension.axes_of(tree)}
    for leaf in listed:  # what no op reads this time may mean something to another batch
        leaves[leaf].fixed |= leaf not in seen
    free = [leaf for leaf in listed if not leaves[leaf].fixed and leaves[leaf].size > 1]
    nested = _nested(free, read + [tuple(_tree(dim, leaves) for dim in dims) for dims in _expanded(tensors.values())])
    return _named(trees, leaves, nested)


# ------------------------------------------------------------------------------------------------ the same in each part


def _collapse_one_of(spaces: Iterable[Dims], tensors: Iterable[Dims]) -> bool:
    """Collapse the axes that cannot be another one in every part of their owner; returns whether there were any."""
    wrong: list[Axis] = []
    for dims in spaces:
        _scan(atoms_of(*dims), Counter(), wrong)
    for dims in tensors:
        for dim in dims:
            wrong += _unsaid(dim)
    for atom in wrong:
        collapse(atom)
    return bool(wrong)


def _unsaid(dim: Dim) -> list[Axis]:
    """The axes that differ between the parts of an axis that does not stand before them in the dimension.

    A symmetry has no words for parts of two dimensions that belong together.
    """
    atoms = atoms_of(dim)
    return [
        wrong
        for number, atom in enumerate(atoms)
        for wrong in (
            *([atom] if atom.each is not None and owner_of(atom) not in atoms[:number] else ()),
            *(inner for part in atom.parts or () for inner in _unsaid(part)),
        )
    ]


def _scan(atoms: Dim, around: Counter[Axis], wrong: list[Axis]) -> None:
    counts = around + Counter(atoms)
    for atom in atoms:
        if atom.each is not None and counts[owner_of(atom) or atom] != 1:
            wrong.append(atom)
        for part in atom.parts or ():
            _scan(atoms_of(part), counts, wrong)


# -------------------------------------------------------------------------------------------------------------- nesting


def _expanded(spaces: Iterable[Dims]) -> Iterable[Dims]:
    """Every joint space, once for every part that tells instances of other axes apart."""
    seen = set()
    pending = list(spaces)
    while pending:
        dims = pending.pop()
        key = tuple(tuple(map(id, atoms_of(dim))) for dim in dims)
        if key in seen:
            continue
        seen.add(key)
        atoms = atoms_of(*dims)
        owners = {owner_of(atom) for atom in atoms} - {None}
        owner = next((atom for atom in atoms if atom in owners), None)
        if owner is None:
            yield dims
            continue
        for number, part in enumerate(owner.parts or ()):
            inside = [tuple(a for atom in atoms_of(dim) for a in (part if atom is owner else (atom,))) for dim in dims]
            pending.append(tuple(localise(dim, [(owner, number)]) for dim in inside))


def _nested(free: Sequence[str], spaces: Iterable[tuple[Expression | None, ...]]) -> dict[str, tuple[str, ...]]:
    """Free axis -> the axes that it never occurs without."""
    candidates = dict.fromkeys(free)
    beside: dict[str, set[str]] = {}
    for dims in spaces:
        for leaf, sure in _beside(product_of([dim for dim in dims if dim is not None]), Counter(), Counter()):
            if leaf in candidates:
                once = {other for other, count in sure.items() if count == 1 and other != leaf}
                beside[leaf] = beside[leaf] & once if leaf in beside else once
    order = {leaf: number for number, leaf in enumerate(free)}
    nested = {}
    for leaf, others in beside.items():
        mutual = {other for other in others if leaf in beside.get(other, ())}
        above = [other for other in others if other not in mutual or order[other] < order[leaf]]
        if above:
            nested[leaf] = tuple(sorted(above))
    return nested


def _beside(tree: Expression, sure: Counter[str], perhaps: Counter[str]) -> Iterable[tuple[str, Counter[str]]]:
    """Every occurrence of every axis, and how often others occur beside it; twice if that depends on the part."""
    if isinstance(tree, str):
        yield tree, sure + perhaps + perhaps
    elif isinstance(tree, Sum):
        for part in tree.parts:
            yield from _beside(part, sure, perhaps)
    else:
        for number, factor in enumerate(tree.factors):
            others = [other for place, other in enumerate(tree.factors) if place != number]
            plain = Counter(other for other in others if isinstance(other, str))
            inner = Counter(axis for other in others if not isinstance(other, str) for axis in dimension.axes_of(other))
            yield from _beside(factor, sure + plain, perhaps + inner)


# ---------------------------------------------------------------------------------------------------------------- names


def _tree(dim: Dim, leaves: dict[str, Axis]) -> Expression:
    """A dimension as an expression whose axes are called by number, and what these axes are."""

    def leaf(axis: Axis) -> str:
        leaves.setdefault(str(id(axis)), axis)
        return str(id(axis))

    atoms = atoms_of(dim)
    long = [atom for atom in atoms if atom.size != 1]
    if not long:
        return leaf(atoms[0] if atoms else Axis(1, fixed=True))
    factors: list[Expression] = []
    for number, atom in enumerate(long):
        if atom.parts is None:
            factors.append(leaf(atom))
            continue
        rest = tuple(long[number + 1 :])
        dependent = any(owner_of(other) is atom for other in rest)
        factors.append(_laid(atom, _parts((atom, *rest) if dependent else (atom,)), leaves))
        if dependent:
            break
    return product_of(factors)


def _parts(dim: Dim) -> list[Dim]:
    """What a dimension is laid together from, if anything."""
    head, *rest = [atom for atom in atoms_of(dim) if atom.size != 1] or [Axis(1)]
    if head.parts is None or (rest and all(owner_of(other) is not head for other in rest)):
        return [dim]
    return [
        piece
        for number, part in enumerate(head.parts)
        for piece in _parts(part + localise(tuple(rest), [(head, number)]))
    ]


def _laid(whole: Axis, parts: Sequence[Dim], leaves: dict[str, Axis]) -> Expression:
    """The sum of parts: equal ones are a product with the fixed axis that numbers them, as are single entries."""

    def numbered(count: int, place: int) -> str:
        name = f"{id(whole)}+{place}"
        leaves.setdefault(name, Axis(count, fixed=True, role=whole.role))
        return name

    trees: list[Expression] = []
    for single, run in itertools.groupby(parts, lambda part: size_of(part) == 1):
        found = list(run)
        trees += [numbered(len(found), len(trees))] if single else [_tree(part, leaves) for part in found]
    if len(trees) > 1 and all(tree == trees[0] for tree in trees):
        return product_of([numbered(len(trees), len(trees)), trees[0]])
    return sum_of(trees)


def _named(
    trees: Mapping[str, tuple[Expression, ...]],
    leaves: Mapping[str, Axis],
    nested: Mapping[str, tuple[str, ...]],
) -> Symmetry:
    """Give readable names; what is fixed and occurs only as a whole becomes one axis."""
    whole: dict[str, set[Expression]] = {}
    for dims in trees.values():
        for tree in dims:
            for leaf in dimension.axes_of(tree):
                whole.setdefault(leaf, set()).add(tree)
    counts: dict[str, int] = {}
    names: dict[Expression, str] = {}
    sizes: dict[str, int] = {}
    fixed: set[str] = set()

    def name_of(tree: Expression) -> str:
        if tree not in names:
            axes = [leaves[leaf] for leaf in dimension.axes_of(tree)]
            free = not axes[0].fixed and axes[0].size > 1
            prefix = "h" if free else _PREFIX[min(axis.role for axis in axes)]
            names[tree] = name = f"{prefix}{counts.setdefault(prefix, 0)}"
            counts[prefix] += 1
            sizes[name] = dimension.length_of(tree, {leaf: leaves[leaf].size for leaf in dimension.axes_of(tree)})
            if not free:
                fixed.add(name)
        return names[tree]

    def written(tree: Expression) -> Expression:
        found = list(dimension.axes_of(tree))
        solid = all((leaves[leaf].fixed or leaves[leaf].size == 1) and whole[leaf] == {tree} for leaf in found)
        if solid and len(set(found)) == len(found):
            return name_of(tree)
        return dimension.rename(tree, name_of)

    named = {name: tuple(written(tree) for tree in dims) for name, dims in trees.items()}
    within = {
        names[leaf]: tuple(names[other] for other in others if other in names)
        for leaf, others in nested.items()
        if leaf in names
    }
    texts = {name: tuple(dimension.write(tree, {}) for tree in found) for name, found in named.items()}
    return Symmetry(texts, sizes, frozenset(fixed), {axis: above for axis, above in within.items() if above})
