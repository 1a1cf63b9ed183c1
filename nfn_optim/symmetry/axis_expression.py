"""The axes of a trace as expressions in names.

A *leaf* is the provisional name of an axis that is neither a product nor a sum.

Legend: see `nfn_optim.symmetry.axes` for `Dim` and atoms.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from nfn_optim.symmetry.axes import Axis, Dim, atoms_of, localise, long_atoms_of, owner_of, size_of
from nfn_optim.symmetry.expression import Expression, product_of, sum_of


def expression_of(dim: Dim, leaves: dict[str, Axis]) -> Expression:
    """A dimension as an expression in provisional axis names, which are added to `leaves`: name -> axis."""

    def leaf(axis: Axis) -> str:
        leaves.setdefault(str(id(axis)), axis)
        return str(id(axis))

    long = long_atoms_of(dim)
    if not long:
        atoms = atoms_of(dim)
        return leaf(atoms[0] if atoms else Axis(1, fixed=True))
    factors: list[Expression] = []
    for index, atom in enumerate(long):
        if atom.parts is None:
            factors.append(leaf(atom))
            continue
        rest = long[index + 1 :]
        dependent = any(owner_of(other) is atom for other in rest)
        factors.append(_sum_of_parts(atom, _parts_of((atom, *rest) if dependent else (atom,)), leaves))
        if dependent:
            break
    return product_of(factors)


def _parts_of(dim: Dim) -> list[Dim]:
    """The parts that a dimension is a concatenation of; the dimension itself if it is none."""
    head, *rest = long_atoms_of(dim) or (Axis(1),)
    if head.parts is None or (rest and all(owner_of(other) is not head for other in rest)):
        return [dim]
    return [
        piece
        for index, part in enumerate(head.parts)
        for piece in _parts_of(part + localise(tuple(rest), [(head, index)]))
    ]


def _sum_of_parts(whole: Axis, parts: Sequence[Dim], leaves: dict[str, Axis]) -> Expression:
    """The sum of parts; a run of single entries becomes one fixed axis, equal parts a product with a fixed axis."""

    def fixed_axis(size: int, position: int) -> str:
        name = f"{id(whole)}+{position}"
        leaves.setdefault(name, Axis(size, fixed=True, role=whole.role))
        return name

    terms: list[Expression] = []
    for single, group in itertools.groupby(parts, lambda part: size_of(part) == 1):
        run = list(group)
        terms += [fixed_axis(len(run), len(terms))] if single else [expression_of(part, leaves) for part in run]
    if len(terms) > 1 and all(term == terms[0] for term in terms):
        return product_of([fixed_axis(len(terms), len(terms)), terms[0]])
    return sum_of(terms)


def inexpressible(dim: Dim) -> list[Axis]:
    """The axes that differ between the parts of an axis that does not precede them in the dimension.

    An expression cannot relate the parts of one dimension to the parts of another.
    """
    atoms = atoms_of(dim)
    return [
        axis
        for index, atom in enumerate(atoms)
        for axis in (
            *([atom] if atom.per_part is not None and owner_of(atom) not in atoms[:index] else ()),
            *(inner for part in atom.parts or () for inner in inexpressible(part)),
        )
    ]
