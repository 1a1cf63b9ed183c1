"""A module as tracing sees it: its named tensors, its wrappers, the tensors it takes and returns, its side effects."""

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

CACHE_FIELDS = frozenset({"past_key_values", "cache_params", "mems", "state"})
"""Names of outputs that a model passes to its own next call."""


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a symmetry describes, by name: all parameters, then all buffers that are not scalar.

    Raises:
        ValueError: A lazy parameter has no shape yet.
    """
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    if lazy := [name for name, value in tensors.items() if isinstance(value, nn.UninitializedParameter)]:
        raise ValueError(f"expected parameters with shapes, {lazy} have none yet; call the module once before")
    buffers = {name: b for name, b in module.named_buffers() if b.dim() and not isinstance(b, nn.UninitializedBuffer)}
    return tensors | buffers


def unwrap_with_prefix(module: nn.Module) -> tuple[nn.Module, str]:
    """The module inside wrappers that do not change its function, and the prefix that they add to names."""
    if "_orig_mod" in module._modules:
        inner, prefix = unwrap_with_prefix(module.get_submodule("_orig_mod"))
        return inner, f"_orig_mod.{prefix}"
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner, prefix = unwrap_with_prefix(module.module)
        return inner, f"module.{prefix}"
    return module, ""


def is_fsdp1(module: nn.Module) -> bool:
    """Whether FSDP1 keeps the parameters as flat shards without shapes; running such a module on fakes breaks it."""
    package = sys.modules.get("torch.distributed.fsdp")
    return package is not None and any(isinstance(m, package.FullyShardedDataParallel) for m in module.modules())


def is_dtensor_type(kind: type) -> bool:
    """Whether tensors of a type are DTensors, which are divided among processes and have the shape of the whole."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and issubclass(kind, package.DTensor)


def find_tensors(value: Any, strict: bool = False, visited: set[int] | None = None) -> list[Tensor]:
    """All tensors in nested containers, dataclasses and plain objects.

    Args:
        value: A tensor, or anything that may contain tensors.
        strict: Whether to raise on values whose content is unknown.
        visited: Ids of objects that were visited already.

    Raises:
        TypeError: `strict`, and a value such as a generator may contain tensors that cannot be found.
    """
    visited = set() if visited is None else visited
    if isinstance(value, Tensor):
        return [value]
    atomic = (str, bytes, int, float, complex, type, nn.Module)
    if value is None or isinstance(value, atomic) or id(value) in visited:
        return []
    visited.add(id(value))
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        items = list(value)
    elif strict and (isinstance(value, Iterator) or callable(value)):
        raise TypeError(f"cannot look for tensors in a {type(value).__name__}")
    else:
        items = list(vars(value).values()) if hasattr(value, "__dict__") else []
        if dataclasses.is_dataclass(value) and not items:
            items = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [tensor for item in items for tensor in find_tensors(item, strict, visited)]


def without_transform(tensor: Tensor) -> Tensor:
    """The tensor inside of a transform of `torch.func`, such as `vmap` or `grad`; ops see that one."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def without_values(tensor: Tensor) -> Tensor:
    """A tensor of the same shape on the meta device; a nested one has no shape and is kept."""
    return tensor if tensor.is_nested else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def tensors_of_output(output: Any) -> list[Tensor]:
    """The tensors in an output that training depends on.

    Raises:
        RuntimeError: There are none.
        TypeError: It contains something that cannot be searched for tensors.
    """
    tensors = find_tensors(training_output(output), strict=True)
    if not tensors:
        raise RuntimeError(f"no tensor found in its output of type {type(output).__name__}")
    return tensors


def training_output(output: Any) -> Any:
    """The part of an output that training depends on.

    Of a mapping or dataclass with a scalar `loss`, as models of transformers return it when given labels, this is the
    loss and the `logits`. Caches for the next call (`CACHE_FIELDS`) are left out.
    """
    fields = dict(output) if isinstance(output, Mapping) else vars(output) if dataclasses.is_dataclass(output) else None
    if fields is None:
        return output
    loss = fields.get("loss")
    if isinstance(loss, Tensor) and not loss.dim() and loss.is_floating_point():
        return {name: fields[name] for name in ("loss", "logits") if name in fields}
    return {name: value for name, value in fields.items() if name not in CACHE_FIELDS}


def remove_communication_hooks(module: nn.Module) -> None:
    """Remove the hooks by which FSDP2 and tensor parallelism communicate around a forward pass.

    Without them the module computes the same function from whole tensors; `restored` puts them back.
    """
    for sub in module.modules():
        for hooks in (sub._forward_pre_hooks, sub._forward_hooks):
            for key in [key for key, hook in hooks.items() if _module_name_of(hook).startswith("torch.distributed.")]:
                del hooks[key]


def _module_name_of(hook: Any) -> str:
    return getattr(hook, "__module__", None) or ""


@contextlib.contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Undo the side effects of a forward pass: attributes of modules, and states of random number generators."""
    attributes = [(sub, dict(vars(sub))) for sub in module.modules()]
    plain = (list, dict, OrderedDict, set, deque)
    containers = [(v, copy.copy(v)) for _, saved in attributes for v in saved.values() if type(v) in plain]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        for sub, saved in attributes:
            for name in [name for name in vars(sub) if name not in saved]:
                del vars(sub)[name]
            vars(sub).update(saved)
        for container, content in containers:
            container.clear()
            getattr(container, "extend" if isinstance(container, (list, deque)) else "update")(content)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
