"""Mix the channels of a large tensor and sum it over some of its dimensions, as one differentiable function.

    y = x W^T                 x (N, *K, F), W (G, F), y (N, *K, G)
    s_d = sum of x over d     one for each dimension d of K that is asked for

Written as one function for its gradient: dx = g W + (what comes back through the sums), which is added into the one
tensor just made. Left to automatic differentiation, each sum would add a copy as large as x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import linear


class _Mix(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, ...]:
        return (linear(x, weight), *(x.sum(dim) for dim in dims))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, tuple[int, ...]], output: Any) -> None:
        x, weight, dims = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        ctx.dims = dims  # type: ignore[attr-defined]

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, _: None) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        moved = torch.zeros_like(x) if dx is None else dx
        y = linear(moved, weight)
        return (y if dweight is None else y + linear(x, dweight), *(moved.sum(dim) for dim in ctx.dims))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        given, *sums = grads
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = (given @ weight.to(given.dtype)).to(x.dtype)  # they differ under autocast
            for dim, grad in zip(ctx.dims, sums, strict=True):
                other = grad.unsqueeze(dim)
                dx = dx + other if torch.is_grad_enabled() else add_into(dx, other)
        if ctx.needs_input_grad[1]:
            dw = (given.flatten(0, -2).mT @ x.flatten(0, -2).to(given.dtype)).to(weight.dtype)
        return dx, dw, None


def add_into(made: Tensor, other: Tensor) -> Tensor:
    """The sum, in place if `made` can hold it: not where `other` is one of many under vmap and `made` is not."""
    try:
        return made.add_(other)
    except RuntimeError:
        return made + other


def mix_and_sum(x: Tensor, weight: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Mix the channels, and sum.

    Args:
        x: `(N, *K, F)`.
        weight: `(G, F)`.
        dims: Over which dimensions of `x` to sum, one at a time.

    Returns:
        `(N, *K, G)`, and for every entry of `dims` the sum, `(N, *K without it, F)`.
    """
    if torch.compiler.is_compiling() or not x.requires_grad:  # the compiler arranges gradients itself
        return (linear(x, weight), *(x.sum(dim) for dim in dims))
    return _Mix.apply(x, weight, dims)  # type: ignore[no-any-return, no-untyped-call]
