"""Channel mixing of a large tensor and its sums over some dimensions, as one differentiable function.

    y = x W^T                 x (N, *K, C), W (D, C), y (N, *K, D)
    s_d = sum of x over d     for each requested dimension d of K

The gradient dx = dy W + sum_d ds_d (broadcast along d) is accumulated in one buffer of the size of x; automatic
differentiation would allocate another one for every sum.
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
        dx = torch.zeros_like(x) if dx is None else dx
        y = linear(dx, weight)
        return (y if dweight is None else y + linear(x, dweight), *(dx.sum(dim) for dim in ctx.dims))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dy, *dsums = grads
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight.to(dy.dtype)).to(x.dtype)  # dtypes differ under autocast
            for dim, dsum in zip(ctx.dims, dsums, strict=True):
                other = dsum.unsqueeze(dim)
                dx = dx + other if torch.is_grad_enabled() else add_into(dx, other)
        if ctx.needs_input_grad[1]:
            dw = (dy.flatten(0, -2).mT @ x.flatten(0, -2).to(dy.dtype)).to(weight.dtype)
        return dx, dw, None


def add_into(x: Tensor, other: Tensor) -> Tensor:
    """`x + other`, in place unless vmap forbids it (`other` is batched and `x` is not)."""
    try:
        return x.add_(other)
    except RuntimeError:
        return x + other


def mix_and_sum(x: Tensor, weight: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Mix channels, and sum over dimensions.

    Args:
        x: `(N, *K, C)`.
        weight: `(D, C)`.
        dims: Dimensions of `x`; one sum is returned for each.

    Returns:
        `(N, *K, D)`, and for every one of `dims` the sum of `x`, `(N, *K without it, C)`.
    """
    if torch.compiler.is_compiling() or not x.requires_grad:  # the compiler plans the memory of gradients itself
        return (linear(x, weight), *(x.sum(dim) for dim in dims))
    return _Mix.apply(x, weight, dims)  # type: ignore[no-any-return, no-untyped-call]
