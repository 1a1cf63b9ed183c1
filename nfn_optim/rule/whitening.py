"""Whitening: columns of the momentum are made independent of each other before singular values are made equal.

What enters a layer is correlated, and so are the columns of its gradients. With N = M U the momentum of a matrix in its
subspace (`nfn_optim.rule.subspace`), the newest gradient mixed in as in X,

    C  <-  DECAY C + (1 - DECAY) N^T N / |N|^2        at every refresh, turned with U
    W   =  (C + DAMPING tr(C) / n)^(-1/2)             with n the number of its columns that count
    Z'  =  (1 - a) Z + a |Z| N W / |N W|              which takes the place of Z

a is learned. C is the Gram matrix of one side of Shampoo, of the momentum instead of gradients, so that it costs no
pass over the weights of its own. N is not divided by sqrt(v): with X in its place half of the gain is lost. The mean of
both is better than either one. All of it commutes with permuting rows and columns, needs no eigenvectors, and is
O(neurons k^2). Where there is no subspace and more than MAX_COLUMNS times its dimension of columns, Z' is Z.

References:
    Shampoo: Preconditioned Stochastic Tensor Optimization (Gupta et al., 2018), arXiv:1802.09568
    SOAP: Improving and Stabilizing Shampoo using Adam (Vyas et al., 2024), arXiv:2409.11321
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nfn_optim.rule.inverse_root import REPEATED, Polynomials, inverse_roots

GRAM, WHITENER = "column_gram", "whitener"
DECAY = 0.96
DAMPING = 0.01
MAX_COLUMNS = 2  # times the dimension of the largest subspace: beyond, whitening costs more than everything else
TINY = 1e-12  # a momentum of smaller norm is not amplified


def init_whitener(p: Tensor, batch: torch.Size, size: int) -> dict[str, Tensor]:
    """C and W before the first step, zeros; with W = 0, Z' is Z up to a factor.

    Args:
        p: The parameter.
        batch: Sizes of its batch dimensions.
        size: k.
    """
    dtype = torch.promote_types(p.dtype, torch.float32)
    return {key: torch.zeros((*batch, size, size), dtype=dtype, device=p.device) for key in (GRAM, WHITENER)}


def whiten(projected: Tensor, momentum: Tensor, whitener: Tensor, part: Tensor) -> Tensor:
    """Z', `(*batch, rows, k)`.

    Args:
        projected: Z, the same shape.
        momentum: N, the same shape.
        whitener: W, `(*batch, k, k)`.
        part: a, `(*batch,)` or a scalar.
    """
    whitened = _unit(momentum) @ whitener
    part = part[..., None, None]
    length = part * torch.linalg.matrix_norm(projected, keepdim=True)
    return torch.addcmul((1 - part) * projected, whitened, length / _norm(whitened))


@torch.no_grad()
def next_whiteners(
    grams: Sequence[Tensor],
    momenta: Sequence[Tensor],
    counts: Sequence[Tensor],
    turns: Sequence[Tensor | None],
    batch_dims: int,
    polynomials: Polynomials = REPEATED,
) -> list[tuple[Tensor, Tensor]]:
    """C and W after this step.

    Args:
        grams: C before it, of every matrix `(*batch, ..., k, k)`.
        momenta: N, `(*batch, ..., rows, k)`.
        counts: n, `(*batch, ...)`: idle columns make no difference to the others.
        turns: U^T U', `(*batch, ..., k, k)`, where the basis changes from U to U'.
        batch_dims: How many leading dimensions are batch.
        polynomials: Of the root, see `inverse_root`.
    """
    new = []
    for gram, momentum, turn in zip(grams, momenta, turns, strict=True):
        unit = _unit(momentum)
        moved = torch.lerp(unit.mT @ unit, gram, DECAY)
        new.append(moved if turn is None else turn.mT @ moved @ turn)
    traces = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in new]
    damped = [
        gram + torch.diag_embed((DAMPING * trace / n.clamp(min=1)).unsqueeze(-1).expand(gram.shape[:-1]))
        for gram, trace, n in zip(new, traces, counts, strict=True)
    ]
    roots = inverse_roots(damped, [(1 + DAMPING) * trace + TINY for trace in traces], batch_dims, polynomials)
    return list(zip(new, roots, strict=True))


def _norm(x: Tensor) -> Tensor:
    """The Frobenius norm of matrices, above 0: `(*batch, 1, 1)`."""
    norm: Tensor = torch.linalg.matrix_norm(x, keepdim=True)
    return norm + TINY


def _unit(x: Tensor) -> Tensor:
    """Matrices of Frobenius norm 1, or 0."""
    return x / _norm(x)
