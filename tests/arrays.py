"""Arrays of all shapes that a pass has to do with, and their symmetry."""

from __future__ import annotations

import torch
from torch import Tensor

from nfn_optim.symmetry import Symmetry

SYMMETRY = Symmetry(
    {"k": ("c", "in", "ky", "kx"), "w": ("h", "(c ky)"), "b": ("h",), "s": (), "v": ("out", "h")},
    {"c": 3, "in": 4, "ky": 2, "kx": 5, "h": 7, "out": 2},
)


def draw(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Normal values by name."""
    torch.manual_seed(seed)
    return {n: torch.randn(SYMMETRY.shape_of(n), dtype=torch.float64).to(dtype) for n in SYMMETRY.dims}
