"""Whether a step can be taken with some gradients: they are finite, and so are their squares.

On a CPU that is looked at before the step. Elsewhere to look is to wait for all that the device has still to do, so the
answer stays there, as a tensor, and a step that must not be taken changes nothing (`Kernel.usable`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Kinds = dict[tuple[torch.device, torch.dtype], list[Tensor]]


def is_near(grads: Sequence[Tensor]) -> bool:
    """Whether to look at gradients is not to wait."""
    return all(g.is_cpu for g in grads)


def is_usable(grads: Sequence[Tensor]) -> bool:
    """Whether all gradients are finite and so are their squares, in the precision of the state; waits for them.

    Raises:
        RuntimeError: A gradient is sparse.
    """
    for (_, dtype), dense in _kinds(grads).items():
        precise, most = torch.promote_types(dtype, torch.float32), _most(dtype)
        if torch.stack(torch._foreach_norm(dense, dtype=precise)).sum().item() < most:
            continue  # this is fast, and no gradient is larger than all together; but it may overflow
        if not torch.stack(torch._foreach_norm(dense, math.inf)).max().item() < most:
            return False
    return True


def usability(grads: Sequence[Tensor]) -> Tensor:
    """The same as a tensor, 0-d, on the device of the first gradient; waits for nothing.

    Args:
        grads: One at least.

    Raises:
        RuntimeError: A gradient is sparse.
    """
    largest = [
        (torch.stack(torch._foreach_norm(dense, math.inf)).max() < _most(dtype)).to(grads[0].device)
        for (_, dtype), dense in _kinds(grads).items()
    ]
    return torch.stack(largest).all() if largest else torch.ones((), dtype=torch.bool, device=grads[0].device)


def _most(dtype: torch.dtype) -> float:
    """What a gradient must be smaller than."""
    return math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).max)


def _kinds(grads: Sequence[Tensor]) -> Kinds:
    """Gradients that are not empty, by device and precision."""
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
