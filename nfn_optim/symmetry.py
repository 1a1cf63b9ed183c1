"""Which dimensions of which parameters move together when hidden neurons are renamed.

    0.weight   h0 in        rows of the first layer ...
    0.bias     h0           ... its bias ...
    2.weight   out h0       ... and columns of the next are the same neurons
    2.bias     out

    free       h0=32
    fixed      in=64 out=10

Two dimensions move together exactly when they carry the same *axis* name. A *free* axis may be permuted without
changing the function that the network computes; a *fixed* axis carries meaning of its own (inputs, outputs, kernel
taps). A dimension that is the flattened product of several axes, as the columns of a linear layer behind a
flatten, is written as a *product* `(c h w)`, the first factor varying slowest; each factor permutes on its own.

A `Symmetry` is a value: it can be written by hand, printed, parsed back, compared and stored. Tracing a module
(`nfn_optim.trace`) produces one; nothing else about a network is needed to build an equivariant layer.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2, arXiv:2302.14040
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

_AXIS = re.compile(r"[^\s()=>+]+")


@cache
def factors_of(dim: str) -> tuple[str, ...]:
    """The axes whose product a dimension is.

    Args:
        dim: One dimension as written in a symmetry: `"h0"`, or a product `"(c h w)"`.

    Returns:
        The axis names, slowest first; a single one for a plain dimension.

    Raises:
        ValueError: The text is neither an axis name nor a product of them.

    Example:
        >>> factors_of("h0"), factors_of("(c h w)")
        (('h0',), ('c', 'h', 'w'))
    """
    inner = dim[1:-1] if dim.startswith("(") and dim.endswith(")") else dim
    names = tuple(inner.split()) if inner is not dim else (inner,)
    if not names or any(_AXIS.fullmatch(name) is None for name in names):
        raise ValueError(
            f"expected an axis name such as 'h0' or a product such as '(c h w)', found {dim!r}; names must not contain "
            f"white space or any of '( ) = > +'"
        )
    return names


def dim_of(factors: Iterable[str]) -> str:
    """Write a dimension from its factors; the inverse of `factors_of`.

    Example:
        >>> dim_of(["h0"]), dim_of(["c", "h"])
        ('h0', '(c h)')
    """
    names = tuple(factors)
    return names[0] if len(names) == 1 else f"({' '.join(names)})"


@dataclass(frozen=True)
class Symmetry:
    """The permutation symmetry of a set of named tensors.

    Args:
        dims: Parameter name -> one dimension expression for each of its dimensions (`()` for a scalar).
        sizes: Axis name -> number of entries.
        fixed: Axes that must not be permuted; all the others are free.

    Raises:
        ValueError: An axis has no size, a size is not positive, or a fixed axis does not occur.

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

    def __post_init__(self) -> None:
        """Check that the sizes and the fixed axes fit the dimensions."""
        dims = {name: tuple(expressions) for name, expressions in self.dims.items()}
        used = dict.fromkeys(axis for expressions in dims.values() for dim in expressions for axis in factors_of(dim))
        if missing := [axis for axis in used if axis not in self.sizes]:
            raise ValueError(f"expected a size for every axis, found none for {missing}; add them to `sizes`")
        if bad := {axis: size for axis, size in self.sizes.items() if size < 0}:
            raise ValueError(f"expected sizes of at least 0, found {bad}")
        if unused := sorted(set(self.fixed) - set(used)):
            raise ValueError(f"expected the fixed axes to occur in a parameter, {unused} do not; known: {list(used)}")
        object.__setattr__(self, "dims", dims)
        object.__setattr__(self, "sizes", {axis: int(self.sizes[axis]) for axis in used})
        object.__setattr__(self, "fixed", frozenset(self.fixed))

    def __hash__(self) -> int:
        """Equal symmetries have equal hashes."""
        return hash((tuple(self.dims.items()), tuple(sorted(self.sizes.items())), self.fixed))

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
        """The length of a dimension: the product of the sizes of its factors."""
        return math.prod(self.sizes[axis] for axis in factors_of(dim))

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
        split = {name: _split(text) for name, text in dims.items()}
        sizes = dict(sizes or {})
        pending = []
        for name, expressions in split.items():
            shape = tuple(params[name].shape)
            if len(shape) != len(expressions):
                raise ValueError(f"expected {len(expressions)} dimensions {expressions} for {name!r}, found {shape}")
            pending += [(name, factors_of(dim), length) for dim, length in zip(expressions, shape, strict=True)]
        while pending:
            rest = []
            for name, factors, length in pending:
                unknown = [axis for axis in factors if axis not in sizes]
                if len(unknown) > 1:
                    rest.append((name, factors, length))
                    continue
                known = math.prod(sizes[axis] for axis in factors if axis not in unknown)
                if unknown and known and length % known == 0:
                    sizes[unknown[0]] = length // known
                elif unknown or known != length:
                    raise ValueError(f"{name!r}: {dim_of(factors)} has {known} entries elsewhere, found {length}")
            if len(rest) == len(pending):
                raise ValueError(f"cannot tell the sizes of {[dim_of(f) for _, f, _ in rest]}; give `sizes`")
            pending = rest
        return cls(split, sizes, frozenset(fixed))

    @classmethod
    def parse(cls, text: str) -> Symmetry:
        """Read back what `print(symmetry)` writes; comments start with `#`.

        Raises:
            ValueError: A line cannot be read.
        """
        dims: dict[str, tuple[str, ...]] = {}
        sizes: dict[str, int] = {}
        fixed: list[str] = []
        for raw in text.splitlines():
            line = raw.split("#")[0].strip()
            if not line:
                continue
            head, _, rest = line.partition(" ")
            if head in {"free", "fixed"} and (not rest.strip() or "=" in rest):
                try:
                    found = {axis: int(size) for axis, size in (item.split("=") for item in rest.split())}
                except ValueError as error:
                    raise ValueError(f"expected '{head} axis=size ...', found {line!r}") from error
                sizes.update(found)
                fixed += found if head == "fixed" else []
            else:
                dims[head] = _split(rest)
        return cls(dims, sizes, frozenset(fixed))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "dims": {name: list(dims) for name, dims in self.dims.items()},
            "sizes": dict(self.sizes),
            "fixed": sorted(self.fixed),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Symmetry:
        """The inverse of `to_dict`."""
        return cls(
            {name: tuple(dims) for name, dims in value["dims"].items()}, value["sizes"], frozenset(value["fixed"])
        )

    def restrict(self, names: Iterable[str]) -> Symmetry:
        """The same symmetry, seen on some of the tensors only."""
        dims = {name: self.dims[name] for name in names}
        used = {axis for expressions in dims.values() for dim in expressions for axis in factors_of(dim)}
        return Symmetry(dims, {a: n for a, n in self.sizes.items() if a in used}, self.fixed & used)

    def rename(self, names: Mapping[str, str]) -> Symmetry:
        """The same symmetry with parameters renamed; names that are not given stay."""
        return Symmetry({names.get(n, n): dims for n, dims in self.dims.items()}, self.sizes, self.fixed)

    def canonical(self) -> Symmetry:
        """The same symmetry with its axes renamed `a0, a1, ...` in order of first appearance.

        Two symmetries say the same, whatever their axes are called, exactly when their canonical forms are equal and
        list the parameters in the same order.
        """
        new = {axis: f"a{number}" for number, axis in enumerate(self.sizes)}
        return Symmetry(
            {
                name: tuple(dim_of(new[axis] for axis in factors_of(dim)) for dim in dims)
                for name, dims in self.dims.items()
            },
            {new[axis]: size for axis, size in self.sizes.items()},
            frozenset(new[axis] for axis in self.fixed),
        )

    # ------------------------------------------------------------------------------------------------- its action

    def random_permutations(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One random permutation for every free axis.

        Returns:
            Axis name -> index tensor of shape `(size,)`, int64.
        """
        return {axis: torch.randperm(self.sizes[axis], generator=generator) for axis in self.free}

    def index_of(self, dim: str, permutations: Mapping[str, Tensor]) -> Tensor:
        """How the entries of one dimension are reordered when its axes are permuted.

        Args:
            dim: A plain or product dimension.
            permutations: Axis name -> index tensor `(size,)`; axes that are not given stay.

        Returns:
            Index tensor `(size_of(dim),)`, int64.
        """
        index = torch.zeros(1, dtype=torch.int64)
        for axis in factors_of(dim):
            step = permutations.get(axis)
            step = torch.arange(self.sizes[axis]) if step is None else step.cpu()
            index = (index[:, None] * self.sizes[axis] + step).reshape(-1)  # (slower factors * this one,)
        return index

    def permute(
        self, params: Mapping[str, Tensor], permutations: Mapping[str, Tensor], batch_dims: int = 0
    ) -> dict[str, Tensor]:
        """Rename the neurons: `new[i] = old[permutation[i]]` along every dimension that carries the axis.

        Args:
            params: Name -> tensor `(*batch, *shape)`.
            permutations: Axis name -> index tensor `(size,)`; axes that are not given stay.
            batch_dims: How many leading dimensions are batch.

        Returns:
            New tensors of the same names and shapes.

        Raises:
            ValueError: A permutation is not one, or its axis is fixed or unknown.
        """
        for axis, permutation in permutations.items():
            if axis not in self.sizes or axis in self.fixed:
                raise ValueError(f"expected a free axis, one of {self.free}, found {axis!r}")
            if not torch.equal(permutation.cpu().sort().values, torch.arange(self.sizes[axis])):
                raise ValueError(f"expected a permutation of 0..{self.sizes[axis] - 1} for axis {axis!r}")
        permuted = {}
        for name, tensor in params.items():
            value = tensor
            for d, dim in enumerate(self.dims[name]):
                if any(axis in permutations for axis in factors_of(dim)):
                    value = value.index_select(batch_dims + d, self.index_of(dim, permutations).to(value.device))
            permuted[name] = value
        return permuted

    def __str__(self) -> str:
        """One line per tensor, then the free and the fixed axes with their sizes; `parse` reads it back."""
        width = max([len(name) for name in self.dims] + [5]) + 2
        lines = [f"{name:<{width}}{' '.join(dims)}".rstrip() for name, dims in self.dims.items()]
        for title, axes in (("free", self.free), ("fixed", [a for a in self.sizes if a in self.fixed])):
            sizes = " ".join(f"{axis}={self.sizes[axis]}" for axis in axes)
            lines += ([""] if title == "free" else []) + [f"{title:<{width}}{sizes}".rstrip()]
        return "\n".join(lines)


def _split(text: str) -> tuple[str, ...]:
    """Cut `"out (c h w)"` into its dimensions."""
    parts = tuple(re.findall(r"\([^()]*\)|[^\s()]+", text))
    if re.sub(r"\s", "", "".join(parts)) != re.sub(r"\s", "", text):
        raise ValueError(f"expected dimensions such as 'h0 in' or 'out (c h w)', found {text!r}")
    for part in parts:
        factors_of(part)
    return parts
