"""One symmetry of several module calls, and of exactly the parameters of an optimizer.

Each call is traced by itself, so that axes of different calls are different axes. A tensor that two calls share links
them: its dimensions carry the same axes in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from nfn_optim.symmetry.expression import Expression, format_dim, rename_axes
from nfn_optim.symmetry.symmetry import Symmetry

CallAxis = tuple[int, str]
"""An axis of one call: (index of the call, name of the axis in its symmetry)."""


def complete(symmetry: Symmetry, params: Mapping[str, Tensor]) -> Symmetry:
    """The symmetry of exactly `params`, in their order.

    Args:
        symmetry: The symmetry of some of them, and possibly of other tensors.
        params: Name -> tensor; tensors that `symmetry` does not name get fixed axes of their own.
    """
    rest = Symmetry.separate({name: p.shape for name, p in params.items() if name not in symmetry.dims})
    dims = {name: rest.dims[name] if name in rest.dims else symmetry.dims[name] for name in params}
    sizes, fixed = {**symmetry.sizes, **rest.sizes}, symmetry.fixed | rest.fixed
    return Symmetry({**symmetry.dims, **dims}, sizes, fixed, symmetry.nested).restrict(params)


def merge(parts: Sequence[Symmetry]) -> Symmetry:
    """Merge the symmetries of several calls.

    Axes of different calls stay different, except those of a tensor that both calls use, which are unified; an axis is
    fixed if it is fixed in any call.

    Args:
        parts: One symmetry for each call, of the tensors that it uses; the same name is the same tensor.

    Returns:
        A symmetry of all tensors of all parts. With several parts, axes are named `call.axis`, e.g. `0.h1`.
    """
    parent: dict[CallAxis, CallAxis] = {}
    fixed: set[CallAxis] = {(k, axis) for k, part in enumerate(parts) for axis in part.fixed}

    def root(axis: CallAxis) -> CallAxis:
        while axis in parent:
            axis = parent[axis]
        return axis

    call_of: dict[str, int] = {}  # tensor -> the call whose expressions describe it
    for name in dict.fromkeys(name for part in parts for name in part.dims):
        uses = [k for k, part in enumerate(parts) if name in part.dims]
        first = call_of[name] = uses[0]
        for k in uses[1:]:
            pairs = list(zip(parts[first].axes_of(name), parts[k].axes_of(name), strict=False))
            if _factorisation(parts[first], name) == _factorisation(parts[k], name):
                for one, other in ((root((first, a)), root((k, b))) for a, b in pairs):
                    if one != other:
                        parent[other] = one
                        fixed |= {one} if other in fixed else set()
            else:  # different factorisations of one dimension have no common permutation
                fixed |= {root((use, axis)) for use in (first, k) for axis in parts[use].axes_of(name)}
    fixed_roots = {root(axis) for axis in fixed}
    nested: dict[CallAxis, set[CallAxis]] = {}  # nested only if it is in every call
    for k, part in enumerate(parts):
        for axis in part.axes:
            outer = {root((k, above)) for above in part.nested.get(axis, ())}
            nested[root((k, axis))] = nested.get(root((k, axis)), outer) & outer

    def name_of(axis: CallAxis) -> str:
        return axis[1] if len(parts) == 1 else f"{axis[0]}.{axis[1]}"

    dims: dict[str, tuple[str, ...]] = {}
    sizes: dict[str, int] = {}
    for name, k in call_of.items():

        def renamed(axis: str, call: int = k) -> str:
            return name_of(root((call, axis)))

        expressions = [rename_axes(expression, renamed) for expression in parts[k].expressions_of(name)]
        dims[name] = tuple(format_dim(expression, {}) for expression in expressions)
        sizes |= {renamed(axis): parts[k].sizes[axis] for axis in parts[k].axes_of(name)}
    fixed_names = {name_of(axis) for axis in fixed_roots} & sizes.keys()
    nested_names = {
        name_of(axis): tuple(name_of(above) for above in outer)
        for axis, outer in nested.items()
        if outer and name_of(axis) in sizes.keys() - fixed_names
    }
    return Symmetry(dims, sizes, frozenset(fixed_names), nested_names)


def _factorisation(symmetry: Symmetry, name: str) -> list[Expression]:
    """The dimensions of a parameter with sizes instead of axis names."""
    return [rename_axes(e, lambda axis: str(symmetry.sizes[axis])) for e in symmetry.expressions_of(name)]
