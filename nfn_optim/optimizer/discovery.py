"""Finding the module that owns the parameters, and the inputs of its calls.

Trainers pass bare parameters or groups to an optimizer, never their module. So the optimizer observes the forward calls
of all modules from its construction to its first step, and keeps those that no other one contains:

    calls, in order of return           kept
    encoder.0, encoder.1, encoder       encoder                  a call returns after the calls inside it
    decoder.0, decoder                  encoder, decoder         two outermost calls: both are traced

Of a call the shapes, dtypes and devices of its tensors are kept, never the tensors; of a module a weak reference.
Nothing is keyed by parameter before the first step, since wrappers may replace the parameters until then.

References:
    torch.nn.modules.module.register_module_forward_hook: it alone receives keyword arguments, the pre-hook does not.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from nfn_optim.rule import UpdateRule
from nfn_optim.symmetry import Symmetry, symmetry_of
from nfn_optim.symmetry.merging import complete, merge

_TRACING = ContextVar("tracing", default=False)  # calls while tracing are not observed


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and device of an input tensor.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        device: Its device.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        """A substitute for the input in tracing."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class Call:
    """One outermost call of a module, shared by all observers, so that it is traced once.

    Args:
        module: The module that was called. Only weakly referenced.
        args: Its positional arguments; tensors are replaced by their `TensorSpec`.
        kwargs: Its keyword arguments, likewise.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._module = weakref.ref(module)
        self.args, self.kwargs = tree_map_only(Tensor, _spec_of, (args, kwargs))
        self._symmetry: Symmetry | None = None

    @property
    def module(self) -> nn.Module:
        """The module that was called, without wrappers; it must still be alive."""
        module = self._module()
        assert module is not None
        return unwrap(module)

    def symmetry(self) -> Symmetry:
        """Trace the call.

        Inputs are in the precision of the parameters, since autocast and FSDP2, which compute in another, are not
        active.
        """
        if self._symmetry is None:
            module = self.module
            dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}

            def substitute(spec: TensorSpec) -> Tensor:
                cast = spec.dtype.is_floating_point and len(dtypes) == 1
                return replace(spec, dtype=next(iter(dtypes))).zeros() if cast else spec.zeros()

            args, kwargs = tree_map_only(TensorSpec, substitute, (self.args, self.kwargs))
            token = _TRACING.set(True)
            try:
                self._symmetry = symmetry_of(module, *args, **kwargs)
            finally:
                _TRACING.reset(token)
        return self._symmetry


class Discovery:
    """Observes the forward calls of modules until it is closed or garbage collected.

    Args:
        model: The model if it is known. A compiled one is then observed from outside of its graph; all others through
            a global hook, because the module called may be a wrapper or a part of the model.
    """

    _latest: tuple[Any, ...] = (None,)  # identity of the call observed last, and a reference to it

    def __init__(self, model: nn.Module | None = None) -> None:
        self._calls: dict[int, tuple[weakref.ref[nn.Module], Call]] = {}
        hook = _hook_of(weakref.ref(self))
        if model is not None and "_orig_mod" in model._modules:
            handle = model.register_forward_hook(hook, with_kwargs=True)
        else:
            # A compiled model would warn about the hook, which is removed before it does harm.
            warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
            handle = torch_module.register_module_forward_hook(hook, with_kwargs=True)
        self._finalizer = weakref.finalize(self, _remove, handle)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Remove the hook and drop the calls."""
        self._finalizer()
        self._calls.clear()

    def calls_that_own(self, params: Iterable[Tensor]) -> list[Call]:
        """The outermost calls of modules that own some of `params`, in the order in which they were last made.

        Other calls are dropped.
        """
        wanted = {id(p) for p in params}
        observed = [(module(), call) for module, call in list(self._calls.values())]
        self._calls.clear()
        calls = [call for module, call in observed if module is not None]
        return [call for call in calls if any(id(p) in wanted for p in call.module.parameters())]

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call that has returned; the calls inside it are no longer outermost."""
        if next(module.parameters(), None) is None:
            return
        key, calls = id(module), self._calls
        _, before = calls.get(key, (None, None))
        if calls:
            for inner in module.modules():
                calls.pop(id(inner), None)
        if isinstance(module, UpdateRule):
            return
        call = self._shared(module, args, kwargs, before)
        calls[key] = (weakref.ref(module, lambda _: calls.pop(key, None)), call)

    @staticmethod
    def _shared(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], before: Call | None) -> Call:
        """The call as another observer has recorded it, if it is the same one: observers are notified in turn."""
        event = id(module), id(args), id(kwargs)
        *latest, reference = Discovery._latest
        call: Call | None = reference() if tuple(latest) == event else None
        if call is None or call is before:
            call = Call(module, args, kwargs)
            Discovery._latest = *event, weakref.ref(call)
        return call


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of wrappers that take the same arguments.

    Those are `torch.compile`, DistributedDataParallel and DataParallel; and functional modules of `higher`, which have
    it
    in the closure of their forward.
    """
    while True:
        kind = type(module)
        if (compiled := module._modules.get("_orig_mod")) is not None:
            module = compiled
        elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif hasattr(kind, "direct_submodule_call"):
            forward = getattr(kind, "boxed_forward", kind.forward)
            module = inspect.getclosurevars(forward).nonlocals["module"]
        else:
            return module


def names_of(groups: Sequence[Mapping[str, Any]], modules: Sequence[nn.Module], before: Sequence[str]) -> list[str]:
    """Unique names of all parameters of an optimizer.

    Args:
        groups: The optimizer's groups.
        modules: Modules that own parameters of it; of several, their index is a prefix of names.
        before: The previous names, by position, since wrappers replace the parameters of a group.

    Returns:
        In the order of the groups: the name given with the parameter, or its name in a module, or the previous one,
        or "group.index".
    """
    params = [p for group in groups for p in group["params"]]
    unnamed = [""] * len(params)
    given = [name for group in groups for name in group.get("param_names", [""] * len(group["params"]))]
    owned = {
        id(p): name if len(modules) == 1 else f"{k}.{name}"
        for k, module in enumerate(modules)
        for name, p in module.named_parameters()
    }
    places = [f"{k}.{i}" for k, group in enumerate(groups) for i in range(len(group["params"]))]
    earlier = before if len(before) == len(params) else unnamed
    names: dict[str, None] = {}
    for p, first, old, place in zip(params, given, earlier, places, strict=True):
        choices = (first, owned.get(id(p), ""), old, place, f"group{place}")
        names[next(name for name in choices if name and name not in names)] = None
    return list(names)


def symmetry_of_calls(calls: Sequence[Call], params: Mapping[str, Tensor]) -> Symmetry:
    """The symmetry of some parameters, traced from calls.

    Args:
        calls: Outermost calls of modules.
        params: The optimizer's name -> parameter; names may differ from those in the modules.

    Returns:
        A symmetry of exactly `params`; parameters that no call uses have fixed axes of their own.
    """
    parts = []
    for call in calls:
        owned: dict[int, list[str]] = {}
        for name, p in call.module.named_parameters(remove_duplicate=False):
            owned.setdefault(id(p), []).append(name)
        traced = call.symmetry()
        names = {
            there: name
            for name, p in params.items()
            for there in [n for n in owned.get(id(p), []) if n in traced.dims][:1]
            if traced.shape_of(there) == tuple(p.shape)
        }
        parts.append(traced.restrict(names).rename(names))
    return complete(merge(parts), params)


def _hook_of(discovery: weakref.ref[Discovery]) -> Callable[..., None]:
    """A forward hook that does not keep its observer alive, and does nothing while a graph is being compiled."""

    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        observer = None if torch.compiler.is_compiling() or _TRACING.get() else discovery()
        if observer is not None:  # without it, perhaps removed during the call, torch omits the keywords
            observer.record(module, args, rest[0])

    return hook


def _spec_of(tensor: Tensor) -> TensorSpec | Tensor:
    """Describe a tensor; a nested one has no shape and is kept."""
    return tensor if tensor.is_nested else TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device)


def _remove(handle: RemovableHandle) -> None:
    """Remove a hook, and the flag for keyword arguments, which the handle of a global hook leaves behind."""
    handle.remove()
    torch_module._global_forward_hooks_with_kwargs.pop(handle.id, None)
