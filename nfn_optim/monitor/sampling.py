"""Sampled entries of tensors: all entries of a small tensor, a fixed random choice of a large one.

Two thousand entries of a layer give a ratio of root mean squares or a cosine to a percent or two, so that an
observation costs the same however large the layers are. The samples are NumPy arrays, for on so few numbers an
operation of NumPy costs a fraction of one of torch.
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
MAX_ENTRIES = 2048  # sampled of one tensor


class Sample:
    """A choice of entries of T tensors.

    Args:
        tensors: Tensors of the shapes and on the devices to sample from, none of them empty.

    Attributes:
        shapes: Shape of every tensor.
        coordinates: For every tensor the indices of its entries, `(dimensions, count)`.
        sizes: Number of entries of every tensor, `(T,)`.
        counts: Number of sampled entries of every tensor, `(T,)`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.shapes, self._devices = [t.shape for t in tensors], [t.device for t in tensors]
        self.sizes = np.array([float(t.numel()) for t in tensors])
        self.counts = [min(t.numel(), MAX_ENTRIES) for t in tensors]
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
        """Whether tensors have the shapes and devices of this sample."""
        return self.shapes == [t.shape for t in tensors] and self._devices == [t.device for t in tensors]

    def take(self, tensors: Sequence[Tensor | None]) -> Array:
        """The sampled entries.

        Args:
            tensors: T tensors of the sample's shapes; None for zeros.

        Returns:
            `(T, largest count)`, a copy; float64 if a tensor of the sample is, else float32. Rows of smaller tensors
            are padded with zeros.
        """
        entries = [
            zeros if t is None else (t.reshape(-1) if index is None else t[index]).to(zeros.dtype)
            for t, zeros, index in zip(tensors, self._zeros, self._indices, strict=True)
        ]
        if len({t.device for t in entries}) > 1:
            entries = [t.cpu() for t in entries]
        padded: Array = pad_sequence(entries, batch_first=True).cpu().numpy() if entries else np.zeros((0, 0))
        return padded


def to_numpy(values: Sequence[Tensor | float]) -> Array:
    """One number for every tensor, `(T,)`, with one synchronization for each device."""
    numbers = list(values)
    for device in {value.device for value in values if isinstance(value, Tensor)} - {torch.device("cpu")}:
        indices = [k for k, value in enumerate(values) if isinstance(value, Tensor) and value.device == device]
        stacked = torch.stack([torch.as_tensor(values[k]).reshape(()).double() for k in indices]).tolist()
        for k, value in zip(indices, stacked, strict=True):
            numbers[k] = value
    return np.array([float(value) for value in numbers])


def local_real_view(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, and the real view of a complex one, `(*shape, 2)`."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return torch.view_as_real(local) if local.is_complex() else local
