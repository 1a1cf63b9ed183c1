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
        if (compiled := getattr(module, "_orig_mod", None)) is not None:
            module = compiled
        elif communicates(module):
            module = module.module
        elif hasattr(kind, "direct_submodule_call"):
            forward = getattr(kind, "boxed_forward", kind.forward)
            module = inspect.getclosurevars(forward).nonlocals["module"]
        else:
            return module


def communicates(module: nn.Module) -> bool:
    """Whether a module only distributes the calls of another one."""
    return isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
