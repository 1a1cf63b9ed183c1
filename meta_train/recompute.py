"""Activation checkpointing for functions that differentiate inside.

`torch.utils.checkpoint` recomputes a function whenever one of its saved tensors is unpacked. An inner gradient unpacks
what its forward pass saved, so that every step of a segment would recompute the whole segment. Here the segment is
recomputed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten


def recomputed(function: Callable[..., Any], *trees: Any) -> Any:
    """Call a function without storing its activations; the backward pass recomputes them.

    Args:
        function: From trees of tensors to a tree of tensors; deterministic. No gradient flows into its closure.
        *trees: Its arguments; leaves that are not tensors are constants.
    """
    leaves, spec = tree_flatten(trees)
    indices = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    out_specs: list[Any] = []

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, tensor in zip(indices, tensors, strict=True):
            filled[i] = tensor
        out, out_spec = tree_flatten(function(*tree_unflatten(filled, spec)))
        out_specs.append(out_spec)
        return tuple(out)

    out = _Recomputed.apply(run, *(leaves[i] for i in indices))  # type: ignore[no-untyped-call]
    return tree_unflatten(list(out), out_specs[0])


class _Recomputed(torch.autograd.Function):
    """Saves only the inputs of `run`."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            detached = [x.detach() for x in inputs]
            out = run(*detached)
        return tuple(x.clone() if any(x is y for y in detached) else x for x in out)  # inputs that are returned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
            out = ctx.run(*inputs)
            pairs = [(x, g) for x, g in zip(out, grads, strict=True) if x.requires_grad]
            indices = [i for i, x in enumerate(inputs) if x.requires_grad and ctx.needs_input_grad[i + 1]]
            input_grads = torch.autograd.grad(
                [x for x, _ in pairs], [inputs[i] for i in indices], [g for _, g in pairs], allow_unused=True
            )
        by_index = dict(zip(indices, input_grads, strict=True))
        return None, *(by_index.get(i) for i in range(len(inputs)))
