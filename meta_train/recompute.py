"""Activations that are not kept but computed again on the way back, for functions that differentiate inside.

`torch.utils.checkpoint` computes a function again whenever something that it saved is looked at. An inner gradient
looks at what its forward pass saved, so that every step of a segment would replay the segment. Here it is played again
once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten


def replayed(function: Callable[..., Any], *trees: Any) -> Any:
    """What a function returns, without its activations.

    Args:
        function: From trees of tensors to a tree of tensors; deterministic. What it knows otherwise has no gradient.
        *trees: Its arguments; leaves that are no tensors are constants.
    """
    leaves, spec = tree_flatten(trees)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    specs: list[Any] = []

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        out, found = tree_flatten(function(*tree_unflatten(filled, spec)))
        specs.append(found)
        return tuple(out)

    out = _Replayed.apply(run, *(leaves[i] for i in places))  # type: ignore[no-untyped-call]
    return tree_unflatten(list(out), specs[0])


class _Replayed(torch.autograd.Function):
    """Keeps the inputs of `run` only."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            apart = [x.detach() for x in inputs]
            out = run(*apart)
        return tuple(x.clone() if any(x is y for y in apart) else x for x in out)  # what was passed through

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
            out = ctx.run(*inputs)
            pairs = [(x, g) for x, g in zip(out, grads, strict=True) if x.requires_grad]
            places = [i for i, x in enumerate(inputs) if x.requires_grad and ctx.needs_input_grad[i + 1]]
            found = torch.autograd.grad(
                [x for x, _ in pairs], [inputs[i] for i in places], [g for _, g in pairs], allow_unused=True
            )
        by_place = dict(zip(places, found, strict=True))
        return None, *(by_place.get(i) for i in range(len(inputs)))
