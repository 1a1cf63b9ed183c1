"""Which dimensions of which parameters move together when hidden neurons are renamed.

    0.weight   h0 in        rows of the first layer ...
    0.bias     h0           ... its bias ...
    2.weight   out h0       ... and columns of the next are the same neurons
    2.bias     out

    free       h0=32
    fixed      in=64 out=10

Two dimensions move together exactly when they carry the same *axis* name. A *free* axis may be permuted without
changing the function that the network computes; a *fixed* axis carries meaning of its own (inputs, outputs, kernel
taps). Dimensions may be composed (`nfn_optim.symmetry.expression`):

    (c y x)         a flattened product, as the columns of a linear layer behind a flatten; each factor permutes alone
    (head > dim)    a product in which `dim` is *nested* in `head`: each head permutes its own channels its own way
    (q + k)         blocks laid end to end, as the rows of a fused projection

A nested axis is one set of neurons for every entry of the axes that it is nested in, written `dim[head]=8` where sizes
are listed.

A `Symmetry` is a value: it can be written by hand, printed, parsed back, compared and stored. Tracing a module
(`nfn_optim.symmetry.trace`) produces one; nothing else about a network is needed to build an equivariant layer.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2, arXiv:2302.14040
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nfn_optim.symmetry import expression as dimension
from nfn_optim.symmetry.expression import Expression, Occurrence, Product, axes_of, entries_within, occurrences_of

_LISTED = re.compile(r"([^\s()=>+\[\],]+)(?:\[([^\]]*)\])?=(\d+)")


@dataclass(frozen=True)
class Symmetry:
    """The permutation symmetry of a set of named tensors.

    Args:
        dims: Parameter name -> one dimension expression for each of its dimensions (`()` for a scalar).
        sizes: Axis name -> number of entries.
        fixed: Axes that must not be permuted; all the others are free.
        nested: Free axis -> the axes that it is nested in; what `dims` say with `>` is added.

    Raises:
        ValueError: An axis has no size, a size is negative, a fixed or nested axis does not occur, or axes are
            nested in a circle.

    Example:
        >>> s = Symmetry({"w": ("h", "in"), "b": ("h",)}, sizes={"h": 3, "in": 2}, fixed=frozenset({"in"}))
        >>> print(s)
        w      h in
        b      h
        <BLANKLINE>
        free   h=3
        fixed  in=2
        >>> Symmetry.parse(str(s)) == s
        True
    """

    dims: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]
    fixed: frozenset[str] = frozenset()
    nested: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that everything fits, and write it the one way that it is written."""
        read = {name: [dimension.parse(dim) for dim in dims] for name, dims in self.dims.items()}
        used = dict.fromkeys(axis for dims in read.values() for expression, _ in dims for axis in axes_of(expression))
        if missing := [axis for axis in used if axis not in self.sizes]:
            raise ValueError(f"expected a size for every axis, found none for {missing}; add them to `sizes`")
        if bad := {axis: size for axis, size in self.sizes.items() if size < 0}:
            raise ValueError(f"expected sizes of at least 0, found {bad}")
        mentioned = set(self.fixed).union(*([axis, *parents] for axis, parents in self.nested.items()))
        if unused := sorted(mentioned - set(used)):
            raise ValueError(f"expected the axes to occur in a parameter, {unused} do not; known: {list(used)}")
        said = [self.nested, *(nested for dims in read.values() for _, nested in dims)]
        nested = _ancestors(used, said, self.fixed)
        dims = {name: tuple(dimension.write(e, nested) for e, _ in found) for name, found in read.items()}
        object.__setattr__(self, "dims", dims)
        object.__setattr__(self, "sizes", {axis: int(self.sizes[axis]) for axis in used})
        object.__setattr__(self, "fixed", frozenset(self.fixed))
        object.__setattr__(self, "nested", nested)

    def __hash__(self) -> int:
        """Equal symmetries have equal hashes."""
        return hash((tuple(self.dims.items()), tuple(self.sizes.items()), self.fixed, tuple(self.nested.items())))

    # ------------------------------------------------------------------------------------------------ what it says

    @property
    def axes(self) -> tuple[str, ...]:
        """All axis names, in order of first appearance."""
        return tuple(self.sizes)

    @property
    def free(self) -> tuple[str, ...]:
        """The axes that may be permuted, in order of first appearance."""
        return tuple(axis for axis in self.sizes if axis not in self.fixed)

    def size_of(self, dim: str) -> int:
        """The length of a dimension."""
        return dimension.length_of(dimension.parse(dim)[0], self.sizes)

    def copies_of(self, axis: str) -> int:
        """How many copies of an axis there are: one, or one for every entry of the axes that it is nested in."""
        return math.prod(self.sizes[parent] for parent in self.nested.get(axis, ()))

    def expressions_of(self, name: str) -> tuple[Expression, ...]:
        """The dimensions of a parameter, read."""
        return tuple(dimension.parse(dim)[0] for dim in self.dims[name])

    def axes_of(self, name: str) -> tuple[str, ...]:
        """The axes that a parameter carries, as often as they occur."""
        return tuple(axis for expression in self.expressions_of(name) for axis in axes_of(expression))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape that a parameter must have."""
        return tuple(self.size_of(dim) for dim in self.dims[name])

    def check(self, params: Mapping[str, Tensor], batch_dims: int = 0) -> None:
        """Raise unless `params` are exactly the tensors that this symmetry describes.

        Args:
            params: Name -> tensor of shape `(*batch, *shape)`.
            batch_dims: How many leading dimensions are batch.

        Raises:
            ValueError: Names are missing or unknown, or a shape does not fit.
        """
        missing, unknown = [n for n in self.dims if n not in params], [n for n in params if n not in self.dims]
        if missing or unknown:
            raise ValueError(
                f"the symmetry does not name the same tensors: missing {missing}, not in the symmetry {unknown}; "
                f"use symmetry.restrict(names) for a part of a network, or trace the network again"
            )
        for name, value in params.items():
            shape, found = self.shape_of(name), tuple(value.shape[batch_dims:])
            if shape != found:
                raise ValueError(
                    f"expected {name!r} of shape {shape} = {self.dims[name]}, found {found}; "
                    f"trace the network again or correct the sizes {dict(self.sizes)}"
                )

    # ------------------------------------------------------------------------------------------------- making one

    @classmethod
    def separate(cls, shapes: Mapping[str, Iterable[int]]) -> Symmetry:
        """The symmetry that claims nothing: every dimension of every tensor is a fixed axis of its own.

        Args:
            shapes: Parameter name -> its shape.
        """
        dims, sizes = {}, {}
        for name, shape in shapes.items():
            lengths = {f"{name}.{d}": int(length) for d, length in enumerate(shape)}
            dims[name] = tuple(lengths)
            sizes.update(lengths)
        return cls(dims, sizes, frozenset(sizes))

    @classmethod
    def spec(
        cls,
        dims: Mapping[str, str],
        params: Mapping[str, Tensor],
        fixed: Iterable[str] = (),
        sizes: Mapping[str, int] | None = None,
    ) -> Symmetry:
        """Write a symmetry by hand; the sizes are read off the tensors.

        Args:
            dims: Parameter name -> its dimensions as one text, e.g. `"h0 in"` or `"out (c h w)"`.
            params: The tensors, for their shapes. A factor of a product must occur alone somewhere, except one ...
            fixed: Axes that must not be permuted.
            sizes: ... or be given here.

        Raises:
            ValueError: A size cannot be told, or two tensors disagree about one.
        """
        read = {name: dimension.split(text) for name, text in dims.items()}
        sizes = dict(sizes or {})
        pending: list[tuple[str, Expression, int]] = []
        for name, found in read.items():
            shape = tuple(params[name].shape)
            if len(shape) != len(found):
                raise ValueError(f"expected {len(found)} dimensions {dims[name]!r} for {name!r}, found {shape}")
            pending += [(name, expression, length) for (expression, _), length in zip(found, shape, strict=True)]
        while pending:
            rest = []
            for name, expression, length in pending:
                unknown = {axis for axis in axes_of(expression) if axis not in sizes}
                if len(unknown) > 1:
                    rest.append((name, expression, length))
                    continue
                for axis in unknown:  # the length is linear in its size
                    least, more = (dimension.length_of(expression, sizes | {axis: n}) for n in (0, 1))
                    sizes[axis] = max(length - least, 0) // max(more - least, 1)
                if (known := dimension.length_of(expression, sizes)) != length:
                    text = dimension.write(expression, {})
                    raise ValueError(f"{name!r}: {text} has {known} entries elsewhere, found {length}")
            if len(rest) == len(pending):
                texts = [dimension.write(e, {}) for _, e, _ in rest]
                raise ValueError(f"cannot tell the sizes of {texts}; give `sizes`")
            pending = rest
        split = {name: tuple(dimension.write(e, nested) for e, nested in found) for name, found in read.items()}
        nested = {axis: parents for found in read.values() for _, said in found for axis, parents in said.items()}
        return cls(split, sizes, frozenset(fixed), nested)

    @classmethod
    def parse(cls, text: str) -> Symmetry:
        """Read back what `print(symmetry)` writes; comments start with `#`.

        Raises:
            ValueError: A line cannot be read.
        """
        dims: dict[str, tuple[str, ...]] = {}
        sizes: dict[str, int] = {}
        fixed: list[str] = []
        nested: dict[str, tuple[str, ...]] = {}
        for raw in text.splitlines():
            line = raw.split("#")[0].strip()
            if not line:
                continue
            head, _, rest = line.partition(" ")
            if head in {"free", "fixed"} and (not rest.strip() or "=" in rest):
                if _LISTED.sub("", rest).strip():
                    raise ValueError(f"expected '{head} axis=size ...', found {line!r}")
                for axis, parents, size in _LISTED.findall(rest):
                    sizes[axis] = int(size)
                    fixed += [axis] if head == "fixed" else []
                    if parents:
                        nested[axis] = tuple(parents.split(","))
            else:
                dims[head] = tuple(dimension.write(e, said) for e, said in dimension.split(rest))
        return cls(dims, sizes, frozenset(fixed), nested)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "dims": {name: list(dims) for name, dims in self.dims.items()},
            "sizes": dict(self.sizes),
            "fixed": sorted(self.fixed),
            "nested": {axis: list(parents) for axis, parents in self.nested.items()},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Symmetry:
        """The inverse of `to_dict`."""
        nested = {axis: tuple(parents) for axis, parents in value.get("nested", {}).items()}
        dims = {name: tuple(dims) for name, dims in value["dims"].items()}
        return cls(dims, value["sizes"], frozenset(value["fixed"]), nested)

    def restrict(self, names: Iterable[str]) -> Symmetry:
        """The same symmetry, seen on some of the tensors only."""
        dims = {name: self.dims[name] for name in names}
        used = {axis for name in dims for axis in self.axes_of(name)}
        within = {axis: tuple(p for p in parents if p in used) for axis, parents in self.nested.items() if axis in used}
        nested = {axis: parents for axis, parents in within.items() if parents}
        return Symmetry(dims, {a: n for a, n in self.sizes.items() if a in used}, self.fixed & used, nested)

    def rename(self, names: Mapping[str, str]) -> Symmetry:
        """The same symmetry with parameters renamed; names that are not given stay."""
        dims = {names.get(n, n): dims for n, dims in self.dims.items()}
        return Symmetry(dims, self.sizes, self.fixed, self.nested)

    def rename_axes(self, names: Mapping[str, str]) -> Symmetry:
        """The same symmetry with axes renamed; names that are not given stay."""

        def new(axis: str) -> str:
            return names.get(axis, axis)

        return Symmetry(
            {
                name: tuple(dimension.write(dimension.rename(e, new), {}) for e in self.expressions_of(name))
                for name in self.dims
            },
            {new(axis): size for axis, size in self.sizes.items()},
            frozenset(map(new, self.fixed)),
            {new(axis): tuple(map(new, parents)) for axis, parents in self.nested.items()},
        )

    def canonical(self) -> Symmetry:
        """The same symmetry with its axes renamed `a0, a1, ...` in order of first appearance.

        Two symmetries say the same, whatever their axes are called, exactly when their canonical forms are equal and
        list the parameters in the same order.
        """
        return self.rename_axes({axis: f"a{number}" for number, axis in enumerate(self.sizes)})

    # ------------------------------------------------------------------------------------------------- its action

    def random_permutations(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One random permutation for every free axis, of a nested one for every entry of the axes it is nested in.

        Returns:
            Axis name -> index tensor of shape `(*sizes of what it is nested in, size)`, int64.
        """
        permutations = {}
        for axis in self.free:
            size, outer = self.sizes[axis], [self.sizes[parent] for parent in self.nested.get(axis, ())]
            copies = [torch.randperm(size, generator=generator) for _ in range(math.prod(outer))]
            stacked = torch.stack(copies) if copies else torch.zeros(0, dtype=torch.int64)
            permutations[axis] = stacked.reshape(*outer, size)
        return permutations

    def compose(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The permutations that do at once what `first` and then `second` do; both permute all free axes."""
        composed = {}
        for axis in self.free:
            copies = second[axis].reshape(-1, self.sizes[axis])
            before = self._moved(axis, second)  # (copies,)
            composed[axis] = first[axis].reshape(copies.shape)[before].gather(-1, copies).reshape(first[axis].shape)
        return composed

    def invert(self, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The permutations that undo others; all free axes are permuted."""
        undone: dict[str, Tensor] = {}
        for axis in sorted(self.free, key=lambda axis: len(self.nested.get(axis, ()))):  # outside in
            copies = permutations[axis].reshape(-1, self.sizes[axis])
            undone[axis] = copies[self._moved(axis, undone)].argsort(-1).reshape(permutations[axis].shape)
        return undone

    def _moved(self, axis: str, permutations: Mapping[str, Tensor]) -> Tensor:
        """Where the copies of an axis come from when what it is nested in is permuted: `(copies,)`."""
        within: tuple[str, ...] = self.nested.get(axis, ())
        index = torch.zeros((), dtype=torch.int64)
        for number, parent in enumerate(within):
            shape = [self.sizes[p] for p in within[: number + 1]]
            entries = torch.arange(self.sizes[parent]).expand(shape)
            if parent in permutations:
                entries = permutations[parent]
                for place, above in enumerate(within[: number + 1]):
                    if above != parent and above not in self.nested.get(parent, ()):
                        entries = entries.unsqueeze(place)
                entries = entries.expand(shape)
            index = index.unsqueeze(-1) * self.sizes[parent] + entries
        return index.reshape(-1)

    def index_of(self, dim: str, permutations: Mapping[str, Tensor]) -> Tensor:
        """How the entries of one dimension are reordered when its axes are permuted.

        Args:
            dim: A dimension that contains what its nested axes are nested in.
            permutations: As for `permute`.

        Returns:
            Index tensor `(size_of(dim),)`, int64.

        Raises:
            ValueError: A nested axis is to be permuted and what it is nested in does not occur in the dimension.
        """
        return self._index(dimension.parse(dim)[0], permutations)

    def _index(self, expression: Expression, permutations: Mapping[str, Tensor]) -> Tensor:
        index = torch.arange(dimension.length_of(expression, self.sizes))
        occurrences = self.occurrences_of(expression)
        for o in occurrences:
            if o.axis in permutations:
                copy = entries_within(o, occurrences, self.nested.get(o.axis, ()), self.sizes)
                if copy is None:
                    raise ValueError(f"expected {self.nested[o.axis]}, which {o.axis!r} is nested in, beside it")
                old = permutations[o.axis].cpu().reshape(-1, self.sizes[o.axis])[copy, o.entries]
                index[o.rows] += (old - o.entries) * o.stride
        return index

    def occurrences_of(self, expression: Expression) -> list[Occurrence]:
        """Where the axes of a dimension, or of a product of dimensions, occur."""
        return occurrences_of(expression, self.sizes)

    @cached_property
    def across(self) -> frozenset[str]:
        """The tensors in which an axis is nested in one that belongs to another dimension."""
        return frozenset(
            name
            for name in self.dims
            for expression in self.expressions_of(name)
            if any(set(self.nested.get(axis, ())) - set(axes_of(expression)) for axis in axes_of(expression))
        )

    def permute(
        self, params: Mapping[str, Tensor], permutations: Mapping[str, Tensor], batch_dims: int = 0
    ) -> dict[str, Tensor]:
        """Rename the neurons: `new[i] = old[permutation[i]]` along every dimension that carries the axis.

        A nested axis is permuted within entry s of what it is nested in by `permutation[s]`, s counted after renaming.

        Args:
            params: Name -> tensor `(*batch, *shape)`, or with more dimensions behind, such as channels.
            permutations: Axis name -> index tensor `(*sizes of what it is nested in, size)`; other axes stay.
            batch_dims: How many leading dimensions are batch.

        Returns:
            New tensors of the same names and shapes.

        Raises:
            ValueError: A permutation is not one, or its axis is fixed or unknown.
        """
        for axis, permutation in permutations.items():
            if axis not in self.sizes or axis in self.fixed:
                raise ValueError(f"expected a free axis, one of {self.free}, found {axis!r}")
            shape = (*(self.sizes[parent] for parent in self.nested.get(axis, ())), self.sizes[axis])
            ordered = torch.arange(self.sizes[axis]).expand(shape)
            if permutation.shape != shape or not torch.equal(permutation.cpu().sort(-1).values, ordered):
                raise ValueError(
                    f"expected a permutation of 0..{self.sizes[axis] - 1} of shape {shape} for axis {axis!r}, "
                    f"found {tuple(permutation.shape)}"
                )
        permuted = {}
        for name, tensor in params.items():
            value = tensor
            if name in self.across and any(axis in permutations for axis in self.axes_of(name)):
                flat = value.flatten(batch_dims, batch_dims + len(self.dims[name]) - 1)
                index = self._index(Product(self.expressions_of(name)), permutations)
                permuted[name] = flat.index_select(batch_dims, index.to(value.device)).reshape(value.shape)
                continue
            for d, expression in enumerate(self.expressions_of(name)):
                if any(axis in permutations for axis in axes_of(expression)):
                    index = self._index(expression, permutations)
                    value = value.index_select(batch_dims + d, index.to(value.device))
            permuted[name] = value
        return permuted

    def _listed(self, axis: str) -> str:
        within = f"[{','.join(self.nested[axis])}]" if axis in self.nested else ""
        return f"{axis}{within}={self.sizes[axis]}"

    def __str__(self) -> str:
        """One line per tensor, then the free and the fixed axes with their sizes; `parse` reads it back."""
        width = max([len(name) for name in self.dims] + [5]) + 2
        lines = [f"{name:<{width}}{' '.join(dims)}".rstrip() for name, dims in self.dims.items()]
        for title, axes in (("free", self.free), ("fixed", [a for a in self.sizes if a in self.fixed])):
            sizes = " ".join(self._listed(axis) for axis in axes)
            lines += ([""] if title == "free" else []) + [f"{title:<{width}}{sizes}".rstrip()]
        return "\n".join(lines)


def _ancestors(
    axes: Iterable[str], said: Iterable[Mapping[str, tuple[str, ...]]], fixed: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Axis -> all axes that it is nested in, directly or not, in order of appearance; fixed axes are nested in none."""
    order = {axis: number for number, axis in enumerate(axes)}
    direct: dict[str, set[str]] = {axis: set() for axis in order}
    for nested in said:
        for axis, parents in nested.items():
            direct[axis] |= set(parents) if axis not in set(fixed) else set()
    found = {}
    for axis in order:
        above: set[str] = set()
        pending = list(direct[axis])
        while pending:
            if (parent := pending.pop()) not in above:
                above.add(parent)
                pending += direct[parent]
        if axis in above:
            raise ValueError(f"expected axes to be nested in others, found {axis!r} nested in itself")
        if above:
            found[axis] = tuple(sorted(above, key=order.__getitem__))
    return found
