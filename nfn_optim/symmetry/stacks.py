"""Tensors whose entries a network takes one by one, such as experts in a loop: `w[i]`, `w.unbind()`, `for w_i in w`.

Tracing lets the other dimensions of such a tensor differ between its entries (`unification.differ_by_part`). Which of
them do is decided here, by *columns*: the axes at one place in all entries that were taken.

    shared     one axis in all entries
    nested     free axes, all different, that occur nowhere but in the same entries of other stacks: one axis of the
               symmetry, nested in the axis of the stack
    fixed      no axis of the column is free
    otherwise  the axes of all entries are the same

The axis of the stack is fixed, since its entries are told apart. Entries that were not taken, as those of experts
without tokens, are taken to be like the others, of which there must be two; nothing that has run says otherwise.

Legend: see `nfn_optim.symmetry.axes` for `Dim`, `Dims` and atoms, and `axis_expression` for leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nfn_optim.symmetry.axes import Axis, Dims, Path, atoms_of, localise, long_atoms_of, owner_of, size_of
from nfn_optim.symmetry.axis_expression import expression_of, inexpressible
from nfn_optim.symmetry.expression import Expression, axes_of, rename_axes

MIN_TAKEN = 2
Column = tuple[int, tuple[int, ...], tuple[str, ...]]
"""The size of a stack, the entries that were taken, and the leaves in them at one place."""


@dataclass(frozen=True)
class Stack:
    """A tensor whose entries are taken one by one.

    Args:
        owner: The axis of the entries.
        dim: The dimension of that axis.
        others: The other dimensions.
        indices: The entries that were taken.
        template: The other dimensions of the first of them.
        columns: Leaf of the template -> column.
    """

    owner: Axis
    dim: int
    others: Dims
    indices: tuple[int, ...]
    template: tuple[Expression, ...]
    columns: Mapping[str, Column]

    @property
    def differing(self) -> list[Axis]:
        """The axes that are different in each entry."""
        return [atom for atom in atoms_of(*self.others) if owner_of(atom) is self.owner]


@dataclass
class Stacks:
    """All stacks of a trace.

    Attributes:
        expressions: Name of a stack -> its dimensions.
        invalid: Axes that were assumed to differ between entries and do not; if there are any, nothing else counts.
        places: Leaf in a nested column -> the entry, the leaf of the nested axis, the leaf of the stack's axis.
    """

    expressions: dict[str, tuple[Expression, ...]] = field(default_factory=dict)
    invalid: list[Axis] = field(default_factory=list)
    places: dict[str, tuple[int, str, str]] = field(default_factory=dict)

    def spaces_of(self, space: tuple[Expression, ...]) -> Iterator[tuple[Expression, ...]]:
        """An index space; if it belongs to entries of stacks, also in terms of the axes of the stacks."""
        yield space
        if not self.places:
            return
        places = {leaf: place for dim in space for leaf in axes_of(dim) if (place := self.places.get(leaf))}
        for index in {index for index, _, _ in places.values()}:
            own = {leaf: (nested, outer) for leaf, (i, nested, outer) in places.items() if i == index}
            names = {leaf: own[leaf][0] if leaf in own else leaf for dim in space for leaf in axes_of(dim)}
            renamed = tuple(rename_axes(dim, names.__getitem__) for dim in space)
            yield (*renamed, *dict.fromkeys(outer for _, outer in own.values()))


def find_stacks(tensors: Mapping[str, Dims], index_spaces: Iterable[Dims], leaves: dict[str, Axis]) -> Stacks:
    """The stacks among traced tensors.

    Args:
        tensors: Name -> dimensions.
        index_spaces: The index spaces of all ops.
        leaves: Leaf -> axis; those that are found are added.
    """
    found = {name: d for name, dims in tensors.items() if (d := _stacked_dim(dims)) is not None}
    if not found:
        return Stacks()
    taken = _taken_leaves(index_spaces, {atoms_of(tensors[name][d])[0] for name, d in found.items()}, leaves)
    candidates = {name: _candidate(tensors[name], d, taken, leaves) for name, d in found.items()}
    stacks = {name: stack for name, stack in candidates.items() if isinstance(stack, Stack)}
    outside = [leaf for name, dims in tensors.items() if name not in stacks for leaf in _leaves_of(dims, leaves)]
    invalid = [atom for atoms in candidates.values() if not isinstance(atoms, Stack) for atom in atoms]
    invalid += [atom for stack in _contradicting(stacks.values(), outside, leaves) for atom in stack.differing]
    return Stacks(invalid=invalid) if invalid else _named(stacks, leaves)


def _stacked_dim(dims: Dims) -> int | None:
    """The dimension between whose entries axes of other dimensions differ."""
    for d, dim in enumerate(dims):
        atoms = long_atoms_of(dim)
        others = atoms_of(*dims[:d], *dims[d + 1 :])
        if len(atoms) == 1 and atoms[0].parts is not None and any(owner_of(atom) is atoms[0] for atom in others):
            return d
    return None


def _taken_leaves(index_spaces: Iterable[Dims], owners: set[Axis], leaves: dict[str, Axis]) -> set[str]:
    """The leaves in the index spaces of single entries."""
    return {leaf for dims in index_spaces if owners.isdisjoint(atoms_of(*dims)) for leaf in _leaves_of(dims, leaves)}


def _leaves_of(dims: Dims, leaves: dict[str, Axis]) -> list[str]:
    return [leaf for dim in dims for leaf in axes_of(expression_of(dim, leaves))]


def _candidate(dims: Dims, d: int, taken: set[str], leaves: dict[str, Axis]) -> Stack | list[Axis]:
    """A stack if its entries have one structure; else the axes that cannot differ between them."""
    (owner,), others = long_atoms_of(dims[d]), dims[:d] + dims[d + 1 :]
    indices: list[int] = []
    entries: list[tuple[Expression, ...]] = []
    columns: list[list[str]] = []
    invalid = [atom for atom in atoms_of(*others) if owner_of(atom) is owner]
    for index, path in _entries_of(owner):
        entry = tuple(localise(dim, path) for dim in others)
        if inner := [axis for dim in entry for axis in inexpressible(dim)]:
            return inner
        expressions = tuple(expression_of(dim, leaves) for dim in entry)
        names = [leaf for expression in expressions for leaf in axes_of(expression)]
        if all(leaf in taken for leaf in names if leaves[leaf].size > 1):
            indices.append(index)
            entries.append(expressions)
            columns.append(names)
    if len(entries) < MIN_TAKEN or len(set(map(len, columns))) > 1:
        return invalid
    for expressions, names in zip(entries, columns, strict=True):
        renaming = dict(zip(columns[0], names, strict=True))
        if tuple(rename_axes(e, renaming.__getitem__) for e in entries[0]) != expressions:
            return invalid
    by_place = zip(columns[0], zip(*columns, strict=True), strict=True)
    stack = {leaf: (owner.size, tuple(indices), column) for leaf, column in by_place}
    if not any(_is_nested(column, leaves) for column in stack.values()):
        return invalid
    return Stack(owner, d, others, tuple(indices), entries[0], stack)


def _entries_of(axis: Axis, start: int = 0, path: Path = ()) -> Iterator[tuple[int, Path]]:
    """The entries that an axis is divided into: index, and the parts in which it lies."""
    for index, part in enumerate(axis.parts or ()):
        step, atoms = (*path, (axis, index)), long_atoms_of(part)
        if not atoms:
            yield start, step
        elif len(atoms) == 1:
            yield from _entries_of(atoms[0], start, step)
        start += size_of(part)


def _is_free(leaf: str, leaves: Mapping[str, Axis]) -> bool:
    return not leaves[leaf].fixed and leaves[leaf].size > 1


def _is_nested(column: Column, leaves: Mapping[str, Axis]) -> bool:
    """Whether all axes of a column are free and different."""
    return len(set(column[2])) == len(column[2]) and all(_is_free(leaf, leaves) for leaf in column[2])


def _contradicting(stacks: Iterable[Stack], outside: Sequence[str], leaves: Mapping[str, Axis]) -> Iterator[Stack]:
    """The stacks that have an axis in common with something else than the same entries of other stacks."""
    nested: dict[str, set[Column]] = {}
    others = set(outside)
    for column in (column for stack in stacks for column in stack.columns.values()):
        if _is_nested(column, leaves):
            for leaf in column[2]:
                nested.setdefault(leaf, set()).add(column)
        else:
            others |= set(column[2])
    wrong = {leaf for leaf, columns in nested.items() if len(columns) > 1 or leaf in others}
    for stack in stacks:
        columns = stack.columns.values()
        mixed = any(
            len(set(column[2])) > 1
            and not _is_nested(column, leaves)
            and any(_is_free(leaf, leaves) for leaf in column[2])
            for column in columns
        )
        if mixed or any(leaf in wrong for column in columns for leaf in column[2]):
            yield stack


def _named(stacks: Mapping[str, Stack], leaves: dict[str, Axis]) -> Stacks:
    """Names for the axes of stacks, one for all stacks that share neurons, and for the nested axes."""
    nested = {n: {c for c in stack.columns.values() if _is_nested(c, leaves)} for n, stack in stacks.items()}
    axis_of: dict[Column, str] = {}
    for name, columns in nested.items():
        joined = {axis_of[column] for column in columns if column in axis_of}
        axis = f"stack {name}"
        leaves[axis] = Axis(stacks[name].owner.size, fixed=True, role=stacks[name].owner.role)
        axis_of |= {column: axis for column, other in axis_of.items() if other in joined}
        axis_of |= dict.fromkeys(columns, axis)
    result = Stacks()
    for column, axis in axis_of.items():
        name = f"{column[2][0]} in {axis}"
        leaves[name] = Axis(leaves[column[2][0]].size)
        result.places |= {leaf: (i, name, axis) for i, leaf in zip(column[1], column[2], strict=True)}
    for name, stack in stacks.items():
        names = {leaf: result.places[leaf][1] if leaf in result.places else leaf for leaf in stack.columns}
        dims = [rename_axes(expression, names.__getitem__) for expression in stack.template]
        axis = axis_of[next(iter(nested[name]))]
        result.expressions[name] = (*dims[: stack.dim], axis, *dims[stack.dim :])
    return result
