"""Modules around a module."""

from __future__ import annotations

import inspect

from torch import nn


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of wrappers that take the same arguments.

    Those are `torch.compile`, DistributedDataParallel and DataParallel; and functional modules of `higher`, which have
    it in the closure of their forward.
    """
    while True:
        kind = type(module)
        inner = getattr(module, "module" if communicates(module) else "_orig_mod", None)
        if isinstance(inner, nn.Module):
            module = inner
        elif hasattr(kind, "direct_submodule_call"):
            forward = getattr(kind, "boxed_forward", kind.forward)
            module = inspect.getclosurevars(forward).nonlocals["module"]
        else:
            return module


def communicates(module: nn.Module) -> bool:
    """Whether a module only distributes the calls of another one."""
    return isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
