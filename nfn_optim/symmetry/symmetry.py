"""The permutation symmetry of a network's parameters, as a value.

    0.weight   h0 in        rows of the first layer ...
    0.bias     h0           ... its bias ...
    2.weight   out h0       ... and columns of the next are the same neurons
    2.bias     out

    free       h0=32
    fixed      in=64 out=10

All dimensions that carry the same *axis* name are permuted together. A *free* axis may be permuted without changing
the function that the network computes; the order of a *fixed* axis is meaningful (inputs, outputs, kernel taps).
Dimensions may be composed of several axes (`nfn_optim.symmetry.expression`):

    (c y x)         a flattened product, as the columns of a linear layer after a flatten; each factor permutes alone
    (head > dim)    a product in which `dim` is *nested* in `head`: each head permutes its own channels
    (q + k)         a concatenation, as the rows of a fused projection

A `Symmetry` can be written by hand, printed, parsed, compared and stored. Tracing a module
(`nfn_optim.symmetry.trace`) produces one; equivariant layers need nothing else from a network.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2, arXiv:2302.14040
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nfn_optim.symmetry.expression import (
    Expression,
    Occurrence,
    Product,
    axes_of,
    format_dim,
    infer_sizes,
    length_of,
    nesting_closure,
    occurrences_of,
    parse_dim,
    parse_dims,
    rename_axes,
)
from nfn_optim.symmetry.permutation import PermutationGroup
from nfn_optim.symmetry.text import format_table, parse_table


@dataclass(frozen=True)
class Symmetry:
    """The permutation symmetry of a set of named tensors.

    Args:
        dims: Parameter name -> one expression for each of its dimensions (`()` for a scalar).
        sizes: Axis name -> number of entries.
        fixed: Axes that must not be permuted; all others are free.
        nested: Free axis -> the axes that it is nested in, in addition to the nesting that `dims` declare with `>`.

    Raises:
        ValueError: An axis has no size, a size is negative, a fixed or nested axis does not occur, or the nesting is
            cyclic.

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
        """Validate, and normalise: equal symmetries have equal fields."""
        parsed = {name: [parse_dim(dim) for dim in dims] for name, dims in self.dims.items()}
        used = dict.fromkeys(axis for dims in parsed.values() for expression, _ in dims for axis in axes_of(expression))
        if missing := [axis for axis in used if axis not in self.sizes]:
            raise ValueError(f"expected a size for every axis, found none for {missing}; add them to `sizes`")
        if negative := {axis: size for axis, size in self.sizes.items() if size < 0}:
            raise ValueError(f"expected sizes of at least 0, found {negative}")
        mentioned = set(self.fixed).union(*([axis, *parents] for axis, parents in self.nested.items()))
        if unused := sorted(mentioned - set(used)):
            raise ValueError(f"expected fixed and nested axes to occur in `dims`, {unused} do not; known: {list(used)}")
        declared = [self.nested, *(nested for dims in parsed.values() for _, nested in dims)]
        nested = nesting_closure(used, declared, self.fixed)
        dims = {name: tuple(format_dim(e, nested) for e, _ in parts) for name, parts in parsed.items()}
        object.__setattr__(self, "dims", dims)
        object.__setattr__(self, "sizes", {axis: int(self.sizes[axis]) for axis in used})
        object.__setattr__(self, "fixed", frozenset(self.fixed))
        object.__setattr__(self, "nested", nested)

    def __hash__(self) -> int:
        """Equal symmetries have equal hashes."""
        return hash((tuple(self.dims.items()), tuple(self.sizes.items()), self.fixed, tuple(self.nested.items())))

    # --------------------------------------------------------------------------------------------------- properties

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
        return length_of(parse_dim(dim)[0], self.sizes)

    def copies_of(self, axis: str) -> int:
        """The number of copies of an axis: one, or one for every entry of the axes that it is nested in."""
        return math.prod(self.sizes[parent] for parent in self.nested.get(axis, ()))

    def expressions_of(self, name: str) -> tuple[Expression, ...]:
        """The dimensions of a parameter, parsed."""
        return tuple(parse_dim(dim)[0] for dim in self.dims[name])

    def axes_of(self, name: str) -> tuple[str, ...]:
        """The axes of a parameter in order, repeated if they occur repeatedly."""
        return tuple(axis for expression in self.expressions_of(name) for axis in axes_of(expression))

    def occurrences_of(self, expression: Expression) -> list[Occurrence]:
        """All occurrences of axes in a dimension, or in a product of dimensions."""
        return occurrences_of(expression, self.sizes)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape that a parameter must have."""
        return tuple(self.size_of(dim) for dim in self.dims[name])

    @cached_property
    def nested_across_dims(self) -> frozenset[str]:
        """The tensors in which an axis is nested in an axis of another dimension."""
        return frozenset(
            name
            for name in self.dims
            for expression in self.expressions_of(name)
            if any(set(self.nested.get(axis, ())) - set(axes_of(expression)) for axis in axes_of(expression))
        )

    def check(self, params: Mapping[str, Tensor], batch_dims: int = 0) -> None:
        """Raise unless `params` are exactly the tensors that this symmetry describes.

        Args:
            params: Name -> tensor of shape `(*batch, *shape)`.
            batch_dims: Number of leading batch dimensions.

        Raises:
            ValueError: Names are missing or unknown, or a shape does not fit.
        """
        missing, unknown = [n for n in self.dims if n not in params], [n for n in params if n not in self.dims]
        if missing or unknown:
            raise ValueError(
                f"expected exactly the tensors of the symmetry: missing {missing}, not in the symmetry {unknown}; "
                f"use symmetry.restrict(names) for a part of a network, or trace the network again"
            )
        for name, value in params.items():
            expected, actual = self.shape_of(name), tuple(value.shape[batch_dims:])
            if expected != actual:
                raise ValueError(
                    f"expected {name!r} of shape {expected} = {self.dims[name]}, found {actual}; "
                    f"trace the network again or correct the sizes {dict(self.sizes)}"
                )

    # ------------------------------------------------------------------------------------------------- constructors

    @classmethod
    def separate(cls, shapes: Mapping[str, Iterable[int]]) -> Symmetry:
        """The trivial symmetry: every dimension of every tensor is a fixed axis of its own.

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
        """A symmetry written by hand; sizes are inferred from the shapes of the tensors.

        Args:
            dims: Parameter name -> its dimensions as one text, e.g. `"h0 in"` or `"out (c h w)"`.
            params: The tensors; only their shapes are used.
            fixed: Axes that must not be permuted.
            sizes: Sizes of axes that shapes do not determine: all but one of a product's factors need a size from
                another dimension or from here.

        Raises:
            ValueError: A size cannot be inferred, or two tensors contradict each other.
        """
        parsed = {name: parse_dims(text) for name, text in dims.items()}
        lengths: list[tuple[str, Expression, int]] = []
        for name, parts in parsed.items():
            shape = tuple(params[name].shape)
            if len(shape) != len(parts):
                raise ValueError(f"expected {len(parts)} dimensions {dims[name]!r} for {name!r}, found {shape}")
            lengths += [(name, expression, length) for (expression, _), length in zip(parts, shape, strict=True)]
        texts = {name: tuple(format_dim(e, nested) for e, nested in parts) for name, parts in parsed.items()}
        nested = {
            axis: parents for parts in parsed.values() for _, declared in parts for axis, parents in declared.items()
        }
        return cls(texts, infer_sizes(lengths, sizes or {}), frozenset(fixed), nested)

    @classmethod
    def parse(cls, text: str) -> Symmetry:
        """The inverse of `str(symmetry)`; comments start with `#`.

        Raises:
            ValueError: A line cannot be parsed.
        """
        return cls(*parse_table(text))

    def __str__(self) -> str:
        """One line per tensor, then the free and the fixed axes with their sizes."""
        return format_table(self.dims, self.sizes, self.fixed, self.nested)

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

    # -------------------------------------------------------------------------------------------- derived symmetries

    def restrict(self, names: Iterable[str]) -> Symmetry:
        """The symmetry of some of the tensors."""
        dims = {name: self.dims[name] for name in names}
        used = {axis for name in dims for axis in self.axes_of(name)}
        within = {axis: tuple(p for p in parents if p in used) for axis, parents in self.nested.items() if axis in used}
        nested = {axis: parents for axis, parents in within.items() if parents}
        return Symmetry(dims, {a: n for a, n in self.sizes.items() if a in used}, self.fixed & used, nested)

    def rename(self, names: Mapping[str, str]) -> Symmetry:
        """The same symmetry with parameters renamed: old name -> new name; other names stay."""
        dims = {names.get(n, n): dims for n, dims in self.dims.items()}
        return Symmetry(dims, self.sizes, self.fixed, self.nested)

    def rename_axes(self, names: Mapping[str, str]) -> Symmetry:
        """The same symmetry with axes renamed: old name -> new name; other names stay."""

        def new(axis: str) -> str:
            return names.get(axis, axis)

        dims = {
            name: tuple(format_dim(rename_axes(e, new), {}) for e in self.expressions_of(name)) for name in self.dims
        }
        sizes = {new(axis): size for axis, size in self.sizes.items()}
        nested = {new(axis): tuple(map(new, parents)) for axis, parents in self.nested.items()}
        return Symmetry(dims, sizes, frozenset(map(new, self.fixed)), nested)

    def canonical(self) -> Symmetry:
        """The same symmetry with its axes renamed `a0, a1, ...` in order of first appearance.

        Two symmetries whose parameters are in the same order are equal up to the names of axes exactly if their
        canonical forms are equal.
        """
        return self.rename_axes({axis: f"a{index}" for index, axis in enumerate(self.sizes)})

    # ------------------------------------------------------------------------------------------------------- action

    @cached_property
    def _group(self) -> PermutationGroup:
        return PermutationGroup(self.sizes, self.free, self.nested)

    def random_permutations(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """A random permutation of every free axis; of a nested one for every entry of the axes it is nested in.

        Returns:
            Axis name -> index tensor of shape `(*sizes of the axes it is nested in, size)`, int64.
        """
        return self._group.random(generator)

    def compose(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The permutations equivalent to `first` followed by `second`; both permute all free axes."""
        return self._group.compose(first, second)

    def invert(self, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse permutations; all free axes are permuted."""
        return self._group.invert(permutations)

    def index_of(self, dim: str, permutations: Mapping[str, Tensor]) -> Tensor:
        """How permutations reorder the entries of one dimension.

        Args:
            dim: A dimension; for every nested axis, it contains the axes that this one is nested in.
            permutations: As for `permute`.

        Returns:
            Index tensor `(size_of(dim),)`, int64.

        Raises:
            ValueError: A nested axis is permuted, and an axis that it is nested in does not occur in the dimension.
        """
        return self._group.index_of(parse_dim(dim)[0], permutations)

    def permute(
        self, params: Mapping[str, Tensor], permutations: Mapping[str, Tensor], batch_dims: int = 0
    ) -> dict[str, Tensor]:
        """Permute the neurons: `new[i] = old[permutation[i]]` along every dimension that carries the axis.

        Within entry s of the axes that it is nested in, a nested axis is permuted by `permutation[s]`; s is counted
        after those axes are permuted.

        Args:
            params: Name -> tensor `(*batch, *shape)`; further dimensions, such as channels, may follow.
            permutations: Axis name -> index tensor `(*sizes of the axes it is nested in, size)`; other axes stay.
            batch_dims: Number of leading batch dimensions.

        Returns:
            New tensors with the same names and shapes.

        Raises:
            ValueError: An index tensor is not a permutation, or its axis is fixed or unknown.
        """
        self._group.check(permutations)
        permuted = {}
        for name, tensor in params.items():
            value, expressions = tensor, self.expressions_of(name)
            if name in self.nested_across_dims and any(axis in permutations for axis in self.axes_of(name)):
                flat = value.flatten(batch_dims, batch_dims + len(expressions) - 1)
                index = self._group.index_of(Product(expressions), permutations)
                permuted[name] = flat.index_select(batch_dims, index.to(value.device)).reshape(value.shape)
                continue
            for d, expression in enumerate(expressions):
                if any(axis in permutations for axis in axes_of(expression)):
                    index = self._group.index_of(expression, permutations)
                    value = value.index_select(batch_dims + d, index.to(value.device))
            permuted[name] = value
        return permuted
