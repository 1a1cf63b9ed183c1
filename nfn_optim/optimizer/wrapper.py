"""Modules around a module."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from nfn_optim.symmetry.module import unwrap_with_prefix


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of wrappers that take the same arguments.

    Those are `torch.compile`, DistributedDataParallel and DataParallel; and functional modules of `higher`, which have
    it in the closure of their forward.
    """
    inner, _ = unwrap_with_prefix(module)
    kind = type(inner)
    if not hasattr(kind, "direct_submodule_call"):
        return inner
    return unwrap(inspect.getclosurevars(getattr(kind, "boxed_forward", kind.forward)).nonlocals["module"])


def communicates(module: nn.Module) -> bool:
    """Whether a module only distributes the calls of another one."""
    return isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)


def substitutes(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Parameters and buffers of a functional module of `higher`, and the tensors that it uses instead of them."""
    if not hasattr(type(module), "direct_submodule_call"):
        return []
    root: Any = module.root
    original = unwrap(root)
    pairs = list(zip(original.parameters(), root.fast_params or [], strict=False))
    copies = dict(root.named_buffers())
    return pairs + [(buffer, copies[name]) for name, buffer in original.named_buffers() if name in copies]
