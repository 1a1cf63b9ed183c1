"""The symmetry of modules, from the ops of their own calls on real tensors.

Nothing is run a second time: a dispatch mode is on while the user's code runs and takes note of shapes and identities.
So whatever depends on data is followed as it ran, and the code sees real tensors only.

    a call begins      parameters and buffers of the module get axes; inputs that no op has made are fixed
    ops                `nfn_optim.symmetry.dispatch` applies their rules
    it ends            its outputs are fixed: at once, or, if the trace goes on after it, unless another call takes them
    something unseen   a tensor that was computed out of sight, or written by a kernel that is no op of torch, fixes
                       the parameters that it depends on according to its graph
    an error in here   the trace is void
    a DTensor          likewise, as the ops on its parts are out of sight; the module may be traced on fake tensors

The result is sound for what has run. It says nothing of branches that have not run.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map_only

from nfn_optim.symmetry.axes import IN, OUT, Dims, fresh, shape_of
from nfn_optim.symmetry.dispatch import FILLED, UNWRITTEN, AxisTracer, Entry, tensors_in
from nfn_optim.symmetry.mode_stack import is_symbolic, push_below, remove
from nfn_optim.symmetry.module import is_dtensor_type, is_fsdp1, tensors_of_output, without_transform, without_values
from nfn_optim.symmetry.naming import symmetry_from
from nfn_optim.symmetry.op_call import OpCall
from nfn_optim.symmetry.op_plan import OpPlan
from nfn_optim.symmetry.symmetry import Symmetry
from nfn_optim.symmetry.tensor_map import TensorMap
from nfn_optim.symmetry.unification import fix, unify

INTERRUPTED, DIVIDED = "interrupted", "tensors are divided among processes"
MAX_OPS_BETWEEN_CALLS = 20_000
"""Ops after a call, outside of any other, after which no further call is expected."""


class LiveTrace(AxisTracer):  # type: ignore[no-untyped-call]
    """A trace of the calls of one or several modules, connected by the tensors that pass between them.

    Args:
        is_wanted: Whether a parameter that no module owns is to get axes.

    Attributes:
        failure: Why the trace is void; empty if it is not.
        inside: Whether a traced call is running.
        watching: Whether ops are followed; otherwise they just run.
        reported: Messages that the user has seen.
        calls: The last arguments of each module, without values, if there may be several processes.
    """

    def __init__(self, is_wanted: Callable[[Tensor], bool]) -> None:
        """See the class."""
        super().__init__()
        self.failure = ""
        self.reported: set[str] = set()
        self.calls: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()
        self.inside = self.watching = False
        self._is_wanted = is_wanted
        self._registered: TensorMap[list[str]] = TensorMap()  # names of parameters and buffers
        self._named: dict[str, tuple[weakref.ref[Tensor], Dims]] = {}
        self._modules: list[weakref.ref[nn.Module]] = []
        self._buffers: dict[str, Tensor] = {}  # of the module that is running, before its call
        self._submodules: dict[int, str] = {}  # of the module that is running: id -> name
        self._pending: TensorMap[frozenset[int]] = TensorMap()  # tensors made of outputs of calls -> which outputs
        self._from_parameters: TensorMap[bool] = TensorMap()  # tensors made of parameters between calls
        self._outputs: list[Entry | None] = []  # of calls; None if another call has taken it
        self._ops_between = 0
        self._symmetry: tuple[int, Symmetry] | None = None

    # ------------------------------------------------------------------------------------------------------- the stack

    def enter(self) -> None:
        """Follow the ops of this thread from now on, below the user's modes, which may end before or after it."""
        self.watching = not self.failure
        push_below(self)

    def leave(self) -> None:
        """Follow no more ops; has no effect in another thread, where the mode just runs them."""
        self.watching = False
        remove(self)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the stack for a while."""
        watching = self.watching
        self.leave()
        try:
            yield
        finally:
            if watching:
                self.enter()

    # -------------------------------------------------------------------------------------------------- calls and names

    def begin(self, module: nn.Module, inputs: Any, substitutes: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        """A call of a module begins.

        Args:
            module: The module, without wrappers.
            inputs: Its positional and its keyword arguments.
            substitutes: Parameters, and the tensors that are used instead of them.
        """
        if not any(reference() is module for reference in self._modules):
            self._modules.append(weakref.ref(module))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.calls[module] = tree_map_only(Tensor, without_values, inputs)
        if is_fsdp1(module):
            self.fail(DIVIDED)
            return
        self._register_all()
        for parameter, substitute in substitutes:
            self.share(substitute, parameter)
        self._buffers = {name: b for name, b in module.named_buffers() if b.dim()}
        self._submodules = {id(sub): name for name, sub in module.named_modules()}
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor) and not self.is_known(inner := without_transform(tensor)):
                with self.guarded():
                    fix(*self.lookup(inner), role=IN)
        self.inside = True

    def enter_submodule(self, module: nn.Module) -> None:
        """A submodule of the module that is running is called."""
        self.path.append(self._submodules.get(id(module), type(module).__name__))

    def end(self, module: nn.Module, output: Any, goes_on: bool) -> bool:
        """A call of a module has returned.

        Args:
            module: The module, without wrappers.
            output: What it has returned.
            goes_on: Whether the trace goes on after the call. Else its outputs are fixed.

        Returns:
            Whether the outputs are known. If not, the trace must go on to see what becomes of them.
        """
        self.inside = False
        with self.guarded():
            buffers = dict(module.named_buffers())
            for name, before in self._buffers.items():
                self.unify_reassigned(before, buffers.get(name))
            try:
                tensors = tensors_of_output(output)
            except (RuntimeError, TypeError):
                return False
            for tensor in map(without_transform, tensors):
                dims = self.lookup(tensor)
                if goes_on:
                    self._add_output(tensor)
                else:
                    fix(*dims, role=OUT)
            self.follows = self.follows or goes_on
        return True

    def finish(self) -> None:
        """Fix the outputs of calls that no other call has taken."""
        with self.guarded():
            for entry in self._outputs:
                fix(*(self._resolved(entry) or () if entry else ()), role=OUT)
        self._outputs.clear()
        self._pending, self.follows = TensorMap(), False
        self.count += 1

    def symmetry(self) -> Symmetry:
        """The symmetry of the parameters and buffers that an op has used, by names of this trace.

        Computed anew only after more ops.
        """
        if self._symmetry is None or self._symmetry[0] != self.count:
            used = {name: dims for name, (_, dims) in self._named.items() if dims and self.is_used(dims)}
            self._symmetry = self.count, symmetry_from(used, self.index_spaces)
        return self._symmetry[1]

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that were called and are alive."""
        return [module for reference in self._modules if (module := reference()) is not None]

    def names(self) -> dict[int, list[str]]:
        """Names in this trace by the id of a tensor that is alive."""
        return self._registered.by_id()

    def _register_all(self) -> None:
        """Give axes to parameters and buffers that have none; one that was replaced passes on its axes."""
        for index, reference in enumerate(self._modules):
            if (module := reference()) is None:
                continue
            named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
            for name, tensor in named:
                if not isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
                    self._register(f"{index}.{name}", without_transform(tensor))

    def _register(self, name: str, tensor: Tensor) -> None:
        before, names = self._named.get(name), self._registered.get(tensor) or []
        self._registered[tensor] = names if name in names else [*names, name]
        if before is not None and before[0]() is tensor and shape_of(before[1]) == tuple(tensor.shape):
            return
        if before is not None and (before[0]() is tensor or is_dtensor_type(type(before[0]()))):
            self._entries.pop(tensor)  # the same one in another shape, or gathered from shards
        elif before is not None and not self.is_known(tensor) and (alias := self._storages.find(tensor)[0]) is not None:
            self._entries[tensor] = alias
        dims = super().lookup(tensor) if self.is_known(tensor) else None if before is None else before[1]
        if dims is None or shape_of(dims) != tuple(tensor.shape):
            dims = fresh(tuple(tensor.shape))
        elif before is not None and shape_of(before[1]) == shape_of(dims):
            for old, new in zip(before[1], dims, strict=True):
                unify(old, new)
        self._named[name] = weakref.ref(tensor), dims
        if not self.is_known(tensor):
            self.give(tensor, dims, is_weight=True, until_used=before is None)

    # --------------------------------------------------------------------------------------------------- single tensors

    def lookup(self, tensor: Tensor) -> Dims:
        """The dimensions of a tensor; a parameter may have come to a module during its call."""
        if isinstance(tensor, nn.Parameter) and self._registered.get(tensor) is None:
            self._registered[tensor] = []
            self._register_all()
        return super().lookup(tensor)

    def dims_of_unknown(self, tensor: Tensor) -> Dims:
        """The dimensions of a tensor that no op has returned.

        A parameter that no module owns, an alias, or a constant; if it has a graph, the parameters in it are fixed.
        """
        if isinstance(tensor, nn.Parameter) and not self.inside and self._is_wanted(tensor):
            self._register(f"parameter{len(self._named)}", tensor)
            return self._entry_of(tensor).dims or ()
        self._fix_graph(tensor)
        return super().dims_of_unknown(tensor)

    def _fix_graph(self, tensor: Tensor) -> None:
        """Fix the parameters that a tensor depends on by a graph that was not followed."""
        for leaf in _leaves_of_graph(tensor):
            if self.is_known(leaf):
                fix(*self.lookup(leaf))

    def is_overwritten(self, tensor: Tensor, filled: int) -> bool:
        """Whether a kernel that is no op has written to a tensor: it has a graph, or values that no op has written."""
        overwritten = filled == UNWRITTEN or tensor.grad_fn is not None
        if overwritten and tensor.grad_fn is None and tensor.numel() > 1 and not torch.is_grad_enabled():
            raise RuntimeError("memory was written by a kernel that is not an op of torch")
        self._fix_graph(tensor)
        return overwritten

    def dims_before(self, tensor: Tensor) -> Dims:
        """The dimensions of a tensor that an op is about to use."""
        with self.guarded():
            return self.lookup(tensor)
        return ()

    def record(self, out: Tensor) -> None:
        """Remember the storage of an output."""
        entry = self._entries.get(out)
        if entry is not None and out.dim():
            self._storages.add(out, entry)

    def follow(self, tensors: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Propagate outputs of calls through the ops between calls, and take those that meet parameters.

        A parameter that is used between calls is an output itself, unless an output of a call meets it.
        """
        if self.inside:
            self._take(self._sources(tensors))
            return
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter) and self._from_parameters.get(tensor) is None:
                self._from_parameters[tensor] = True
                with self.guarded():
                    self.lookup(tensor)
                self._add_output(tensor)
        parameters = [tensor for tensor in tensors if self._from_parameters.get(tensor)]
        sources = self._sources(tensors)
        meet = bool(parameters) and sources != self._sources(parameters)
        if meet:
            self._take(sources)
        for out in outs if sources else ():
            if meet:
                self._add_output(out)
            elif out.dim():
                self._pending[out] = sources
                if parameters:
                    self._from_parameters[out] = True

    def _sources(self, tensors: Iterable[Tensor]) -> frozenset[int]:
        """The outputs that tensors are made of."""
        return frozenset[int]().union(*(self._pending.get(tensor) or () for tensor in tensors))

    def _add_output(self, tensor: Tensor) -> None:
        """Take note of an output of a call; it is fixed in the end unless another call takes it."""
        if not tensor.dim():
            return
        self._pending[tensor] = (self._pending.get(tensor) or frozenset()) | {len(self._outputs)}
        self._outputs.append(self._entry_of(tensor))

    def _take(self, sources: Iterable[int]) -> None:
        for source in sources:
            self._outputs[source] = None

    # ------------------------------------------------------------------------------------------------------------ ops

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an op and follow it, unless it is none of the forward pass."""
        if not self.watching:
            return func(*args, **(kwargs or {}))
        if self.inside and any(map(is_dtensor_type, types)):
            self.fail(DIVIDED)
            return func(*args, **(kwargs or {}))
        if not self.inside:
            if is_symbolic():
                return func(*args, **(kwargs or {}))
            self._ops_between += 1
            if torch._C._current_graph_task_id() != -1 or self._ops_between > MAX_OPS_BETWEEN_CALLS:
                self.watching = False
                self.finish()
                return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def decompose(self, func: OpOverload, plan: OpPlan, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Run the parts of an op that has no rule, if it consists of them; else the op itself.

        A decomposition that is written in Python is not what runs: it is followed on the meta device.
        """
        with self:
            result = func.decompose(*args, **options)
        if result is not NotImplemented or plan.writes or func not in decomposition_table:
            return result
        result = func(*args, **options)
        outs = tensors_in(result)
        with self.guarded():
            try:
                metas = self.shadow(decomposition_table[func], args, options)
            except Exception:  # whatever a decomposition raises on the meta device
                inputs = tensors_in((args, options))
                self.analyse(func, plan, None, inputs, OpCall("", {"inputs": inputs}, outs, ((), ())), ())
            else:
                for out, meta in zip(outs, metas, strict=True):
                    self.share(out, meta)
        return result

    def shadow(self, function: Callable[..., Any], args: Any, kwargs: Any = None) -> tuple[Tensor, ...]:
        """Follow a function on the meta device, in place of one with the same relations of inputs and outputs.

        Args:
            function: The function.
            args: Its arguments; tensors are replaced by tensors on the meta device with their dimensions.
            kwargs: Its keyword arguments.

        Returns:
            The outputs, on the meta device.
        """

        def on_meta(tensor: Tensor) -> Tensor:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype  # autocast leaves several
            meta = torch.empty(tensor.shape, dtype=dtype, device="meta")
            if tensor.dim():
                self.lookup(tensor)
                self.share(meta, tensor)
            return meta

        with self.paused():
            meta_args, meta_kwargs = tree_map_only(Tensor, on_meta, (tuple(args), dict(kwargs or {})))
        with torch.no_grad(), self:
            return tensors_in(function(*meta_args, **meta_kwargs))

    def is_filled(self, tensor: Tensor) -> bool:
        """Whether all entries are equal, so that an op may see the tensor with new axes."""
        return (self._entry_of(tensor).filled or [0])[0] == FILLED

    def share(self, tensor: Tensor, other: Tensor) -> None:
        """Let a tensor have the dimensions of another."""
        self._entries[tensor] = self._entry_of(other)
        self.record(tensor)

    def analyse(
        self, func: OpOverload, plan: OpPlan, key: Hashable, inputs: Sequence[Tensor], call: OpCall, dims_before: Dims
    ) -> None:
        """Apply the rule of an op that has run. Whatever happens in here, the user's code goes on."""
        with self.guarded():
            super().analyse(func, plan, key, inputs, call, dims_before)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Errors make the trace void; interrupts too, but they reach the user."""
        try:
            yield
        except Exception as error:
            self.fail(f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:300]}")
        except BaseException:
            self.fail(INTERRUPTED)
            raise

    def fail(self, reason: str) -> None:
        """Make the trace void."""
        self.failure = self.failure or reason
        self.watching = False


def _leaves_of_graph(tensor: Tensor) -> Iterable[Tensor]:
    """The leaves that a tensor depends on, by its graph."""
    pending, visited = [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        pending += [following for following, _ in node.next_functions]
