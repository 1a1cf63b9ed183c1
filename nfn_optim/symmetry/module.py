"""A module as tracing sees it: its named tensors, its wrappers, the tensors it takes and returns, what it leaves."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CACHES = frozenset({"past_key_values", "cache_params", "mems", "state"})
"""Outputs that a model hands to its own next call."""


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a symmetry lists, by name."""
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    if lazy := [name for name, value in tensors.items() if isinstance(value, nn.UninitializedParameter)]:
        raise ValueError(f"expected parameters with shapes, {lazy} have none yet; call the module once before")
    buffers = {name: b for name, b in module.named_buffers() if b.dim() and not isinstance(b, nn.UninitializedBuffer)}
    return tensors | buffers


def unwrap(module: nn.Module) -> tuple[nn.Module, str]:
    """The module inside of wrappers that do not change the function, and what they prefix to names."""
    if "_orig_mod" in module._modules:
        inner, prefix = unwrap(module.get_submodule("_orig_mod"))
        return inner, f"_orig_mod.{prefix}"
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner, prefix = unwrap(module.module)
        return inner, f"module.{prefix}"
    return module, ""


def is_flattened(module: nn.Module) -> bool:
    """Whether parameters lie flat in shards of FSDP1, without their shapes; to run such a module on fakes breaks it."""
    package = sys.modules.get("torch.distributed.fsdp")
    return package is not None and any(isinstance(m, package.FullyShardedDataParallel) for m in module.modules())


def find_tensors(value: Any, strict: bool = False, seen: set[int] | None = None) -> list[Tensor]:
    """All tensors inside of nested containers, dataclasses and plain objects.

    Args:
        value: Where to look.
        strict: Whether to insist on having found all.
        seen: Objects that were looked into already.

    Raises:
        TypeError: Something, such as a generator, cannot be looked into, and `strict`.
    """
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, (str, bytes, int, float, complex, type, nn.Module)) or id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        parts = list(value)
    elif strict and (isinstance(value, Iterator) or callable(value)):
        raise TypeError(f"cannot look for tensors in a {type(value).__name__}")
    else:
        parts = list(vars(value).values()) if hasattr(value, "__dict__") else []
        if dataclasses.is_dataclass(value) and not parts:
            parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [tensor for part in parts for tensor in find_tensors(part, strict, seen)]


def minimised(output: Any) -> Any:
    """The part of an output that training looks at.

    A mapping or dataclass with a scalar `loss`, as the models of transformers return them when they are given labels,
    stands for that loss and its `logits`. What a model keeps for the next call (`CACHES`) counts for nothing.
    """
    fields = dict(output) if isinstance(output, Mapping) else vars(output) if dataclasses.is_dataclass(output) else None
    if fields is None:
        return output
    loss = fields.get("loss")
    if isinstance(loss, Tensor) and not loss.dim() and loss.is_floating_point():
        return {name: fields[name] for name in ("loss", "logits") if name in fields}
    return {name: value for name, value in fields.items() if name not in CACHES}


def disconnect(module: nn.Module) -> None:
    """Take off the hooks by which FSDP2 and tensor parallelism communicate around a forward pass.

    Without them the module computes the same from whole tensors; `untouched` puts them back.
    """
    for sub in module.modules():
        for hooks in (sub._forward_pre_hooks, sub._forward_hooks):
            for key in [key for key, hook in hooks.items() if _origin_of(hook).startswith("torch.distributed.")]:
                del hooks[key]


def _origin_of(hook: Any) -> str:
    return getattr(hook, "__module__", None) or ""


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Undo what a forward pass leaves behind: attributes of modules, and the state of the random number generators."""
    attributes = [(sub, dict(vars(sub))) for sub in module.modules()]
    plain = (list, dict, OrderedDict, set, deque)
    containers = [(v, copy.copy(v)) for _, kept in attributes for v in kept.values() if type(v) in plain]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        for sub, kept in attributes:
            for name in [name for name in vars(sub) if name not in kept]:
                del vars(sub)[name]
            vars(sub).update(kept)
        for container, content in containers:
            container.clear()
            getattr(container, "extend" if isinstance(container, (list, deque)) else "update")(content)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
