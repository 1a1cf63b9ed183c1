"""Whether a matrix was trained before, from its spectrum.

    r = s_1 / (RMS (sqrt(rows) + sqrt(rest)))

A matrix of independent entries has a largest singular value s_1 that makes r about 1, whatever they are drawn from; an
orthogonal one has less. Training adds a few directions that are much longer than any of these. Steps that suit a random
matrix tear such directions apart, so the step-size adaptation of a matrix (`nfn_optim.rule.step_size`) starts at

    G = ln(PRETRAINED_STEP) clamp((r - R_RANDOM) / (R_TRAINED - R_RANDOM), 0, 1)

and finds from there what fits. A new head beside old weights starts as any new matrix.

References:
    Limit of the smallest eigenvalue of a large dimensional sample covariance matrix (Bai and Yin, 1993): r tends to 1
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from nfn_optim.engine.sharding import whole

PRETRAINED_STEP = 0.05
R_RANDOM, R_TRAINED = 1.15, 1.3
PROBES, ITERATIONS = 4, 4


def initial_log_step_size(p: Tensor, batch_dims: int = 0) -> Tensor:
    """G of a tensor before the first step.

    Args:
        p: Weights `(*batch, *shape)`.
        batch_dims: How many leading dimensions are batch.

    Returns:
        `(*batch,)`; 0 for vectors. Of a sharded tensor it is that of the whole one, which is gathered for it.
    """
    if p.dim() - batch_dims < 2 or p.numel() == 0 or p.is_meta:  # noqa: PLR2004 - a matrix has two dimensions
        dtype = torch.promote_types(p.dtype, torch.float32)
        return torch.zeros(p.shape[:batch_dims], dtype=dtype, device=p.device)  # plain, whatever the tensor is
    share = (spectral_ratio(whole(p).flatten(batch_dims + 1)) - R_RANDOM) / (R_TRAINED - R_RANDOM)
    return math.log(PRETRAINED_STEP) * share.clamp(0, 1)


@torch.no_grad()
def spectral_ratio(matrices: Tensor) -> Tensor:
    """r, from below by some steps of subspace iteration.

    These start from sums of the powers of entries, so that r is the same however rows and columns are permuted.

    Args:
        matrices: `(*batch, rows, rest)`.

    Returns:
        `(*batch,)`; 0 for matrices of which all entries are equal.
    """
    x = matrices.detach().to(torch.promote_types(matrices.dtype, torch.float32))
    rows, rest = x.shape[-2:]
    x = x - x.mean((-2, -1), keepdim=True)
    rms = x.square().mean((-2, -1), keepdim=True).sqrt()
    x = torch.where(rms > 0, x / rms, 0.0)
    probes = torch.stack([x.pow(k).sum(-2) for k in range(1, PROBES + 1)], -1)
    with torch.autocast(x.device.type, enabled=False) if is_autocast_available(x.device.type) else nullcontext():
        for _ in range(ITERATIONS):
            probes = x.mT @ (x @ torch.linalg.qr(probes).Q)
        largest = torch.linalg.matrix_norm(x @ torch.linalg.qr(probes).Q, 2)
    return torch.nan_to_num(largest / (math.sqrt(rows) + math.sqrt(rest)))
