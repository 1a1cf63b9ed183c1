"""The symmetries of several calls put together, and completed to exactly the parameters that there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from nfn_optim.symmetry import expression as dimension
from nfn_optim.symmetry.expression import Expression
from nfn_optim.symmetry.symmetry import Symmetry

Axis = tuple[int, str]  # number of the call, name of the axis there


def complete(symmetry: Symmetry, params: Mapping[str, Tensor]) -> Symmetry:
    """The symmetry of exactly `params`, in their order.

    Args:
        symmetry: Of some of them, and perhaps of others.
        params: Name -> tensor; those that `symmetry` does not name get fixed axes of their own.
    """
    rest = Symmetry.separate({name: p.shape for name, p in params.items() if name not in symmetry.dims})
    dims = {name: rest.dims[name] if name in rest.dims else symmetry.dims[name] for name in params}
    sizes, fixed = {**symmetry.sizes, **rest.sizes}, symmetry.fixed | rest.fixed
    return Symmetry({**symmetry.dims, **dims}, sizes, fixed, symmetry.nested).restrict(params)


def merge(parts: Sequence[Symmetry]) -> Symmetry:
    """Put the symmetries of several calls side by side.

    Axes of different parts stay apart, except where a tensor is used by both: its dimensions are then the same axes,
    and fixed if they are fixed in one of them. A part in which a tensor shares no axis and has no free one says
    nothing about it.

    Args:
        parts: One symmetry for each call; the same name is the same tensor.

    Returns:
        A symmetry of all the tensors that they name. The axes of several parts are called `number.axis`.
    """
    parent: dict[Axis, Axis] = {}
    fixed: set[Axis] = {(k, axis) for k, part in enumerate(parts) for axis in part.fixed}

    def root(axis: Axis) -> Axis:
        while axis in parent:
            axis = parent[axis]
        return axis

    linked = [_linked(part) for part in parts]
    chosen: dict[str, int] = {}
    for name in dict.fromkeys(name for part in parts for name in part.dims):
        uses = [k for k, part in enumerate(parts) if name in part.dims]
        uses = [k for k in uses if name in linked[k]] or uses[:1]
        first = chosen[name] = uses[0]
        for k in uses[1:]:
            pairs = list(zip(parts[first].axes_of(name), parts[k].axes_of(name), strict=False))
            if _shape(parts[first], name) == _shape(parts[k], name):
                for one, other in ((root((first, a)), root((k, b))) for a, b in pairs):
                    if one != other:
                        parent[other] = one
                        fixed |= {one} if other in fixed else set()
            else:  # two factorizations of one dimension: nothing moves
                fixed |= {root((use, axis)) for use in (first, k) for axis in parts[use].axes_of(name)}
    fixed_roots = {root(axis) for axis in fixed}
    nested: dict[Axis, set[Axis]] = {}
    for k, part in enumerate(parts):
        for axis in part.axes:
            found = {root((k, above)) for above in part.nested.get(axis, ())}
            nested[root((k, axis))] = nested.get(root((k, axis)), found) & found

    def name_of(axis: Axis) -> str:
        return axis[1] if len(parts) == 1 else f"{axis[0]}.{axis[1]}"

    dims: dict[str, tuple[str, ...]] = {}
    sizes: dict[str, int] = {}
    for name, k in chosen.items():

        def renamed(axis: str, use: int = k) -> str:
            return name_of(root((use, axis)))

        expressions = [dimension.rename(expression, renamed) for expression in parts[k].expressions_of(name)]
        dims[name] = tuple(dimension.write(expression, {}) for expression in expressions)
        sizes |= {renamed(axis): parts[k].sizes[axis] for axis in parts[k].axes_of(name)}
    fixed_names = {name_of(axis) for axis in fixed_roots} & sizes.keys()
    kept = {
        name_of(axis): tuple(name_of(above) for above in found)
        for axis, found in nested.items()
        if found and name_of(axis) in sizes.keys() - fixed_names
    }
    return Symmetry(dims, sizes, frozenset(fixed_names), kept)


def _shape(symmetry: Symmetry, name: str) -> list[Expression]:
    """The dimensions of a parameter with sizes in the place of names."""
    return [dimension.rename(e, lambda axis: str(symmetry.sizes[axis])) for e in symmetry.expressions_of(name)]


def _linked(symmetry: Symmetry) -> set[str]:
    """The tensors that have a free axis or share one with another tensor."""
    carried = {name: set(symmetry.axes_of(name)) for name in symmetry.dims}
    carriers = Counter(axis for axes in carried.values() for axis in axes)
    return {name for name, axes in carried.items() if any(a not in symmetry.fixed or carriers[a] > 1 for a in axes)}
