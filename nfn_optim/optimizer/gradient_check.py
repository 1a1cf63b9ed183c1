"""Whether gradients are finite, and their squares too, so that a step can be taken.

On a CPU that is checked before the step. On other devices a check would synchronise, so the answer stays there as a
tensor, and the step changes nothing where it is False (`Execution.grads_finite`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Kinds = dict[tuple[torch.device, torch.dtype], list[Tensor]]


def on_cpu(grads: Sequence[Tensor]) -> bool:
    """Whether all gradients are on a CPU, where reading them does not synchronise."""
    return all(g.is_cpu for g in grads)


def grads_finite(grads: Sequence[Tensor]) -> bool:
    """Whether all gradients and their squares are finite in the precision of the state; synchronises.

    Raises:
        RuntimeError: A gradient is sparse.
    """
    for (_, dtype), dense in _kinds(grads).items():
        precise, limit = torch.promote_types(dtype, torch.float32), _limit(dtype)
        if torch.stack(torch._foreach_norm(dense, dtype=precise)).sum().item() < limit:
            continue  # fast, and an upper bound on every gradient; but it may overflow
        if not torch.stack(torch._foreach_norm(dense, math.inf)).max().item() < limit:
            return False
    return True


def grads_finite_tensor(grads: Sequence[Tensor]) -> Tensor:
    """The same as a tensor, 0-d, on the device of the first gradient; does not synchronise.

    Args:
        grads: One at least.

    Raises:
        RuntimeError: A gradient is sparse.
    """
    largest = [
        (torch.stack(torch._foreach_norm(dense, math.inf)).max() < _limit(dtype)).to(grads[0].device)
        for (_, dtype), dense in _kinds(grads).items()
    ]
    return torch.stack(largest).all() if largest else torch.ones((), dtype=torch.bool, device=grads[0].device)


def _limit(dtype: torch.dtype) -> float:
    """Gradients whose squares are finite are smaller."""
    return math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).max)


def _kinds(grads: Sequence[Tensor]) -> Kinds:
    """Gradients that are not empty, by device and dtype."""
    kinds: Kinds = {}
    for g in grads:
        if g.layout != torch.strided:
            raise RuntimeError(
                f"NFNOptimizer does not support sparse gradients: expected dense ones, found {g.layout} of shape "
                f"{tuple(g.shape)}; build the embedding with sparse=False or give it to torch.optim.SparseAdam"
            )
        if g.numel() > 0:
            kinds.setdefault((g.device, g.dtype), []).append(g)
    return kinds
