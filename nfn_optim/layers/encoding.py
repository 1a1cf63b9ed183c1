"""Encodings: of the values that entries have, and of the places that they have where places mean something.

    values      SinusoidalValues, FourierValues    x -> sines and cosines of x at several frequencies
    places      PositionEncoding, LearnedEncoding  which input, which output, which tap, which tensor

Encoding the places of inputs and outputs gives layers for `free_ends(symmetry)` (NP) back what they lost: the network
then commutes with the permutations of `symmetry` only.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 3 and App. E, arXiv:2302.14040
    Fourier Features (Tancik et al., 2020), Sec. 4, arXiv:2006.10739
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nfn_optim.layers.deepsets import slot_of
from nfn_optim.symmetry import Symmetry


def waves(x: Tensor, bands: int, max_frequency: float) -> Tensor:
    """Sines, cosines and the numbers themselves. `(...)` to `(..., 2 * bands + 1)`; frequencies in half turns."""
    scales = torch.linspace(1.0, max_frequency / 2, bands, device=x.device, dtype=x.dtype)
    angles = x[..., None] * scales * math.pi
    return torch.cat([angles.sin(), angles.cos(), x[..., None]], -1)


class SinusoidalValues(nn.Module):
    """Sines and cosines of every channel at equally spaced frequencies, and the channels themselves.

    Args:
        bands: Number of frequencies.
        max_frequency: Twice the largest of them, in half turns.

    `C` channels become `C * (2 * bands + 1)`.
    """

    def __init__(self, bands: int = 6, max_frequency: float = 10.0) -> None:
        super().__init__()
        self.bands, self.max_frequency = bands, max_frequency

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode. Name -> `(*batch, *shape, C)` to name -> `(*batch, *shape, C * (2 * bands + 1))`."""
        return {name: waves(x, self.bands, self.max_frequency).flatten(-2) for name, x in features.items()}


class FourierValues(nn.Module):
    """Sines and cosines of random mixtures of the channels.

    Args:
        in_channels: Channels of every tensor's features.
        size: Number of mixtures; `2 * size` channels come out.
        scale: Standard deviation of the frequencies, in turns.
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
    """Append `2 * bands + 1` channels that say which entries of the fixed axes, and which tensor, an entry belongs to.

    Args:
        symmetry: The tensors and their axes.
        axes: The fixed axes to encode; all of them if not given.
        bands: Number of frequencies.
        max_frequency: Twice the largest of them, in half turns; positions run from -1 to 1.
        tensors: Encode the place of the tensor among the tensors, too.

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
        tensors: bool = True,
    ) -> None:
        super().__init__()
        self.extra_channels = 2 * bands + 1
        wanted = _fixed_axes(symmetry, axes)
        self._orders = {name: len(dims) for name, dims in symmetry.dims.items()}
        places = waves(torch.linspace(-1.0, 1.0, len(symmetry.dims)), bands, max_frequency) * float(tensors)
        for name, place in zip(symmetry.dims, places, strict=True):
            self.register_buffer(f"{slot_of(name)} place", place, persistent=False)
            for d, expression in enumerate(symmetry.expressions_of(name)):
                table = torch.zeros(symmetry.shape_of(name)[d], self.extra_channels)
                for o in symmetry.occurrences_of(expression):
                    if o.axis in wanted:
                        line = torch.linspace(-1.0, 1.0, symmetry.sizes[o.axis])
                        table[o.rows] += waves(line, bands, max_frequency)[o.entries]
                self.register_buffer(f"{slot_of(name)} {d}", table, persistent=False)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Append. Name -> `(*batch, *shape, C)` to name -> `(*batch, *shape, C + 2 * bands + 1)`."""
        out = {}
        for name, order in self._orders.items():
            x, code = features[name], self.get_buffer(f"{slot_of(name)} place")
            for d in range(order):
                table = self.get_buffer(f"{slot_of(name)} {d}")
                code = code + table.reshape(-1, *(1,) * (order - 1 - d), self.extra_channels)  # (*shape, extra)
            out[name] = torch.cat([x, code.to(x.dtype).expand(*x.shape[:-1], self.extra_channels)], -1)
        return out


class LearnedEncoding(nn.Module):
    """Add a learned vector for each tensor and for every position of the fixed axes.

    Args:
        symmetry: The tensors and their axes.
        channels: Channels of every tensor's features.
        axes: The fixed axes to encode; all of them if not given.

    Raises:
        ValueError: One of the axes is not fixed.
    """

    def __init__(self, symmetry: Symmetry, channels: int, axes: Iterable[str] | None = None) -> None:
        super().__init__()
        wanted = _fixed_axes(symmetry, axes)
        self._orders = {name: len(dims) for name, dims in symmetry.dims.items()}
        self.tensors = nn.ParameterDict({slot_of(name): nn.Parameter(torch.randn(channels)) for name in symmetry.dims})
        self.axes = nn.ParameterDict(
            {f"of {slot_of(a)}": nn.Parameter(torch.randn(symmetry.sizes[a], channels)) for a in wanted}
        )
        self._places: dict[str, list[list[str]]] = {}
        for name in symmetry.dims:
            self._places[name] = []
            for d, expression in enumerate(symmetry.expressions_of(name)):
                here = []
                for number, o in enumerate(symmetry.occurrences_of(expression)):
                    if o.axis in wanted:
                        slot = f"{slot_of(name)} {d} {number}"
                        self.register_buffer(f"{slot} rows", o.rows, persistent=False)
                        self.register_buffer(f"{slot} entries", o.entries, persistent=False)
                        here.append(f"{slot}|of {slot_of(o.axis)}")
                self._places[name].append(here)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add. Name -> `(*batch, *shape, channels)`, both ways."""
        out = {}
        for name, order in self._orders.items():
            out[name] = features[name] + self.tensors[slot_of(name)]
            for d, here in enumerate(self._places[name]):
                for place in here:
                    slot, axis = place.split("|")
                    vectors = self.axes[axis]
                    table = vectors.new_zeros(features[name].shape[d - order - 1], vectors.shape[-1])
                    entries = vectors[self.get_buffer(f"{slot} entries")]
                    table = table.index_add(0, self.get_buffer(f"{slot} rows"), entries)
                    out[name] = out[name] + table.reshape(-1, *(1,) * (order - 1 - d), table.shape[-1])
        return out


def _fixed_axes(symmetry: Symmetry, axes: Iterable[str] | None) -> tuple[str, ...]:
    wanted = [a for a in symmetry.sizes if a in symmetry.fixed] if axes is None else list(axes)
    if free := [axis for axis in wanted if axis not in symmetry.fixed]:
        raise ValueError(f"expected fixed axes, some of {sorted(symmetry.fixed)}, found {free}: neurons have no place")
    return tuple(wanted)
