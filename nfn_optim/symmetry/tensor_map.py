"""Values by tensor, compared by identity and held weakly."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

from torch import Tensor

V = TypeVar("V")


class TensorMap(Generic[V]):
    """Tensor -> value. An entry goes with its tensor, so that an address that is used again is not taken for it."""

    def __init__(self) -> None:
        """See the class."""
        self._table: dict[int, tuple[weakref.ref[Tensor], V]] = {}

    def get(self, tensor: Tensor) -> V | None:
        """The value of a tensor; None if it has none."""
        entry = self._table.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def __setitem__(self, tensor: Tensor, value: V) -> None:
        """Replace the value of a tensor."""
        key, table = id(tensor), self._table

        def remove(reference: Any) -> None:
            entry = table.get(key)
            if entry is not None and entry[0] is reference:
                del table[key]

        table[key] = weakref.ref(tensor, remove), value

    def pop(self, tensor: Tensor) -> None:
        """Remove the value of a tensor, if it has one."""
        if self.get(tensor) is not None:
            del self._table[id(tensor)]

    def by_id(self) -> dict[int, V]:
        """The values by the ids of the tensors."""
        return {key: value for key, (reference, value) in self._table.items() if reference() is not None}

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._table)
