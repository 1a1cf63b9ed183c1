"""The symmetry of the parameters of an optimizer, from the calls of the modules that own them.

Trainers pass bare parameters or groups to an optimizer, never their module. So the optimizer observes the calls of all
modules from its construction to its first step (`nfn_optim.optimizer.call_observer`), and those that own its
parameters are traced while they run (`nfn_optim.symmetry.live_trace`). If their parameters are divided among processes,
they are traced on fake tensors instead (`nfn_optim.symmetry.trace`).

Nothing is keyed by parameter before the first step, since wrappers may replace the parameters until then. A symmetry
that was found is kept with its module, for the next optimizer of the same module and inputs of the same shapes.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nfn_optim.optimizer.call_observer import OBSERVER
from nfn_optim.symmetry import Symmetry, symmetry_of
from nfn_optim.symmetry.live_trace import DIVIDED, INTERRUPTED, LiveTrace
from nfn_optim.symmetry.merging import complete, merge

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, Symmetry]] = weakref.WeakKeyDictionary()
"""Module -> what it was called with, and the symmetry that was found, by the module's names."""


@dataclass(frozen=True)
class Found:
    """What the observed calls have shown.

    Args:
        symmetry: Of exactly the optimizer's parameters.
        modules: The modules that own them, without those inside of others.
        used: Names of the parameters that were used in a call.
    """

    symmetry: Symmetry
    modules: list[nn.Module]
    used: frozenset[str]


class Discovery:
    """Waits for calls of the modules that own some parameters, until it is closed or garbage collected.

    Args:
        parameters: Returns the parameters as they are now.
        model: The module that owns them, if it is known. Only weakly referenced.
        recalls: Whether a symmetry that was found before may be used.
    """

    def __init__(
        self, parameters: Callable[[], list[Tensor]], model: nn.Module | None = None, recalls: bool = True
    ) -> None:
        self.wanted = parameters
        self.has_seen_calls = False
        self._recalls = recalls
        self._model = None if model is None else weakref.ref(model)
        self._modules: dict[int, weakref.ref[nn.Module]] = {}
        self._traces: dict[int, tuple[LiveTrace, dict[int, tuple[Hashable, ...]]]] = {}  # with the signatures of calls
        self._recalled: dict[int, tuple[weakref.ref[nn.Module], Symmetry]] = {}
        OBSERVER.add(self)
        self._finalizer = weakref.finalize(self, OBSERVER.discard)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Wait no longer, and drop the traces."""
        OBSERVER.discard(self)
        self._traces.clear()
        self._recalled.clear()

    @property
    def is_void(self) -> bool:
        """Whether calls were seen that could not be traced."""
        return any(trace.failure not in ("", DIVIDED) for trace, _ in self._traces.values())

    def wait(self) -> None:
        """Go on waiting, if the observer has given up."""
        self.has_seen_calls = False
        OBSERVER.add(self)

    # ------------------------------------------------------------------------------------------- called by the observer

    def see_call(self) -> None:
        """A call of some module was observed."""
        self.has_seen_calls = True

    def is_model(self, module: nn.Module) -> bool:
        """Whether a module is the one that was given."""
        return self._model is not None and self._model() is module

    def recall(self, module: nn.Module, signature: tuple[Hashable, ...]) -> bool:
        """Whether the symmetry of such a call is known."""
        known = _KNOWN.get(module)
        if not self._recalls or known is None or known[0] != signature:
            return False
        self._modules[id(module)] = weakref.ref(module)
        self._recalled[id(module)] = weakref.ref(module), known[1]
        return True

    def has_recorded(self, trace: LiveTrace) -> bool:
        """Whether it has recorded a call in a trace before."""
        return id(trace) in self._traces

    def record(self, trace: LiveTrace, module: nn.Module, signature: tuple[Hashable, ...]) -> None:
        """A call is about to be traced; what was traced before the module had other parameters is void."""
        for key, (_, signatures) in list(self._traces.items()):
            if signatures.get(id(module), signature)[-1] != signature[-1]:
                del self._traces[key]
        self._modules[id(module)] = weakref.ref(module)
        self._traces.setdefault(id(trace), (trace, {}))[1][id(module)] = signature

    # ------------------------------------------------------------------------------------------------------- the result

    def found(self, params: Mapping[str, Tensor]) -> Found | None:
        """The symmetry of `params`; None if no call was traced to its end.

        Args:
            params: The optimizer's name -> parameter; names may differ from those in the modules.
        """
        OBSERVER.end_trace()
        modules = [module for reference in self._modules.values() if (module := reference()) is not None]
        parts = []
        for trace, signatures in self._traces.values():
            if not trace.failure:
                parts.append(_renamed(trace.symmetry(), trace.names(), params))
                self._remember(trace, signatures, modules)
            elif trace.failure == DIVIDED:
                self._trace_on_fakes(trace, signatures)
            self._warn(trace)
        for reference, symmetry in self._recalled.values():
            if (module := reference()) is not None:
                parts.append(_renamed(symmetry, _names_in(module), params))
        parts = [part for part in parts if part.dims]
        if not parts:
            return None
        inner = {id(sub) for module in modules for sub in module.modules() if sub is not module}
        used = frozenset(name for part in parts for name in part.dims)
        return Found(complete(merge(parts), params), [m for m in modules if id(m) not in inner], used)

    def _trace_on_fakes(self, trace: LiveTrace, signatures: Mapping[int, Hashable]) -> None:
        """Trace modules whose parameters are divided among processes, each once.

        Inputs are in the precision of the parameters, since autocast is not active.
        """
        for module, inputs in list(trace.calls.items()):
            if id(module) in self._recalled or id(module) not in signatures:
                continue
            dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
            cast = partial(_cast, dtype=dtypes.pop()) if len(dtypes) == 1 else lambda tensor: tensor
            args, kwargs = tree_map_only(Tensor, cast, inputs)
            symmetry = symmetry_of(module, *args, **(kwargs or {}))
            _KNOWN[module] = signatures[id(module)], symmetry
            self._recalled[id(module)] = weakref.ref(module), symmetry

    @staticmethod
    def _remember(
        trace: LiveTrace, signatures: Mapping[int, tuple[Hashable, ...]], modules: Sequence[nn.Module]
    ) -> None:
        """Keep the symmetry of a module that was the only one in a trace."""
        called = [module for module in modules if id(module) in signatures]
        if len(called) == 1 and trace.modules == called:
            names = _names_in(called[0])
            named = {name: p for name, p in called[0].named_parameters() if id(p) in names}
            _KNOWN[called[0]] = signatures[id(called[0])], _renamed(trace.symmetry(), trace.names(), named)

    def _warn(self, trace: LiveTrace) -> None:
        """Say once what could not be followed."""
        messages = [
            f"no rule for the op {op} (first called in {path}); the axes of its inputs and outputs are fixed. "
            f"The rest of the network is not affected"
            for op, path in trace.unknown.items()
        ]
        if trace.failure not in ("", INTERRUPTED, DIVIDED):
            messages.append(
                f"the forward pass could not be traced ({trace.failure}); every dimension of every tensor becomes a "
                f"fixed axis of its own. To use its symmetry, write it by hand (Symmetry.spec) and pass symmetry="
            )
        for message in messages:
            if message not in trace.reported:
                trace.reported.add(message)
                warnings.warn(message, stacklevel=10)  # the caller of step, outside of the wrappers of torch


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor of real numbers."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _names_in(module: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter of a module, by its id."""
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return names


def _renamed(symmetry: Symmetry, names: Mapping[int, Sequence[str]], params: Mapping[str, Tensor]) -> Symmetry:
    """The part of a symmetry that describes `params`, by their names.

    Args:
        symmetry: A symmetry of tensors by other names.
        names: These names by the id of a tensor.
        params: Name -> tensor.
    """
    new = {
        there: name
        for name, p in params.items()
        for there in [n for n in names.get(id(p), []) if n in symmetry.dims][:1]
        if symmetry.shape_of(there) == tuple(p.shape)
    }
    return symmetry.restrict(new).rename(new)


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
