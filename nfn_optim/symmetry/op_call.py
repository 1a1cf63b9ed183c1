"""One op of the graph, as the rules see it.

Legend: see `nfn_optim.symmetry.axes` for `Dim` and `Dims`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from nfn_optim.symmetry.axes import Dim, Dims, size_of, unify


@dataclass(frozen=True)
class Call:
    """One op of the graph, as it was called.

    Args:
        overload: Which overload of the op, e.g. `"default"`.
        args: Its arguments by the names of the schema, defaults included.
        outs: The tensors that it returned.
        lookup: Tensor -> its dimensions.
        fix_on_use: Fixes dimensions as soon as a tensor is read: indices into an axis give its order a meaning.
        joint: Records the index set that the op computes over, where it is more than an input's or an output's.
        before: Shape and strides of the first tensor before the op, which may have changed them in place.
    """

    overload: str
    args: Mapping[str, Any]
    outs: tuple[Tensor, ...]
    lookup: Callable[[Tensor], Dims]
    fix_on_use: Callable[[Tensor, Sequence[Dim]], None]
    joint: Callable[[Dims], None]
    before: tuple[tuple[int, ...], tuple[int, ...]]

    def dims(self, name: str) -> Dims:
        """The dimensions of a tensor argument; `()` for a scalar."""
        value = self.args[name]
        return self.lookup(value) if isinstance(value, Tensor) else ()

    def shape(self, out: int = 0) -> tuple[int, ...]:
        """The shape of an output."""
        return tuple(int(size) for size in self.outs[out].shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors among the arguments, lists unpacked."""
        found: list[Tensor] = []
        for value in self.args.values():
            found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]
        return tuple(found)

    @property
    def first(self) -> Dims:
        """The dimensions of the first tensor argument."""
        return self.lookup(self.tensors[0])

    def axes_of(self, name: str) -> list[int]:
        """Which dimensions of the first tensor an argument means: counted from 0; all if it gives none."""
        value, total = self.args.get(name), len(self.first)
        numbers = [value] if isinstance(value, int) else list(value or range(total))
        return [number % total for number in numbers] if total else []


Result: TypeAlias = Dims | Callable[[], Dims]
"""The dimensions of an output, or what gives them once somebody reads it."""
Rule: TypeAlias = Callable[[Call], Sequence[Result]]


def broadcast(inputs: Sequence[Dims], shape: Sequence[int]) -> Dims:
    """Unify dimensions as broadcasting lines them up; those of size 1 fit anything.

    Raises:
        ValueError: No input is as long as the output along some dimension.
    """
    merged: list[Dim] = []
    for back, size in enumerate(reversed(shape), start=1):
        here = [dims[-back] for dims in inputs if len(dims) >= back and size_of(dims[-back]) == size]
        if not here:
            raise ValueError(f"no input has size {size} along dimension {-back}")
        here.sort(key=len, reverse=True)  # a dimension of size 1 keeps its axis, if it has one
        for other in here[1:]:
            unify(here[0], other)
        merged.insert(0, here[0])
    return tuple(merged)
