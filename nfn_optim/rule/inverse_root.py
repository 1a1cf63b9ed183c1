"""Inverse square roots of symmetric matrices by polynomials, many matrices at once.

Odd polynomials p(x) = a x + b x^3 + c x^5, one after the other, bring singular values near 1. Written in A = X^T X they
need products of k x k matrices only: four for each polynomial, one for the first.

    REPEATED    the same one five times      from [0.003, 1] into [0.68, 1.21]
    MINIMAX     four, each the one that is closest to 1 in the worst case after those before, for singular values
                from 0.005 on                from [0.005, 1] into [0.92, 1.09], from 0.003 into 0.63

References:
    Muon (Jordan et al., 2024): the repeated polynomial
    The Polar Express (Amsel et al., 2025), arXiv:2505.16932: the best ones in turn
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Polynomials = tuple[tuple[float, float, float], ...]
"""Their a, b, c."""

REPEATED: Polynomials = 5 * ((3.4445, -4.7750, 2.0315),)
MINIMAX: Polynomials = (
    (8.2987, -24.4305, 18.0903),
    (3.9152, -2.9211, 0.5592),
    (3.1746, -2.3804, 0.4978),
    (2.1895, -1.5672, 0.4079),
)
MIN_PADDED = 32  # smaller matrices are padded to one size; above, those of up to twice the size


def inverse_root(gram: Tensor, polynomials: Polynomials = REPEATED) -> Tensor:
    """Roughly A^(-1/2), by which singular values become nearly 1 whose squares are the eigenvalues of A.

    Args:
        gram: Symmetric, without negative eigenvalues, of trace at most 1; `(..., k, k)`.
        polynomials: By which it is computed.
    """
    shape, (first, *others) = gram.shape, polynomials
    gram = gram.reshape(-1, *shape[-2:])  # `baddbmm` takes one batch dimension; `@` of more is five operations
    root = factor = _factor(gram, *first)
    for polynomial in others:
        gram = factor.bmm(gram).bmm(factor)
        factor = _factor(gram, *polynomial)
        root = factor.bmm(root)
    return root.reshape(shape)


def inverse_roots(
    grams: Sequence[Tensor], traces: Sequence[Tensor], batch_dims: int = 0, polynomials: Polynomials = REPEATED
) -> list[Tensor]:
    """`inverse_root` of matrices of several sizes, those of similar size together.

    Args:
        grams: Symmetric, without negative eigenvalues; `(*batch, ..., k, k)` each.
        traces: Of each an upper bound on its trace, `(*batch, ...)`.
        batch_dims: How many leading dimensions are batch.
        polynomials: As of `inverse_root`.
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
        together = inverse_root(torch.cat(flat, -3) / trace, polynomials) / trace.sqrt()
        for i, root in zip(group, torch.split(together, [x.shape[-3] for x in flat], -3), strict=True):
            k = grams[i].shape[-1]
            roots[i] = root[..., :k, :k].reshape(grams[i].shape)
    return [roots[i] for i in range(len(grams))]


def _factor(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """The square matrices a + b A + c A^2, `(T, k, k)`."""
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + _scalar(a, gram.shape[-1], gram.dtype, gram.device)


@lru_cache(maxsize=64)
def _scalar(a: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A multiple of the identity, which a compiled step takes as it is instead of comparing indices."""
    return a * torch.eye(size, dtype=dtype, device=device)


def _pad_square(gram: Tensor, size: int) -> Tensor:
    """A square matrix padded with zeros."""
    return F.pad(gram, (0, size - gram.shape[-1]) * 2)
