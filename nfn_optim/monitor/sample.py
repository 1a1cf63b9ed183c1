"""Entries of tensors to look at: all of a small tensor, a fixed random choice of a large one.

What is shown of a layer (a ratio of root mean squares, a cosine) is known to a percent or two from two thousand of its
entries, so that watching costs the same however large the layers are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MOST = 2048  # entries looked at of one tensor


class Sample:
    """Which entries are looked at of T tensors of certain shapes.

    Args:
        tensors: Tensors of these shapes, none of them empty.

    Attributes:
        device: Where entries are put together: where the tensors are, or on the CPU if that differs.
        dtype: In which they are: float32, or float64 if a tensor is.
        coordinates: For every tensor one index tensor `(count,)` for each dimension.
        sizes: Number of entries of every tensor, `(T,)`.
        weights: How many of them one that is taken stands for, `(T,)`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        devices = {t.device for t in tensors}
        self.device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        self.dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        self.shapes = [t.shape for t in tensors]
        self.counts = [min(t.numel(), MOST) for t in tensors]
        generator = torch.Generator().manual_seed(0)
        self.coordinates: list[tuple[Tensor, ...]] = []
        for t, count in zip(tensors, self.counts, strict=True):
            if count < t.numel():
                found = tuple(torch.randint(length, (count,), generator=generator) for length in t.shape)
            else:
                found = tuple(torch.unravel_index(torch.arange(count), t.shape))
            self.coordinates.append(tuple(index.to(t.device) for index in found))
        self.sizes = torch.tensor([float(t.numel()) for t in tensors], device=self.device, dtype=self.dtype)
        self.weights = self.sizes / torch.tensor(self.counts, device=self.device)
        self.zeros = [torch.zeros(count, device=self.device, dtype=self.dtype) for count in self.counts]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors have the shapes that this was made for, and are where they were."""
        return self.shapes == [t.shape for t in tensors] and all(
            not index or index[0].device == t.device for index, t in zip(self.coordinates, tensors, strict=True)
        )

    def take(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Entries of tensors.

        Args:
            tensors: T tensors of the shapes that this was made for; None for zeros.

        Returns:
            `(T, largest count)`, zeros behind the end of a smaller one; always a copy.
        """
        taken = [
            zeros if t is None else (t.reshape(-1) if len(zeros) == t.numel() else t[index]).to(self.device, self.dtype)
            for t, zeros, index in zip(tensors, self.zeros, self.coordinates, strict=True)
        ]
        return pad_sequence(taken, batch_first=True) if taken else torch.zeros(0, 0, device=self.device)

    def put(self, values: Sequence[Tensor | float]) -> Tensor:
        """Put one number of every tensor together, `(T,)`."""
        found = [value for value in values if isinstance(value, Tensor)]
        if not found:
            return torch.tensor(values, device=self.device, dtype=self.dtype)
        if len(found) < len(values) or len({(t.device, t.dtype, t.shape) for t in found}) > 1:
            found = [torch.as_tensor(value, dtype=self.dtype).to(self.device).reshape(()) for value in values]
        return torch.stack(found).reshape(len(values)).to(self.device, self.dtype)
