"""A tensor cut into blocks whose dimensions are single axes.

    out (a + b)         two blocks, (out, a) and (out, b)
    (h > d) (c y x)     one block with the atoms h, d, c, y, x

An *atom* is one occurrence of an axis in a block. What an axis is nested in is settled here, once: the atom of `d`
knows which atom of `h` it belongs to, in its own dimension if `h` occurs there, else anywhere in the tensor. An axis
that is nested in a *fixed* axis is another axis for each of its entries, so such a fixed axis is cut into its entries.
A free axis of one entry cannot be permuted and counts as fixed.

References:
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.expression import Expression, Product


@dataclass(frozen=True)
class Atom:
    """One occurrence of an axis in a block.

    Attributes:
        axis: Its name; with the entries of the fixed axes that it is nested in, if there are any.
        size: Its number of entries.
        free: Whether it is permuted.
        parents: Positions of the free atoms that it is nested in.
    """

    axis: str
    size: int
    free: bool
    parents: tuple[int, ...]


@dataclass(frozen=True)
class Term:
    """A part of one dimension that is a product of axes: their names, the rows that it covers and the entries cut."""

    axes: tuple[str, ...]
    rows: tuple[int, ...]
    cut: tuple[tuple[str, int], ...]

    @property
    def span(self) -> tuple[int, int] | None:
        """First row and number of rows, where they lie side by side."""
        start = self.rows[0] if self.rows else 0
        return (start, len(self.rows)) if self.rows == tuple(range(start, start + len(self.rows))) else None


@dataclass(frozen=True)
class Block:
    """A tensor, or a part of one, whose dimensions are single axes.

    Attributes:
        tensor: The name of the tensor.
        number: Which of the tensor's blocks it is.
        atoms: Its dimensions.
    """

    tensor: str
    number: int
    atoms: tuple[Atom, ...]

    @property
    def free(self) -> tuple[int, ...]:
        """Positions of the free atoms."""
        return tuple(n for n, atom in enumerate(self.atoms) if atom.free)

    @property
    def fixed(self) -> tuple[int, ...]:
        """Positions of the fixed atoms."""
        return tuple(n for n, atom in enumerate(self.atoms) if not atom.free)

    @property
    def positions(self) -> int:
        """The number of joint entries of the fixed atoms, each of which has coefficients of its own."""
        return math.prod([self.atoms[n].size for n in self.fixed])

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the atoms."""
        return tuple(atom.size for atom in self.atoms)


class Partition:
    """A tensor and its blocks: how to cut it and how to put it together.

    Args:
        symmetry: The axes of every tensor.
        name: Which tensor.

    Attributes:
        shape: The tensor's.
        blocks: One for every combination of the summands of its dimensions.

    Raises:
        ValueError: It cannot be told which entry of its parent a nested axis belongs to.
    """

    def __init__(self, symmetry: Symmetry, name: str) -> None:
        self.shape = symmetry.shape_of(name)
        cut = {p for above in symmetry.nested.values() for p in above if p in symmetry.fixed and symmetry.sizes[p] > 1}
        self._terms = [_terms_of(e, symmetry, cut) for e in symmetry.expressions_of(name)]
        self.blocks = tuple(
            _block_of(symmetry, name, number, terms, cut)
            for number, terms in enumerate(itertools.product(*self._terms))
        )
        self._orders: list[Tensor | None] = []
        for terms in self._terms:
            rows = torch.tensor([row for term in terms for row in term.rows], dtype=torch.int64)
            order = rows.argsort()
            self._orders.append(None if torch.equal(order, torch.arange(len(rows))) else order)

    def cut(self, x: Tensor) -> list[Tensor]:
        """`(N, *shape, C)` -> for every block `(N, *atoms, C)`."""
        pieces = [x]
        for dim, terms in enumerate(self._terms, 1):
            if len(terms) > 1:
                pieces = [_rows_of(piece, term, dim) for piece in pieces for term in terms]
        if len(pieces) == 1 and x.shape[1:-1] == self.blocks[0].shape:
            return pieces
        return [
            piece.reshape(x.shape[0], *block.shape, x.shape[-1])
            for piece, block in zip(pieces, self.blocks, strict=True)
        ]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of `cut`."""
        n, channels = pieces[0].shape[0], pieces[0].shape[-1]
        combinations = itertools.product(*self._terms)
        flat = [
            piece.reshape(n, *(len(term.rows) for term in terms), channels)
            for piece, terms in zip(pieces, combinations, strict=True)
        ]
        for dim in range(len(self._terms), 0, -1):
            count = len(self._terms[dim - 1])
            if count > 1:
                flat = [torch.cat(flat[i : i + count], dim) for i in range(0, len(flat), count)]
                order = self._orders[dim - 1]
                if order is not None:
                    flat = [piece.index_select(dim, order.to(piece.device)) for piece in flat]
        return flat[0]


def _rows_of(x: Tensor, term: Term, dim: int) -> Tensor:
    if term.span is not None:
        return x.narrow(dim, *term.span)
    return x.index_select(dim, torch.tensor(term.rows, device=x.device))


def _terms_of(expression: Expression, symmetry: Symmetry, cut: set[str]) -> list[Term]:
    """Multiply out."""
    if isinstance(expression, str):
        size = symmetry.sizes[expression]
        if expression in cut:
            return [Term((), (entry,), ((expression, entry),)) for entry in range(size)]
        return [Term((expression,), tuple(range(size)), ())]
    if isinstance(expression, Product):
        terms = [Term((), (0,), ())]
        for factor in expression.factors:
            inner = _terms_of(factor, symmetry, cut)
            length = sum(len(term.rows) for term in inner)
            terms = [
                Term(a.axes + b.axes, tuple(i * length + j for i in a.rows for j in b.rows), a.cut + b.cut)
                for a in terms
                for b in inner
            ]
        return terms
    found: list[Term] = []
    start = 0
    for part in expression.parts:
        inner = _terms_of(part, symmetry, cut)
        found += [Term(t.axes, tuple(start + row for row in t.rows), t.cut) for t in inner]
        start += sum(len(t.rows) for t in inner)
    return found


def _block_of(symmetry: Symmetry, name: str, number: int, terms: Sequence[Term], cut: set[str]) -> Block:
    places = [(axis, dim) for dim, term in enumerate(terms) for axis in term.axes]
    entries = [(axis, entry, dim) for dim, term in enumerate(terms) for axis, entry in term.cut]
    atoms = []
    for axis, dim in places:
        above = [p for p in symmetry.nested.get(axis, ()) if symmetry.sizes[p] > 1]
        marks = []
        for p in above:
            if p in cut:
                here = [(entry, d) for a, entry, d in entries if a == p]
                marks.append(f"{p}={_only(here, dim, lambda e: e[1], (name, axis, p))[0]}")
        parents = []
        for p in above:
            if p not in cut:
                candidates = [(n, d) for n, (a, d) in enumerate(places) if a == p]
                parents.append(_only(candidates, dim, lambda e: e[1], (name, axis, p))[0])
        size = symmetry.sizes[axis]
        free = axis not in symmetry.fixed and size > 1
        atoms.append(Atom("@".join([axis, *marks]), size, free, tuple(parents) if free else ()))
    return Block(name, number, tuple(atoms))


def _only(
    found: list[tuple[int, int]], dim: int, dim_of: Callable[[tuple[int, int]], int], asked: tuple[str, str, str]
) -> tuple[int, int]:
    """The one that stands in the same dimension, else the only one."""
    near = [f for f in found if dim_of(f) == dim] or found
    if len(near) != 1:
        name, axis, parent = asked
        raise ValueError(
            f"expected {parent!r}, which {axis!r} is nested in, once beside it in {name!r}, found it {len(near)} times"
            f"; name the two of them differently or make {axis!r} fixed"
        )
    return near[0]
