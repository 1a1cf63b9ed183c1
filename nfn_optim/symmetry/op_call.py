"""One call of an op in the graph, as the rules see it.

Legend: see `nfn_optim.symmetry.axes` for `Dim` and `Dims`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from nfn_optim.symmetry.axes import Dim, Dims, size_of
from nfn_optim.symmetry.unification import unify


def _unknown(*_: Any) -> Any:
    raise RuntimeError("expected an op within a trace")


@dataclass
class OpCall:
    """One call of an op.

    Args:
        overload: Overload of the op, e.g. `"default"`.
        args: Its arguments by their names in the schema, defaults included.
        outs: The tensors that it returned.
        before: Shape and strides of the first tensor before the op, which may have changed them in place.
        lookup: Tensor -> its dimensions.
        fix_on_use: Fixes dimensions once a tensor is used: indices into an axis give its order a meaning.
        add_index_space: Records the index space of the op, where it is more than an input's or an output's.
        is_weight: Whether its only tensor is a parameter or a buffer, or was made of a single one.
    """

    overload: str
    args: Mapping[str, Any]
    outs: tuple[Tensor, ...]
    before: tuple[tuple[int, ...], tuple[int, ...]]
    lookup: Callable[[Tensor], Dims] = _unknown
    fix_on_use: Callable[[Tensor, Sequence[Dim]], None] = _unknown
    add_index_space: Callable[[Dims], None] = _unknown
    is_weight: bool = False

    def dims(self, name: str) -> Dims:
        """The dimensions of a tensor argument; `()` for a scalar."""
        value = self.args[name]
        return self.lookup(value) if isinstance(value, Tensor) else ()

    def shape(self, out: int = 0) -> tuple[int, ...]:
        """The shape of an output."""
        return tuple(int(size) for size in self.outs[out].shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors among the arguments, lists included."""
        tensors: list[Tensor] = []
        for value in self.args.values():
            tensors += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]
        return tuple(tensors)

    @property
    def first(self) -> Dims:
        """The dimensions of the first tensor argument."""
        return self.lookup(self.tensors[0])

    def dim_indices(self, name: str) -> list[int]:
        """The dimensions of the first tensor that an argument refers to, counted from 0; all if it is empty."""
        value, total = self.args.get(name), len(self.first)
        indices = [value] if isinstance(value, int) else list(value or range(total))
        return [index % total for index in indices] if total else []


Result: TypeAlias = Dims | Callable[[], Dims]
"""The dimensions of an output, or a function that returns them when the output is first used."""
Rule: TypeAlias = Callable[[OpCall], Sequence[Result]]


def broadcast(inputs: Sequence[Dims], shape: Sequence[int]) -> Dims:
    """Unify dimensions as broadcasting aligns them; dimensions of size 1 fit any size.

    The first ones come first, as the others may differ between their parts.

    Raises:
        ValueError: No input has the size of the output along some dimension.
    """
    merged: list[Dim] = []
    for back, size in zip(range(len(shape), 0, -1), shape, strict=True):
        aligned = [dims[-back] for dims in inputs if len(dims) >= back and size_of(dims[-back]) == size]
        if not aligned:
            raise ValueError(f"no input has size {size} along dimension {-back}")
        aligned.sort(key=len, reverse=True)  # a dimension of size 1 keeps its axis, if it has one
        for other in aligned[1:]:
            unify(aligned[0], other)
        merged.append(aligned[0])
    return tuple(merged)
