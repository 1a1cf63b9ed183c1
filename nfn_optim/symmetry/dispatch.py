"""A dispatch mode that applies the rules to every op and records the axes of every tensor.

Legend: see `nfn_optim.symmetry.axes` for `Dim`, `Dims` and atoms.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from nfn_optim.symmetry.axes import OUT, Dim, Dims, atoms_of, fresh, shape_of
from nfn_optim.symmetry.layer_rules import batch_norm
from nfn_optim.symmetry.module import find_tensors, training_output
from nfn_optim.symmetry.op_call import OpCall, Result, Rule
from nfn_optim.symmetry.op_rules import PRESERVE_FILL, RULES, opaque, pointwise
from nfn_optim.symmetry.unification import fix, unify

_IGNORED = ("prim::", "profiler::", "aten::_assert", "aten::sym_", "aten::is_", "aten::_has_")


class AxisTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies the rules to all ops that run while it is active.

    Args:
        module: The traced module, for the paths of its submodules.

    Attributes:
        dims: Tensor -> its dimensions.
        index_spaces: The index spaces of all ops.
        unknown: Op without a rule -> the submodule that first called it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dims: Any = WeakTensorKeyDictionary()
        self.index_spaces: list[Dims] = []
        self.unknown: dict[str, str] = {}
        self._fix_on_use: Any = WeakTensorKeyDictionary()  # Tensor -> Dim
        self._deferred: Any = WeakTensorKeyDictionary()  # Tensor -> function that returns its Dims at the first use
        self._filled: Any = WeakTensorKeyDictionary()  # Tensor of equal entries -> [True], shared with its views
        self._registered: dict[int, Dims] = {}  # of parameters and buffers, by the ids of the real and the fake tensor
        self._unused: dict[int, Dims] = {}  # of parameters and buffers that no op has used, by the id of the Dims
        self._storages: dict[int, list[Dims]] = {}  # of real parameters and buffers, by storage
        self._names = {id(sub): name for name, sub in module.named_modules()}
        self._stack: list[str] = []  # names of the submodules that are running, the innermost last

    def register(self, real: Tensor, fake: Tensor) -> None:
        """Give a parameter or buffer free axes; ops may meet the fake tensor or, if it bypasses us, the real one."""
        dims = fresh(tuple(real.shape))
        self.dims[real] = self.dims[fake] = dims
        self._registered[id(fake)] = self._registered[id(real)] = self._unused[id(dims)] = dims
        self._storages.setdefault(storage_of(real), []).append(dims)

    @contextlib.contextmanager
    def tracking_submodules(self) -> Iterator[None]:
        """Track which submodule is running in this thread; global hooks are called in all threads."""
        thread = threading.get_ident()

        def enter(sub: nn.Module, _: Any) -> None:
            if threading.get_ident() == thread:
                self._stack.append(self._names.get(id(sub), type(sub).__name__))

        def leave(*_: Any) -> None:
            if threading.get_ident() == thread:
                self._stack.pop()

        entering = register_module_forward_pre_hook(enter)
        leaving = register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            entering.remove()
            leaving.remove()

    def unify_reassigned(self, old: Tensor, new: Any) -> None:
        """Unify the axes of a buffer with those of the tensor that the forward pass replaced it with."""
        if old is new or not old.dim():
            return
        if not isinstance(new, Tensor) or new.shape != old.shape:
            fix(*self.dims[old])
            return
        for before, after in zip(self._lookup(old), self._lookup(new), strict=True):
            unify(before, after)

    def fix_outputs(self, output: Any) -> None:
        """Fix the axes of the network's output.

        Raises:
            RuntimeError: There is no tensor in it.
            TypeError: It contains something that cannot be searched for tensors.
        """
        tensors = find_tensors(training_output(output), strict=True)
        if not tensors:
            raise RuntimeError(f"no tensor found in its output of type {type(output).__name__}")
        for tensor in tensors:
            fix(*self._lookup(tensor), role=OUT)

    def fix_unused(self) -> None:
        """Fix the axes of parameters and buffers that no op has used."""
        for dims in self._unused.values():
            fix(*dims)

    def _lookup(self, tensor: Tensor) -> Dims:
        """The dimensions of a tensor that is used by an op or the output."""
        self._unused.pop(id(self._registered.get(id(tensor))), None)
        if (ordered := self._fix_on_use.get(tensor)) is not None:
            fix(ordered)
        if not tensor.dim():
            return ()
        if (deferred := self._deferred.pop(tensor, None)) is not None:
            self.dims[tensor] = computed = deferred()
            self.index_spaces.append(computed)
        dims: Dims | None = self.dims.get(tensor)
        if dims is not None and shape_of(dims) == tuple(tensor.shape):
            return dims
        if dims is not None or isinstance(tensor, FakeTensor):
            raise RuntimeError("a tensor has a shape or an origin that tracing cannot follow")
        for shared in self._storages.get(storage_of(tensor), []):
            fix(*shared)
        self.dims[tensor] = dims = fresh(tuple(tensor.shape), fixed=True)
        return dims

    def _track_filled(
        self, func: OpOverload, rule: Rule | None, args: Any, kwargs: Any, outs: Sequence[Tensor]
    ) -> Callable[[Tensor], Dims]:
        """Record whether an op returns tensors whose entries are all equal; returns the lookup of its inputs.

        Such a tensor is the same in any order, so that each op that combines it with other tensors may see it with new
        axes. Only ops among such tensors, views above all, see its own axes.
        """
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        flags = [self._filled.get(tensor, [False]) for tensor in tensors]
        preserved = all(flag[0] for flag in flags) and rule in PRESERVE_FILL
        preserved = preserved and torch.Tag.nondeterministic_seeded not in func.tags
        writes = _writes(func)
        for out in outs:
            shared = [flag for t, flag in zip(tensors, flags, strict=True) if storage_of(t) == storage_of(out)]
            if preserved:
                self._filled[out] = shared[0] if shared else [True]
            for flag in shared:
                if not preserved and writes:
                    flag[0] = False
                elif not preserved:
                    self._filled[out] = flag
        if preserved:
            return self._lookup
        new_dims = {
            id(t): fresh(tuple(t.shape))
            for t, flag in zip(tensors, flags, strict=True)
            if flag[0] and all(t is not out for out in outs)
        }
        return lambda tensor: new_dims.get(id(tensor)) or self._lookup(tensor)

    def _set_fix_on_use(self, tensor: Tensor, dims: Sequence[Dim]) -> None:
        self._fix_on_use[tensor] = atoms_of(*dims)

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an op and find the dimensions of its outputs; the parts of a decomposed op are dispatched one by one."""
        options = dict(kwargs or {})
        full_name = func._schema.name
        if full_name.startswith(_IGNORED):
            return func(*args, **options)
        namespace, name = full_name.split("::")
        writes = _writes(func)
        base_name = name.removesuffix("_") if writes and not name.endswith("__") else name
        rule = RULES.get(base_name) if namespace in {"aten", "prims"} else None
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        if rule is None:
            with self:
                result = func.decompose(*args, **options)
                if result is NotImplemented and not writes and func in decomposition_table:
                    result = decomposition_table[func](*args, **options)
            if result is not NotImplemented:
                return result
        reshaped = args[0] if writes and torch.Tag.inplace_view in func.tags else None
        first = next((value for value in tree_leaves((args, options)) if isinstance(value, Tensor)), None)
        before = ((), ()) if first is None else (tuple(first.shape), first.stride())
        dims_before = () if reshaped is None else self._lookup(reshaped)
        result = _grouped_mm(*args, **options) if name == "_grouped_mm" else func(*args, **options)
        outs = tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        lookup = self._track_filled(func, rule, args, options, outs)
        if reshaped is not None:  # its shape has changed in place
            self.dims.pop(reshaped)
            lookup_others = lookup
            lookup = lambda tensor: dims_before if tensor is reshaped else lookup_others(tensor)  # noqa: E731
        bound = _bound_arguments(func, args, options)
        add_index_space = self.index_spaces.append
        call = OpCall(func._overloadname, bound, outs, lookup, self._set_fix_on_use, add_index_space, before)
        try:
            ruled = None if rule is None or _writes_to_other_tensors(call, func, rule) else rule(call)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError):
            ruled = None  # the rule does not cover this call
        if ruled is None or not self._assign(outs, ruled):
            self._report(full_name, call)
            self._assign(outs, opaque(call))
        return result

    def _assign(self, outs: Sequence[Tensor], ruled: Sequence[Result]) -> bool:
        """Assign dimensions to outputs; those of an output that was written in place are unified with its old ones.

        Returns:
            Whether the shapes fit.
        """
        for out, deferred in zip(outs, ruled, strict=False):
            if callable(deferred):
                self._deferred[out] = deferred
        assigned = [
            (out, dims if out.numel() else fresh(tuple(out.shape), True))
            for out, dims in zip(outs, ruled, strict=False)
            if not callable(dims)
        ]
        shapes_fit = [shape_of(dims) for _, dims in assigned] == [tuple(out.shape) for out, _ in assigned]
        if not shapes_fit or len(ruled) < len(outs):
            return False
        for out, dims in assigned:
            before: Dims | None = self.dims.get(out)
            self.index_spaces.append(dims)
            if before is None:
                self.dims[out] = dims
                continue
            if shape_of(before) != shape_of(dims):
                raise RuntimeError("an op changes the shape of a tensor in place")
            for old, new in zip(before, dims, strict=True):
                unify(old, new)
        return True

    def _report(self, op: str, call: OpCall) -> None:
        """Record an op without a rule, if fixing its inputs costs symmetry."""
        if any(not atom.fixed and atom.size > 1 for t in call.tensors for atom in atoms_of(*self._lookup(t))):
            path = next((f"submodule {name!r}" for name in reversed(self._stack) if name), "the module itself")
            self.unknown.setdefault(op, path)


def _grouped_mm(rows: Tensor, matrices: Tensor, *_: Any, **__: Any) -> Tensor:
    """The fake result of a grouped matrix product; torch's own fake kernel only accepts bfloat16."""
    return rows.new_empty(*rows.shape[:-1], matrices.shape[-1])


def _writes(func: OpOverload) -> bool:
    """Whether an op writes to one of its arguments."""
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments)


def _writes_to_other_tensors(call: OpCall, func: OpOverload, rule: Rule) -> bool:
    """Whether an op writes to tensors that it does not return, which only some rules support."""
    if rule in (batch_norm, pointwise):
        return False
    written = [call.args[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return any(all(value is not out for out in call.outs) for value in written)


def storage_of(tensor: Tensor) -> int:
    """An identifier of a tensor's storage, which it shares with its views."""
    return int(tensor.untyped_storage()._cdata)


def _bound_arguments(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an op by name, defaults included."""
    bound = {}
    for index, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        bound[argument.name] = args[index] if index < len(args) else kwargs.get(argument.name, default)
    return bound
