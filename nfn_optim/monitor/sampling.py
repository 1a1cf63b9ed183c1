"""Entries of tensors to look at: all of a small tensor, a fixed random choice of a large one.

What is shown of a layer (a ratio of root mean squares, a cosine) is known to a percent or two from two thousand of its
entries, so that watching costs the same however large the layers are. What is taken is small and goes to NumPy, whose
operations cost a fraction of torch's on so few numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nfn_optim.monitor.writer import Array

Indices = npt.NDArray[np.int64]
MOST = 2048  # entries looked at of one tensor


class Sample:
    """Which entries are looked at of T tensors of certain shapes.

    Args:
        tensors: Tensors of these shapes, none of them empty.

    Attributes:
        coordinates: For every tensor its indices `(dimensions, count)`.
        sizes: Number of entries of every tensor, `(T,)`.
        counts: How many of them are taken, `(T,)`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.shapes, self._devices = [t.shape for t in tensors], [t.device for t in tensors]
        self.sizes = np.array([float(t.numel()) for t in tensors])
        self.counts = [min(t.numel(), MOST) for t in tensors]
        random = np.random.default_rng(0)
        self.coordinates: list[Indices] = []
        for t, count in zip(tensors, self.counts, strict=True):
            if count == t.numel():
                self.coordinates.append(np.indices(t.shape).reshape(t.dim(), count))
            else:
                self.coordinates.append(random.integers(t.shape, size=(count, t.dim())).T)
        self._indices = [
            None if count == t.numel() else tuple(torch.from_numpy(index.copy()).to(t.device))
            for t, count, index in zip(tensors, self.counts, self.coordinates, strict=True)
        ]
        self._double = any(t.dtype == torch.float64 for t in tensors)
        dtype = torch.float64 if self._double else torch.float32
        self._zeros = [torch.zeros(count, dtype=dtype) for count in self.counts]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors have the shapes that this was made for, and are where they were."""
        return self.shapes == [t.shape for t in tensors] and self._devices == [t.device for t in tensors]

    def take(self, tensors: Sequence[Tensor | None]) -> Array:
        """Entries of tensors.

        Args:
            tensors: T tensors of the shapes that this was made for; None for zeros.

        Returns:
            `(T, largest count)`, float64 if a tensor was, else float32; zeros behind the end of a smaller one. A copy.
        """
        taken = [
            zeros if t is None else (t.reshape(-1) if index is None else t[index]).to(zeros.dtype)
            for t, zeros, index in zip(tensors, self._zeros, self._indices, strict=True)
        ]
        if len({t.device for t in taken}) > 1:
            taken = [t.cpu() for t in taken]
        found: Array = pad_sequence(taken, batch_first=True).cpu().numpy() if taken else np.zeros((0, 0))
        return found


def numbers(values: Sequence[Tensor | float]) -> Array:
    """One number of every tensor, `(T,)`, with one synchronization for each device."""
    found = list(values)
    for device in {value.device for value in values if isinstance(value, Tensor)} - {torch.device("cpu")}:
        places = [k for k, value in enumerate(values) if isinstance(value, Tensor) and value.device == device]
        stacked = torch.stack([torch.as_tensor(values[k]).reshape(()).double() for k in places]).tolist()
        for k, value in zip(places, stacked, strict=True):
            found[k] = value
    return np.array([float(value) for value in found])


def plain(tensor: Tensor) -> Tensor:
    """The real numbers that this process holds: of a sharded tensor the local part, of a complex one both parts."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return torch.view_as_real(local) if local.is_complex() else local
