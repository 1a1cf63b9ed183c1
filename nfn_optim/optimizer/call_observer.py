"""The calls of modules that own parameters of an optimizer, from their beginning to their end.

One pair of global hooks serves all optimizers that wait for a trace. It is there from the first of them to the last.

    outermost call of a module that owns wanted parameters     a `LiveTrace` is on while it runs
    ... of some of them only: one of several modules,          the trace goes on after it, so that it sees how this call
        or a part of a model called as `model.forward(x)`      is connected to the next, and ends with the backward pass
    call of anything else                                      nothing

A module is traced again while its calls still show something new, at most `MAX_CALLS` times. Hooks that have seen
`MAX_UNSEEN` outermost calls without a step are removed until the next step.

References:
    torch.nn.modules.module.register_module_forward_hook: `always_call` runs it after errors too, but not after
    KeyboardInterrupt, so that a call that has been left this way is recognised by its frame.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from nfn_optim.optimizer.wrapper import communicates, substitutes, unwrap
from nfn_optim.rule import UpdateRule
from nfn_optim.rule.network import CoefficientNetwork
from nfn_optim.symmetry.live_trace import INTERRUPTED, LiveTrace
from nfn_optim.symmetry.mode_stack import is_symbolic
from nfn_optim.symmetry.module import without_transform
from nfn_optim.symmetry.recurrence import Recurrence

MAX_CALLS, MAX_UNSEEN = 16, 1000
SETTLED = 2
"""Traced calls in a row that have shown nothing new, after which a module is not traced again."""


class Listener(Protocol):
    """Whoever waits for the symmetry of some parameters."""

    def wanted(self) -> list[Tensor]:
        """The parameters."""

    def is_model(self, module: nn.Module) -> bool:
        """Whether a module is known to own all of them, whatever it holds at the moment."""

    def recall(self, module: nn.Module, signature: tuple[Hashable, ...]) -> bool:
        """Whether the symmetry of such a call is known already, so that it need not be traced."""

    def has_recorded(self, trace: LiveTrace) -> bool:
        """Whether it has recorded a call in a trace before."""

    def record(self, trace: LiveTrace, module: nn.Module, signature: tuple[Hashable, ...]) -> None:
        """A call of a module that owns some of them is about to be traced."""

    def see_call(self) -> None:
        """A call of some module was observed."""


@dataclass
class ThreadCalls:
    """The calls that are running in one thread.

    Attributes:
        stack: The modules that are running, from the outermost one.
        traced: Whether the outermost one is traced.
        goes_on: Whether the trace is to go on after it.
        count: Rules that the trace had applied before it.
        frame: The frame that runs it.
        exits: What to undo when it ends.
        trace: The trace that is on, or was the last to be on.
        traces: Module -> the trace of its calls.
        parameters: Module -> names and shapes of its parameters in that trace.
        history: Module -> number of traced calls, number of the last ones that have shown nothing new.
    """

    stack: list[nn.Module] = field(default_factory=list)
    traced: bool = False
    goes_on: bool = False
    count: int = 0
    frame: FrameType | None = None
    exits: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    trace: LiveTrace | None = None
    traces: weakref.WeakKeyDictionary[nn.Module, LiveTrace] = field(default_factory=weakref.WeakKeyDictionary)
    parameters: weakref.WeakKeyDictionary[nn.Module, Hashable] = field(default_factory=weakref.WeakKeyDictionary)
    history: weakref.WeakKeyDictionary[nn.Module, tuple[int, int]] = field(default_factory=weakref.WeakKeyDictionary)


class CallObserver:
    """Traces outermost calls for its listeners, which are referenced weakly."""

    def __init__(self) -> None:
        """See the class."""
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._handles: list[RemovableHandle] = []
        self._threads = threading.local()
        self._lock = threading.RLock()
        self._unseen = 0

    # ----------------------------------------------------------------------------------------------------- listeners

    def add(self, listener: Listener) -> None:
        """Observe calls for a listener until it is discarded, or go on after a pause."""
        with self._lock:
            self._listeners.add(listener)
            self._unseen = 0
            if not self._handles:
                # A compiled model would warn about the hooks, which are removed before they do harm.
                warnings.filterwarnings(
                    "ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks"
                )
                self._handles = [
                    torch_module.register_module_forward_pre_hook(self._begin),
                    torch_module.register_module_forward_hook(self._end, always_call=True),
                ]
                self._threads = threading.local()

    def discard(self, listener: Listener | None = None) -> None:
        """Observe no more calls for a listener; without any left, remove the hooks."""
        with self._lock:
            if listener is not None:
                self._listeners.discard(listener)
            if not list(self._listeners):  # a set of weak references counts one that is being deleted
                self._remove_hooks()

    def end_trace(self) -> None:
        """End the trace of this thread, if one goes on after a call."""
        calls = self._calls()
        if calls.stack and not _is_running(calls.frame):
            self._abandon(calls)
        if calls.trace is not None and not calls.stack:
            calls.trace.leave()
            calls.trace.finish()

    def _remove_hooks(self) -> None:
        self.end_trace()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _calls(self) -> ThreadCalls:
        """The calls of this thread."""
        calls: ThreadCalls | None = self._threads.__dict__.get("calls")
        if calls is None:
            calls = self._threads.calls = ThreadCalls()
        return calls

    # --------------------------------------------------------------------------------------------------------- hooks

    def _begin(self, module: nn.Module, args: Any) -> None:
        """A call of a module begins. No error in here reaches the user's code."""
        if torch.compiler.is_compiling():
            return
        calls = self._calls()
        if calls.stack and not _is_running(calls.frame):
            self._abandon(calls)
        if calls.stack:
            calls.stack.append(module)
            if calls.traced and calls.trace is not None:
                calls.trace.enter_submodule(module)
        elif not communicates(module):
            frame = sys._getframe(1)
            calls.stack, calls.traced, calls.frame = [module], False, frame
            if isinstance(module, UpdateRule | CoefficientNetwork) or next(module.parameters(), None) is None:
                return  # a step of ours, or a graph without parameters
            try:
                self._begin_outermost(calls, module, (args, frame.f_locals.get("kwargs")))
            except Exception as error:  # modules may be of any kind
                self._abandon(calls, repr(error))

    def _begin_outermost(self, calls: ThreadCalls, called: nn.Module, inputs: Any) -> None:
        """Trace a call if somebody waits for it and it may show something new."""
        module = unwrap(called)
        self._unseen += 1
        if self._unseen > MAX_UNSEEN:
            self._remove_hooks()
            return
        owned = {id(without_transform(p)) for p in module.parameters()}
        concerned = []
        for listener in list(self._listeners):
            listener.see_call()
            owns = [id(p) in owned for p in listener.wanted()]
            if any(owns) or listener.is_model(module):
                concerned.append((listener, all(owns) or listener.is_model(module)))
        first = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
        if not concerned or is_symbolic() or (first is not None and not first.numel()):  # an empty batch shows little
            return
        signature = _signature_of(module, inputs)
        known, grown = calls.traces.get(module), calls.parameters.get(module, signature[-1]) != signature[-1]
        if known is not None and (grown or not all(listener.has_recorded(known) for listener, _ in concerned)):
            del calls.traces[module]  # whoever is new waits for what runs from now on
            calls.history.pop(module, None)
        calls.goes_on = torch.is_grad_enabled() and not all(complete for _, complete in concerned)
        watching = calls.trace is not None and calls.trace.watching
        number, settled = calls.history.get(module, (0, 0))
        if not watching and (number >= MAX_CALLS or settled >= SETTLED or (number and not torch.is_grad_enabled())):
            return
        if not (watching or calls.goes_on) and all(listener.recall(module, signature) for listener, _ in concerned):
            return
        trace = calls.trace if watching else calls.traces.get(module)
        calls.trace = trace = trace or LiveTrace(self._is_wanted)
        calls.traces[module], calls.traced, calls.count = trace, True, trace.count
        calls.parameters[module] = signature[-1]
        for listener, _ in concerned:
            listener.record(trace, module, signature)
        trace.begin(module, inputs, substitutes(called))
        calls.exits = _plain_kernels(module, trace)
        trace.enter()

    def _end(self, module: nn.Module, _: Any, output: Any) -> None:
        """A call of a module has returned, or raised an error."""
        calls: ThreadCalls | None = self._threads.__dict__.get("calls")
        if calls is None or all(running is not module for running in calls.stack):
            return
        outermost = calls.stack[0]
        while calls.stack.pop() is not module:
            pass
        trace = calls.trace
        if calls.traced and trace is not None:
            del trace.path[max(len(calls.stack) - 1, 0) :]
        if calls.stack:
            return
        calls.frame = None
        if not calls.traced or trace is None:
            return
        calls.exits.close()
        inner = unwrap(outermost)
        known = trace.end(inner, output, calls.goes_on)
        calls.traced = False
        number, settled = calls.history.get(inner, (0, 0))
        calls.history[inner] = number + 1, settled + 1 if trace.count == calls.count else 0
        if not (torch.is_grad_enabled() and (calls.goes_on or not known)):
            trace.leave()
            trace.finish()
        if trace.failure:
            self._abandon(calls)

    def _abandon(self, calls: ThreadCalls, reason: str = INTERRUPTED) -> None:
        """Give up a trace that is void, or a call that an interrupt has left; the next call is traced anew."""
        calls.exits.close()
        if calls.trace is not None and (calls.traced or calls.trace.failure):
            calls.trace.fail(reason)
            calls.trace.leave()
            for module in [module for module, trace in calls.traces.items() if trace is calls.trace]:
                del calls.traces[module]
                calls.history.pop(module, None)
            calls.trace = None
        calls.stack, calls.traced, calls.frame = [], False, None

    def _is_wanted(self, parameter: Tensor) -> bool:
        return any(parameter is p for listener in list(self._listeners) for p in listener.wanted())


def _is_running(frame: FrameType | None) -> bool:
    """Whether a frame is among those that are running in this thread."""
    current: FrameType | None = sys._getframe(1)
    while current is not None:
        if current is frame:
            return True
        current = current.f_back
    return False


def _signature_of(module: nn.Module, inputs: Any) -> tuple[Hashable, ...]:
    """What two calls have in common that have the same symmetry; names and shapes of the parameters last."""
    leaves = [
        tuple(leaf.shape) if isinstance(leaf, Tensor) and not leaf.is_nested else type(leaf)
        for leaf in tree_leaves(inputs)
    ]
    named = tuple((name, tuple(p.shape)) for name, p in module.named_parameters() if not hasattr(p, "materialize"))
    return module.training, tuple(leaves), named


def _plain_kernels(module: nn.Module, trace: LiveTrace) -> contextlib.ExitStack:
    """Run the parts of compiled modules op by op, and follow recurrent layers."""
    exits = contextlib.ExitStack()
    if "torch._dynamo" in sys.modules:
        exits.enter_context(torch.compiler.set_stance("force_eager"))
    if torch.backends.mha.get_fastpath_enabled() and not torch.is_grad_enabled():
        torch.backends.mha.set_fastpath_enabled(False)
        exits.callback(torch.backends.mha.set_fastpath_enabled, True)
    if any(isinstance(sub, nn.RNNBase | nn.RNNCellBase) for sub in module.modules()):
        exits.enter_context(Recurrence(trace))
    return exits


OBSERVER = CallObserver()
"""The only observer of this process."""
