"""The ways in which a block can be pooled, or listened to: partitions of its free atoms.

A *class* is a set of atoms of one axis that are kept equal, the diagonal of these dimensions. A *view* puts every free
atom into a class and keeps some of the classes:

    pooled    x -> diagonals over the classes, means over the classes that are not kept
    heard     values over the kept classes -> the same value all along the others, on the diagonals

Every equivariant linear map from one block to another is a sum of: pool by a view of the one, mix the channels, be
heard by a view of the other, where the kept classes of both are matched, axis by axis. Counting: each orbit of pairs of
entries is one way of being equal, and "equal or whatever" spans the same space as "equal or distinct". Atoms of nested
axes can only be equal where what they are nested in is equal, and only be kept together with it: the group is a wreath
product.

References:
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
    Invariant and Equivariant Graph Networks (Maron et al., 2019), Sec. 3, arXiv:1812.09902
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nfn_optim.layers.block import Block

Structure = tuple[tuple[str, tuple[int, ...]], ...]
"""Of the kept classes in some order: axis, and the numbers of the classes that it is nested in."""


@dataclass(frozen=True)
class View:
    """A partition of the free atoms of a block, some classes of which are kept.

    Attributes:
        classes: Positions of the atoms of every class.
        kept: Numbers of the classes that are kept, in an order in which their structure is the canonical one.
    """

    classes: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]

    @property
    def full(self) -> bool:
        """Whether it keeps every atom apart."""
        return len(self.kept) == len(self.classes) and all(len(c) == 1 for c in self.classes)


def views_of(block: Block) -> list[tuple[Structure, list[View]]]:
    """All views of a block.

    Returns:
        For each, the structure of its kept classes, and the view with its kept classes in each order that has this
        structure: several where classes may change places.
    """
    found = []
    for classes in _class_choices(block):
        class_of = {atom: n for n, members in enumerate(classes) for atom in members}
        above = [{class_of[p] for p in block.atoms[members[0]].parents} for members in classes]
        for count in range(len(classes) + 1):
            for kept in itertools.combinations(range(len(classes)), count):
                if all(above[n] <= set(kept) for n in kept):
                    found.append(_ordered(block, classes, kept, above))
    return found


def _ordered(
    block: Block, classes: tuple[tuple[int, ...], ...], kept: Sequence[int], above: list[set[int]]
) -> tuple[Structure, list[View]]:
    axis_of = [block.atoms[members[0]].axis for members in classes]
    groups = [
        list(group) for _, group in itertools.groupby(sorted(kept, key=lambda n: axis_of[n]), lambda n: axis_of[n])
    ]
    orders: dict[Structure, list[View]] = {}
    for choice in itertools.product(*(itertools.permutations(group) for group in groups)):
        order = tuple(n for group in choice for n in group)
        place = {n: position for position, n in enumerate(order)}
        structure = tuple((axis_of[n], tuple(sorted(place[p] for p in above[n]))) for n in order)
        orders.setdefault(structure, []).append(View(classes, order))
    least = min(orders)
    return least, orders[least]


def _class_choices(block: Block) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All partitions in which atoms of one class have parents of one class."""
    by_axis: dict[str, list[int]] = {}
    for atom in block.free:
        by_axis.setdefault(block.atoms[atom].axis, []).append(atom)
    for choice in itertools.product(*(list(_partitions(atoms)) for atoms in by_axis.values())):
        classes = tuple(sorted(tuple(members) for partition in choice for members in partition))
        class_of = {atom: n for n, members in enumerate(classes) for atom in members}
        if all(
            len({tuple(class_of[p] for p in block.atoms[atom].parents) for atom in members}) == 1 for members in classes
        ):
            yield classes


def _partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All set partitions."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for partition in _partitions(rest):
        yield [[first], *partition]
        for n in range(len(partition)):
            yield [*partition[:n], [first, *partition[n]], *partition[n + 1 :]]
