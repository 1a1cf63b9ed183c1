"""Which tensors share memory with a tensor that nobody has seen before.

`tensor.data` and unpacked tensors of autograd are made without an op that a dispatch mode could see. They lie in the
same storage as the tensor that they alias. A storage is referenced weakly: its memory is released as ever, only its
descriptor of a few bytes stays, so that its address is not used again.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

V = TypeVar("V")
PRUNE_AFTER = 4096


class StorageTable(Generic[V]):
    """Storage -> the layouts of tensors in it, and a value for each."""

    def __init__(self) -> None:
        """See the class."""
        self._table: dict[int, tuple[StorageWeakRef, dict[Any, V]]] = {}
        self._prune_at = PRUNE_AFTER

    def add(self, tensor: Tensor, value: V) -> None:
        """Add a tensor; one of the same layout in the same storage is replaced. One without a storage is ignored."""
        try:
            storage = tensor.untyped_storage()
            key, layout = int(storage._cdata), (tensor.shape, tensor.stride(), tensor.storage_offset())
        except (NotImplementedError, RuntimeError):  # sparse tensors, wrapper subclasses
            return
        if (found := self._table.get(key)) is not None:
            found[1][layout] = value
            return
        self._table[key] = StorageWeakRef(storage), {layout: value}  # type: ignore[no-untyped-call]
        if len(self._table) >= self._prune_at:
            self._table = {k: entry for k, entry in self._table.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
            self._prune_at = max(PRUNE_AFTER, 2 * len(self._table))

    def find(self, tensor: Tensor) -> tuple[V | None, list[V]]:
        """The value of a tensor of the same layout in the same storage, and those of all tensors in that storage."""
        try:
            _, values = self._table[int(tensor.untyped_storage()._cdata)]
        except (KeyError, NotImplementedError, RuntimeError):
            return None, []
        return values.get((tensor.shape, tensor.stride(), tensor.storage_offset())), list(values.values())


def storage_of(tensor: Tensor) -> int:
    """An identifier of a tensor's storage, which it shares with its views."""
    return int(tensor.untyped_storage()._cdata)
