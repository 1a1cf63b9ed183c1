"""Inverse square roots of symmetric matrices by a polynomial iteration, many matrices at once.

References:
    Muon (Jordan et al., 2024): the polynomial
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of an odd map that takes singular values of 0.003 to 1 into 0.7 to 1.2
ITERATIONS = 5
MIN_PADDED = 32  # smaller matrices are padded to one size; above, those of up to twice the size


def inverse_root(gram: Tensor) -> Tensor:
    """Roughly A^(-1/2), by which singular values become nearly 1 whose squares are the eigenvalues of A.

    Args:
        gram: Symmetric, without negative eigenvalues, of trace at most 1; `(..., k, k)`.
    """
    shape, (a, b, c) = gram.shape, POLYNOMIAL
    gram = gram.reshape(-1, *shape[-2:])  # `baddbmm` takes one batch dimension; `@` of more is five operations
    rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # of the factor a + rest by which singular values change
    root = rest + a * _identity(shape[-1], gram.dtype, gram.device)
    for _ in range(ITERATIONS - 1):
        image = torch.baddbmm(gram, rest, gram, beta=a)
        gram = torch.baddbmm(image, image, rest, beta=a)
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        root = torch.baddbmm(root, rest, root, beta=a)
    return root.reshape(shape)


def inverse_roots(grams: Sequence[Tensor], traces: Sequence[Tensor], batch_dims: int = 0) -> list[Tensor]:
    """`inverse_root` of matrices of several sizes, those of similar size together.

    Args:
        grams: Symmetric, without negative eigenvalues; `(*batch, ..., k, k)` each.
        traces: Of each an upper bound on its trace, `(*batch, ...)`.
        batch_dims: How many leading dimensions are batch.
    """
    by_size: dict[int, list[int]] = {}
    for i, gram in enumerate(grams):
        by_size.setdefault(max(MIN_PADDED, 1 << (gram.shape[-1] - 1).bit_length()), []).append(i)
    roots: dict[int, Tensor] = {}
    for group in by_size.values():
        size = max(grams[i].shape[-1] for i in group)
        padded = [_pad_square(grams[i], size) for i in group]
        flat = [x.reshape(*x.shape[:batch_dims], -1, size, size) for x in padded]
        trace = torch.cat([traces[i].reshape(*traces[i].shape[:batch_dims], -1) for i in group], -1)[..., None, None]
        together = inverse_root(torch.cat(flat, -3) / trace) / trace.sqrt()
        for i, root in zip(group, torch.split(together, [x.shape[-3] for x in flat], -3), strict=True):
            k = grams[i].shape[-1]
            roots[i] = root[..., :k, :k].reshape(grams[i].shape)
    return [roots[i] for i in range(len(grams))]


@lru_cache(maxsize=64)
def _identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An identity matrix, which a compiled step takes as it is instead of comparing indices."""
    return torch.eye(size, dtype=dtype, device=device)


def _pad_square(gram: Tensor, size: int) -> Tensor:
    """A square matrix padded with zeros."""
    return F.pad(gram, (0, size - gram.shape[-1]) * 2)
