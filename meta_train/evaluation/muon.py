"""Muon with its iteration in float32: `torch.optim.Muon` takes bfloat16, in which most CPUs multiply slowly.

    m <- b m + (1 - b) g,  u = b m + (1 - b) g            Nesterov's mixture
    x <- x (1 - lr decay) - .2 sqrt(max(rows, columns)) lr polar(u)

References:
    Muon (Jordan et al., 2024); Muon is Scalable for LLM Training (Liu et al., 2025), Sec. 2.2, arXiv:2502.16982
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from meta_train.evaluation.stack import ADAMW_SIZE, MOMENTUM, polar_factor


class Float32Muon(Optimizer):
    """Muon with steps of AdamW's size.

    Args:
        matrices: Parameters of two dimensions.
        lr: Learning rate, per step, in AdamW's units.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float = 1e-3) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - MOMENTUM)
                update = polar_factor(torch.lerp(p.grad, m, MOMENTUM))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"] * ADAMW_SIZE * math.sqrt(max(p.shape)))
        return loss
