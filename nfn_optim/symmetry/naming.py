"""A `Symmetry` from the axes of a trace: nesting, and readable names.

A trace consists of the dimensions of all tensors and the *index spaces* of all ops: the set over which an op computes,
e.g. `(batch, row, k, column)` for a batched matrix product. Relabelling all index spaces consistently preserves the
function of the network. An axis F may therefore have a different permutation for every entry of an axis S, unless an
index space contains F without S, or S twice, which would be ambiguous. It follows that

    F is nested in S       if F is free and never occurs without S
    F is collapsed         if it was assumed to differ between the parts of S, and occurs without S

References:
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from nfn_optim.symmetry.axes import (
    IN,
    OUT,
    PLAIN,
    TAP,
    Axis,
    Dim,
    Dims,
    atoms_of,
    localise,
    owner_of,
)
from nfn_optim.symmetry.axis_expression import expression_of, inexpressible
from nfn_optim.symmetry.expression import (
    Expression,
    Sum,
    axes_of,
    format_dim,
    length_of,
    product_of,
    rename_axes,
)
from nfn_optim.symmetry.stacks import Stacks, find_stacks
from nfn_optim.symmetry.symmetry import Symmetry
from nfn_optim.symmetry.unification import collapse

_PREFIX = {IN: "in", OUT: "out", TAP: "k", PLAIN: "x"}


def symmetry_from(tensors: Mapping[str, Dims], index_spaces: Sequence[Dims]) -> Symmetry:
    """The symmetry of traced tensors, with readable names.

    Args:
        tensors: Name -> dimensions of the tensors that the symmetry describes.
        index_spaces: The index spaces of all ops.
    """
    leaves: dict[str, Axis] = {}
    stacks = _without_invalid(tensors, index_spaces, leaves)
    expressions = {
        name: stacks.expressions.get(name) or tuple(expression_of(dim, leaves) for dim in dims)
        for name, dims in tensors.items()
    }
    carried = list(dict.fromkeys(leaf for dims in expressions.values() for dim in dims for leaf in axes_of(dim)))
    spaces = [
        space
        for dims in _localised(index_spaces)
        for space in stacks.spaces_of(tuple(expression_of(dim, leaves) for dim in dims))
    ]
    used = {leaf for dims in spaces for expression in dims for leaf in axes_of(expression)}
    for leaf in carried:  # an axis that no op uses for this batch may be meaningful for another batch
        leaves[leaf].fixed |= leaf not in used
    free = [leaf for leaf in carried if not leaves[leaf].fixed and leaves[leaf].size > 1]
    rest = _localised(dims for name, dims in tensors.items() if name not in stacks.expressions)
    spaces += [*stacks.expressions.values(), *(tuple(expression_of(dim, leaves) for dim in dims) for dims in rest)]
    return _with_readable_names(expressions, leaves, _nesting_of(free, spaces))


# ----------------------------------------------------------------------------------------------------------- collapsing


def _without_invalid(tensors: Mapping[str, Dims], index_spaces: Sequence[Dims], leaves: dict[str, Axis]) -> Stacks:
    """Collapse the axes that cannot differ between the parts of their owner; returns the stacks that are left."""
    while True:
        invalid: list[Axis] = []
        for dims in (*tensors.values(), *index_spaces):
            _add_ambiguous(atoms_of(*dims), Counter(), invalid)
        if not invalid:
            stacks = find_stacks(tensors, index_spaces, leaves)
            rest = (dims for name, dims in tensors.items() if name not in stacks.expressions)
            invalid = stacks.invalid or [axis for dims in rest for dim in dims for axis in inexpressible(dim)]
        if not invalid:
            return stacks
        for atom in invalid:
            collapse(atom)


def _add_ambiguous(atoms: Dim, outer: Counter[Axis], invalid: list[Axis]) -> None:
    """Add the axes whose owner does not occur exactly once beside or around them."""
    counts = outer + Counter(atoms)
    for atom in atoms:
        if atom.per_part is not None and counts[owner_of(atom) or atom] != 1:
            invalid.append(atom)
        for part in atom.parts or ():
            _add_ambiguous(atoms_of(part), counts, invalid)


# -------------------------------------------------------------------------------------------------------------- nesting


def _localised(spaces: Iterable[Dims]) -> Iterable[Dims]:
    """Every index space; instead of one with an axis that differs between parts, one space for each part."""
    visited = set()
    pending = list(spaces)
    while pending:
        dims = pending.pop()
        key = tuple(tuple(map(id, atoms_of(dim))) for dim in dims)
        if key in visited:
            continue
        visited.add(key)
        atoms = atoms_of(*dims)
        owners = {owner_of(atom) for atom in atoms} - {None}
        owner = next((atom for atom in atoms if atom in owners), None)
        if owner is None:
            yield dims
            continue
        for index, part in enumerate(owner.parts or ()):
            in_part = [tuple(a for atom in atoms_of(dim) for a in (part if atom is owner else (atom,))) for dim in dims]
            pending.append(tuple(localise(dim, [(owner, index)]) for dim in in_part))


def _nesting_of(free: Sequence[str], spaces: Iterable[tuple[Expression, ...]]) -> dict[str, tuple[str, ...]]:
    """Free axis -> the axes that it never occurs without; of two that never occur apart, the later is nested."""
    candidates = dict.fromkeys(free)
    companions: dict[str, set[str]] = {}
    for dims in spaces:
        for leaf, counts in _companions_of(product_of(dims), Counter(), Counter()):
            if leaf in candidates:
                unique = {other for other, count in counts.items() if count == 1 and other != leaf}
                companions[leaf] = companions[leaf] & unique if leaf in companions else unique
    order = {leaf: index for index, leaf in enumerate(free)}
    nested = {}
    for leaf, others in companions.items():
        mutual = {other for other in others if leaf in companions.get(other, ())}
        parents = [other for other in others if other not in mutual or order[other] < order[leaf]]
        if parents:
            nested[leaf] = tuple(sorted(parents))
    return nested


def _companions_of(
    expression: Expression, always: Counter[str], in_some_parts: Counter[str]
) -> Iterable[tuple[str, Counter[str]]]:
    """Every occurrence of every axis, with the number of times that other axes occur beside it.

    An axis that occurs in some parts of a sum only is counted twice, so that it is not unique.
    """
    if isinstance(expression, str):
        yield expression, always + in_some_parts + in_some_parts
    elif isinstance(expression, Sum):
        for part in expression.parts:
            yield from _companions_of(part, always, in_some_parts)
    else:
        for index, factor in enumerate(expression.factors):
            others = [other for i, other in enumerate(expression.factors) if i != index]
            plain = Counter(other for other in others if isinstance(other, str))
            inner = Counter(axis for other in others if not isinstance(other, str) for axis in axes_of(other))
            yield from _companions_of(factor, always + plain, in_some_parts + inner)


# ---------------------------------------------------------------------------------------------------------------- names


def _with_readable_names(
    expressions: Mapping[str, tuple[Expression, ...]],
    leaves: Mapping[str, Axis],
    nested: Mapping[str, tuple[str, ...]],
) -> Symmetry:
    """Give readable names; fixed axes that only occur together, as one expression, become one axis."""
    dims_of: dict[str, set[Expression]] = {}
    for dims in expressions.values():
        for dim in dims:
            for leaf in axes_of(dim):
                dims_of.setdefault(leaf, set()).add(dim)
    counts: dict[str, int] = {}
    names: dict[Expression, str] = {}
    sizes: dict[str, int] = {}
    fixed: set[str] = set()

    def name_of(expression: Expression) -> str:
        if expression not in names:
            axes = [leaves[leaf] for leaf in axes_of(expression)]
            free = not axes[0].fixed and axes[0].size > 1
            prefix = "h" if free else _PREFIX[min(axis.role for axis in axes)]
            names[expression] = name = f"{prefix}{counts.setdefault(prefix, 0)}"
            counts[prefix] += 1
            sizes[name] = length_of(expression, {leaf: leaves[leaf].size for leaf in axes_of(expression)})
            if not free:
                fixed.add(name)
        return names[expression]

    def named(dim: Expression) -> Expression:
        axes = list(axes_of(dim))
        whole = all((leaves[leaf].fixed or leaves[leaf].size == 1) and dims_of[leaf] == {dim} for leaf in axes)
        if whole and len(set(axes)) == len(axes):
            return name_of(dim)
        return rename_axes(dim, name_of)

    texts = {name: tuple(format_dim(named(dim), {}) for dim in parts) for name, parts in expressions.items()}
    nesting = {
        names[leaf]: tuple(names[parent] for parent in parents if parent in names)
        for leaf, parents in nested.items()
        if leaf in names
    }
    return Symmetry(texts, sizes, frozenset(fixed), {axis: parents for axis, parents in nesting.items() if parents})
