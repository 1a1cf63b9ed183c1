"""Real views of complex tensors, with one more axis for the real and the imaginary part.

    W   complex (h, in)   ->   (h, in, 2), the same memory

The rule reads complex parameters as such views. The last axis is fixed, since its two entries differ in meaning. The
state of a complex parameter is complex too, as with `torch.optim.AdamW`: moments of the real part are in the real part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nfn_optim.symmetry import Symmetry


def real(value: Tensor) -> Tensor:
    """The real view `(*shape, 2)` of a complex tensor `(*shape)`; a real one is its own."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def symmetry_of_views(symmetry: Symmetry, params: Mapping[str, Tensor]) -> Symmetry:
    """The symmetry of the real views.

    Args:
        symmetry: The symmetry of `params`.
        params: Name -> tensor.
    """
    parts = {name: f"{name}.complex" for name, p in params.items() if p.is_complex()}
    if not parts:
        return symmetry
    dims = {name: (*dims, parts[name]) if name in parts else dims for name, dims in symmetry.dims.items()}
    sizes = {**symmetry.sizes, **dict.fromkeys(parts.values(), 2)}
    return Symmetry(dims, sizes, symmetry.fixed | frozenset(parts.values()), symmetry.nested)
