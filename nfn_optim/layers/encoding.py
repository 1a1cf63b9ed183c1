"""Encodings of feature values, and of positions on fixed axes.

    values       SinusoidalValues, FourierValues     x -> sines and cosines of x at several frequencies
    positions    PositionEncoding, LearnedEncoding   index of the input, output, kernel tap and tensor

A network for `free_ends(symmetry)` (NP) cannot distinguish inputs or outputs; with their positions encoded in its
features it can, and is equivariant to the permutations of `symmetry` (HNP) only.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 3 and App. E, arXiv:2302.14040
    Fourier Features (Tancik et al., 2020), Sec. 4, arXiv:2006.10739
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nfn_optim.layers.feature_dict import module_key
from nfn_optim.symmetry import Symmetry


def sinusoids(x: Tensor, bands: int, max_frequency: float) -> Tensor:
    """Sines and cosines of x at equally spaced frequencies, and x itself. `(...)` to `(..., 2 * bands + 1)`.

    Args:
        x: Any values.
        bands: Number of frequencies.
        max_frequency: Frequencies run from 1 to `max_frequency / 2`, in half cycles per unit.
    """
    frequencies = torch.linspace(1.0, max_frequency / 2, bands, device=x.device, dtype=x.dtype)
    angles = x[..., None] * frequencies * math.pi
    return torch.cat([angles.sin(), angles.cos(), x[..., None]], -1)


class SinusoidalValues(nn.Module):
    """Replace every channel by its sines and cosines at equally spaced frequencies, and itself.

    Args:
        bands: Number of frequencies.
        max_frequency: Frequencies run from 1 to `max_frequency / 2`, in half cycles per unit.
    """

    def __init__(self, bands: int = 6, max_frequency: float = 10.0) -> None:
        super().__init__()
        self.bands, self.max_frequency = bands, max_frequency

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode. Name -> `(*batch, *shape, C)` to name -> `(*batch, *shape, C * (2 * bands + 1))`."""
        return {name: sinusoids(x, self.bands, self.max_frequency).flatten(-2) for name, x in features.items()}


class FourierValues(nn.Module):
    """Replace the channels by sines and cosines of random linear combinations of them.

    Args:
        in_channels: Channels of every tensor.
        size: Number of combinations; the output has `2 * size` channels.
        scale: Standard deviation of the frequencies, in cycles per unit.
    """

    frequencies: Tensor

    def __init__(self, in_channels: int, size: int = 256, scale: float = 10.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(in_channels, size) * scale)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode. Name -> `(*batch, *shape, in_channels)` to name -> `(*batch, *shape, 2 * size)`."""
        angles = {name: 2 * math.pi * (x @ self.frequencies) for name, x in features.items()}
        return {name: torch.cat([angle.sin(), angle.cos()], -1) for name, angle in angles.items()}


class PositionEncoding(nn.Module):
    """Append sinusoidal encodings of the positions on fixed axes and of the tensor, summed: `2 * bands + 1` channels.

    Args:
        symmetry: The tensors and their axes.
        axes: The fixed axes to encode; default all.
        bands: Number of frequencies.
        max_frequency: Frequencies run from 1 to `max_frequency / 2`, in half cycles per unit; positions from -1 to 1.
        scale: Root mean square length of the encoding vector of a tensor, over its positions. By default 1, as much as
            one standardised channel (`Standardise`): longer ones drown values.
        tensors: Whether to encode the index of the tensor.

    Attributes:
        extra_channels: Number of appended channels.

    Raises:
        ValueError: One of the axes is not fixed.
    """

    def __init__(
        self,
        symmetry: Symmetry,
        axes: Iterable[str] | None = None,
        *,
        bands: int = 6,
        max_frequency: float = 10.0,
        scale: float = 1.0,
        tensors: bool = True,
    ) -> None:
        super().__init__()
        self.extra_channels = 2 * bands + 1
        encoded = _fixed_axes(symmetry, axes)
        self._ndims = {name: len(dims) for name, dims in symmetry.dims.items()}
        indices = torch.linspace(-1.0, 1.0, len(symmetry.dims))
        codes = sinusoids(indices, bands, max_frequency) * float(tensors)
        for name, code in zip(symmetry.dims, codes, strict=True):
            tables = []
            for d, expression in enumerate(symmetry.expressions_of(name)):
                table = torch.zeros(symmetry.shape_of(name)[d], self.extra_channels)
                for o in symmetry.occurrences_of(expression):
                    if o.axis in encoded:
                        positions = torch.linspace(-1.0, 1.0, symmetry.sizes[o.axis])
                        table[o.rows] += sinusoids(positions, bands, max_frequency)[o.entries]
                tables.append(table)
            length = _mean_square_length(code, tables) ** 0.5
            factor = scale / length if length else 0.0
            self.register_buffer(f"{module_key(name)} tensor", code * factor, persistent=False)
            for d, table in enumerate(tables):
                self.register_buffer(f"{module_key(name)} {d}", table * factor, persistent=False)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Append. Name -> `(*batch, *shape, C)` to name -> `(*batch, *shape, C + 2 * bands + 1)`."""
        out = {}
        for name, ndim in self._ndims.items():
            x, code = features[name], self.get_buffer(f"{module_key(name)} tensor")
            for d in range(ndim):
                table = self.get_buffer(f"{module_key(name)} {d}")
                code = code + table.reshape(-1, *(1,) * (ndim - 1 - d), self.extra_channels)  # (*shape, extra)
            out[name] = torch.cat([x, code.to(x.dtype).expand(*x.shape[:-1], self.extra_channels)], -1)
        return out


class LearnedEncoding(nn.Module):
    """Add a learned vector for each tensor and for every position on the fixed axes.

    Args:
        symmetry: The tensors and their axes.
        channels: Channels of every tensor.
        axes: The fixed axes to encode; default all.

    Raises:
        ValueError: One of the axes is not fixed.
    """

    def __init__(self, symmetry: Symmetry, channels: int, axes: Iterable[str] | None = None) -> None:
        super().__init__()
        encoded = _fixed_axes(symmetry, axes)
        self._ndims = {name: len(dims) for name, dims in symmetry.dims.items()}
        names = [module_key(name) for name in symmetry.dims]
        self.tensors = nn.ParameterDict({name: nn.Parameter(torch.randn(channels)) for name in names})
        self.axes = nn.ParameterDict(
            {module_key(axis): nn.Parameter(torch.randn(symmetry.sizes[axis], channels)) for axis in encoded}
        )
        self._occurrences: dict[str, list[tuple[int, str, str]]] = {name: [] for name in symmetry.dims}
        for name in symmetry.dims:
            for d, expression in enumerate(symmetry.expressions_of(name)):
                for number, o in enumerate(symmetry.occurrences_of(expression)):
                    if o.axis in encoded:
                        prefix = f"{module_key(name)} {d} {number}"
                        self.register_buffer(f"{prefix} rows", o.rows, persistent=False)
                        self.register_buffer(f"{prefix} entries", o.entries, persistent=False)
                        self._occurrences[name].append((d, prefix, module_key(o.axis)))

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add. Name -> `(*batch, *shape, channels)`, in and out."""
        out = {}
        for name, ndim in self._ndims.items():
            x = features[name] + self.tensors[module_key(name)]
            for d, prefix, axis in self._occurrences[name]:
                vectors = self.axes[axis]  # (positions, C)
                rows, entries = self.get_buffer(f"{prefix} rows"), self.get_buffer(f"{prefix} entries")
                table = vectors.new_zeros(features[name].shape[d - ndim - 1], vectors.shape[-1])
                table = table.index_add(0, rows, vectors[entries])  # zero in the other parts of a sum
                x = x + table.reshape(-1, *(1,) * (ndim - 1 - d), table.shape[-1])
            out[name] = x
        return out


def _mean_square_length(constant: Tensor, tables: list[Tensor]) -> float:
    """Mean over all positions of the squared length of `constant + tables[0][i] + tables[1][j] + ...`."""
    tables = [table for table in tables if len(table)]
    mean = constant + sum((table.mean(0) for table in tables), torch.zeros_like(constant))
    spread = sum(float(table.var(0, correction=0).sum()) for table in tables)
    return float(mean.square().sum()) + spread


def _fixed_axes(symmetry: Symmetry, axes: Iterable[str] | None) -> tuple[str, ...]:
    selected = [a for a in symmetry.sizes if a in symmetry.fixed] if axes is None else list(axes)
    if free := [axis for axis in selected if axis not in symmetry.fixed]:
        raise ValueError(f"expected fixed axes, as only these have positions: {sorted(symmetry.fixed)}, found {free}")
    return tuple(selected)
