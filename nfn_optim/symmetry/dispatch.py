"""A dispatch mode that applies the rules to every op and records the axes of every tensor.

It observes real and fake tensors alike, and only their shapes and identities. Tensors are held weakly. An op whose
inputs have the same dimensions as an earlier one's has the same outputs; its rule is not applied again, so that a loop
over many time steps costs a look-up for each op.

Legend: see `nfn_optim.symmetry.axes` for `Dim`, `Dims` and atoms.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nfn_optim.symmetry.axes import Axis, Dim, Dims, atoms_of, fresh, root_of, shape_of
from nfn_optim.symmetry.op_call import OpCall, Result
from nfn_optim.symmetry.op_plan import OpPlan, plan_of
from nfn_optim.symmetry.op_rules import opaque
from nfn_optim.symmetry.storage_table import StorageTable, storage_of
from nfn_optim.symmetry.tensor_map import TensorMap
from nfn_optim.symmetry.unification import fix, unify

FILLED, UNWRITTEN = 1, 2
"""All entries of a tensor are equal; or it was allocated and no op has written to it."""


class Entry:
    """What is known of a tensor.

    Args:
        dims: Its dimensions; None if they are not known yet.

    Attributes:
        compute: Returns its dimensions at the first use.
        filled: `[FILLED]`, shared with its views, if all its entries are equal, `[UNWRITTEN]` if they have no values
            yet, `[0]` if it was so once; None if it was never so.
        fix_on_use: Axes to fix once the tensor is used.
        is_weight: Whether it is a parameter or a buffer, or was made of a single one.
    """

    __slots__ = ("compute", "dims", "filled", "fix_on_use", "is_weight")

    def __init__(self, dims: Dims | None = None) -> None:
        """See the class."""
        self.dims = dims
        self.compute: Callable[[], Dims] | None = None
        self.filled: list[int] | None = None
        self.fix_on_use: Dim | None = None
        self.is_weight = False


class AxisTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies the rules to all ops that run while it is active.

    Attributes:
        index_spaces: The index spaces of all ops.
        unknown: Op without a rule -> the submodule that first called it.
        path: Names of the submodules that are running, the innermost last.
        count: How many rules were applied.
        follows: Whether `follow` is called.
    """

    def __init__(self) -> None:
        """See the class."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.index_spaces: list[Dims] = []
        self.unknown: dict[str, str] = {}
        self.path: list[str] = []
        self.count = 0
        self.follows = False
        self._entries: TensorMap[Entry] = TensorMap()
        self._storages: StorageTable[Entry] = StorageTable()
        self._unused: dict[int, Dims] = {}  # of parameters and buffers that no op has used, by the id of the Dims
        self._memo: dict[Hashable, list[Entry]] = {}  # a key holds its Dims by id, `_kept` keeps those alive
        self._kept: list[list[Dims | None]] = []
        self._dims: dict[Hashable, tuple[Dims, list[Axis]]] = {}  # by the ids of representatives, which are kept too

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while the mode is on, and the wrapper would double the cost of an op

    def interned(self, dims: Dims) -> Dims:
        """The first object with these dimensions, so that equal ones are recognised by identity."""
        axes = [[root_of(axis) for axis in dim] for dim in dims]
        key = tuple(tuple(map(id, dim)) for dim in axes)
        return self._dims.setdefault(key, (dims, [axis for dim in axes for axis in dim]))[0]

    def give(self, tensor: Tensor, dims: Dims, is_weight: bool = False, until_used: bool = False) -> None:
        """Give a tensor its dimensions.

        Args:
            tensor: A parameter, buffer or input.
            dims: Its dimensions.
            is_weight: Whether it is a parameter or a buffer.
            until_used: Whether to record that no op has used them.
        """
        self._entries[tensor] = entry = Entry(dims)
        entry.is_weight = is_weight
        self._storages.add(tensor, entry)
        if until_used:
            self._unused[id(dims)] = dims

    def is_known(self, tensor: Tensor) -> bool:
        """Whether the tensor has dimensions."""
        entry = self._entries.get(tensor)
        return entry is not None and (entry.dims is not None or entry.compute is not None)

    def is_used(self, dims: Dims) -> bool:
        """Whether an op has used the tensor that was given these dimensions."""
        return id(dims) not in self._unused

    def unify_reassigned(self, old: Tensor, new: Any) -> None:
        """Unify the axes of a buffer with those of the tensor that the forward pass replaced it with."""
        if old is new or not old.dim():
            return
        if not isinstance(new, Tensor) or new.shape != old.shape:
            fix(*self.lookup(old))
            return
        for before, after in zip(self.lookup(old), self.lookup(new), strict=True):
            unify(before, after)

    def fix_unused(self) -> None:
        """Fix the axes of parameters and buffers that no op has used."""
        for dims in self._unused.values():
            fix(*dims)

    def lookup(self, tensor: Tensor) -> Dims:
        """The dimensions of a tensor that is used by an op or the output."""
        entry = self._entries.get(tensor)
        if entry is not None and entry.fix_on_use is not None:
            fix(entry.fix_on_use)
        if not tensor.dim():
            return ()
        dims = None if entry is None else self._resolved(entry)
        if dims is None:
            dims = self.dims_of_unknown(tensor)
            self._entry_of(tensor).dims = dims
        self._unused.pop(id(dims), None)
        if shape_of(dims) != tuple(tensor.shape):
            raise RuntimeError("a tensor has a shape or an origin that tracing cannot follow")
        return dims

    def _resolved(self, entry: Entry) -> Dims | None:
        """The dimensions of an entry, computed now if they were deferred."""
        if entry.compute is not None:
            entry.dims, entry.compute = self.interned(entry.compute()), None
            self.index_spaces.append(entry.dims)
        return entry.dims

    def dims_of_unknown(self, tensor: Tensor) -> Dims:
        """The dimensions of a tensor that no op has returned: a constant, or an alias of a tensor that is known.

        Raises:
            RuntimeError: It may be something else.
        """
        if isinstance(tensor, FakeTensor):
            raise RuntimeError("a tensor has a shape or an origin that tracing cannot follow")
        same, overlapping = self._storages.find(tensor)
        if same is not None and (dims := self._resolved(same)) is not None:
            return dims
        for entry in overlapping:
            fix(*(self._resolved(entry) or ()))
        return fresh(tuple(tensor.shape), fixed=True)

    def follow(self, tensors: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Called for every op with its inputs and outputs, before rules are applied."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an op and find the dimensions of its outputs; the parts of a decomposed op are dispatched one by one."""
        options = kwargs or {}
        plan = plan_of(func)
        if plan.ignored:
            return func(*args, **options)
        if plan.rule is None and (result := self.decompose(func, plan, args, options)) is not NotImplemented:
            return result
        key = self.key_of(func, args, options, plan.uses_numbers) if plan.repeatable else None
        if key is not None and plan.selects and self._is_fixed(args[0], args[1]):
            key = key[:-1]  # an entry of a fixed axis is like any other
        if key not in self._memo:
            inputs = tensors_in((args, options))
            before = ((), ()) if not inputs or not plan.needs_strides else (tuple(inputs[0].shape), inputs[0].stride())
            dims_before = self.dims_before(inputs[0]) if plan.reshapes else ()
            result = _grouped_mm(*args, **options) if plan.is_fake_grouped_mm(inputs) else func(*args, **options)
            call = OpCall(func._overloadname, _bound_arguments(func, args, options), tensors_in(result), before)
            self.analyse(func, plan, key, inputs, call, dims_before)
            return result
        result = func(*args, **options)
        outs = tensors_in(result)
        if self.follows:
            self.follow(tensors_in((args, options)), outs)
        self.recall(key, outs)
        return result

    def _is_fixed(self, tensor: Tensor, dim: int) -> bool:
        """Whether a dimension of a tensor consists of fixed axes without parts."""
        return all(atom.fixed and atom.parts is None for atom in atoms_of(self.lookup(tensor)[dim]))

    def recall(self, key: Hashable, outs: Sequence[Tensor]) -> bool:
        """Give outputs the dimensions that those of an earlier call have; returns whether there was one."""
        memo = self._memo.get(key)
        if memo is None:
            return False
        for out, entry in zip(outs, memo, strict=True):
            if self._entries.get(out) is None:  # else it was written in place
                self._entries[out] = entry
                self.record(out)
        return True

    def remember(self, key: Hashable, inputs: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Remember the dimensions of the outputs of a call, unless there is more to know of them."""
        entries = [self._entry_of(out) for out in outs]
        if key is not None and all(entry.filled is None and entry.fix_on_use is None for entry in entries):
            self._memo[key] = entries
            self._kept.append([self._entry_of(tensor).dims for tensor in inputs])

    def decompose(self, func: OpOverload, plan: OpPlan, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Run the parts of an op that has no rule; returns NotImplemented if it has none."""
        with self:
            result = func.decompose(*args, **options)
            if result is NotImplemented and not plan.writes and func in decomposition_table:
                result = decomposition_table[func](*args, **options)
        return result

    def dims_before(self, tensor: Tensor) -> Dims:
        """The dimensions of a tensor that an op is about to use."""
        return self.lookup(tensor)

    def is_overwritten(self, tensor: Tensor, filled: int) -> bool:
        """Whether a tensor that was `FILLED` or `UNWRITTEN` may have been written to out of sight."""
        return False

    def record(self, out: Tensor) -> None:
        """Called for every output of an op, once its entry is known."""

    def key_of(self, func: Hashable, args: Sequence[Any], options: Mapping[str, Any], numbers: bool) -> Any:
        """A value that calls have in common whose outputs have the same dimensions; None if that is not known."""
        parts: list[Hashable] = [func]
        entries = self._entries
        for value in (*args, *options.values()) if options else args:
            if isinstance(value, Tensor):
                entry = entries.get(value)
                if entry is None:
                    if value.dim():
                        return None
                    parts.append(())
                elif entry.filled is None and entry.fix_on_use is None:
                    parts.append(id(entry.dims if entry.compute is None else self.dims_before(value)))
                else:
                    return None
            elif isinstance(value, list):
                if any(isinstance(item, Tensor) for item in value):
                    return None
                parts.append(tuple(value))
            elif numbers:
                parts.append(value)
        key = tuple(parts)
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def analyse(
        self, func: OpOverload, plan: OpPlan, key: Hashable, inputs: Sequence[Tensor], call: OpCall, dims_before: Dims
    ) -> None:
        """Apply the rule of an op that has run, and remember the result by `key`, if there is one."""
        if self.follows:
            self.follow(inputs, call.outs)
        self.count += 1
        call.is_weight = len(inputs) == 1 and self._entry_of(inputs[0]).is_weight
        valued = [t for t in call.tensors if not any(self._entry_of(t).filled or ())]
        not_returned = _written_not_returned(call, func, plan) if plan.writes else []
        lookup = self._track_filled(plan, inputs, (*call.outs, *not_returned))
        if plan.reshapes:  # the shape of the first input has changed in place
            self._entries.pop(inputs[0])
            lookup_others = lookup
            lookup = lambda tensor: dims_before if tensor is inputs[0] else lookup_others(tensor)  # noqa: E731
        call.lookup, call.fix_on_use, call.add_index_space = lookup, self._set_fix_on_use, self.index_spaces.append
        try:
            ruled = None if plan.rule is None or (not_returned and not plan.writes_to_inputs) else plan.rule(call)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError):
            ruled = None  # the rule does not cover this call
        if ruled is None or not self._assign(call.outs, ruled):
            self._report(plan.full_name, valued)
            self._assign(call.outs, opaque(call))
        for out in call.outs:
            self._entry_of(out).is_weight |= call.is_weight
            self.record(out)
        self.remember(key, inputs, call.outs)

    def _entry_of(self, tensor: Tensor) -> Entry:
        """The entry of a tensor, new if it has none."""
        entry = self._entries.get(tensor)
        if entry is None:
            entry = self._entries[tensor] = Entry()
        return entry

    def _track_filled(self, plan: OpPlan, inputs: Sequence[Tensor], outs: Sequence[Tensor]) -> Callable[[Tensor], Dims]:
        """Record whether an op returns tensors whose entries are all equal; returns the lookup of its inputs.

        Such a tensor is the same in any order, so that each op that combines it with other tensors may see it with new
        axes. Only ops among such tensors, views above all, see its own axes.
        """
        if plan.allocates:
            for out in outs:
                self._entry_of(out).filled = [UNWRITTEN]
            return self.lookup
        flags = [entry.filled if (entry := self._entries.get(t)) is not None else None for t in inputs]
        if not any(flags) and (inputs or not plan.preserves_fill):
            return self.lookup
        for t, flag in zip(inputs, flags, strict=True):
            if (
                flag
                and flag[0]
                and plan.reads
                and all(t is not out for out in outs)
                and self.is_overwritten(t, flag[0])
            ):
                flag[0] = 0
                self._entry_of(t).filled = None
                fix(*self.lookup(t))
        preserved = plan.preserves_fill and all(flag is not None and flag[0] for flag in flags)
        for out in outs:
            shared = [flag for t, flag in zip(inputs, flags, strict=True) if flag and storage_of(t) == storage_of(out)]
            if preserved:
                self._entry_of(out).filled = shared[0] if shared else [FILLED]
            for flag in shared:
                if preserved and plan.writes:
                    flag[0] = FILLED
                elif plan.writes:
                    flag[0] = 0
                elif not preserved:
                    self._entry_of(out).filled = flag
        if preserved:
            return self.lookup
        new_dims = {
            id(t): fresh(tuple(t.shape))
            for t, flag in zip(inputs, flags, strict=True)
            if flag is not None and flag[0] and all(t is not out for out in outs)
        }
        return lambda tensor: new_dims.get(id(tensor)) or self.lookup(tensor)

    def _set_fix_on_use(self, tensor: Tensor, dims: Sequence[Dim]) -> None:
        self._entry_of(tensor).fix_on_use = atoms_of(*dims)

    def _assign(self, outs: Sequence[Tensor], ruled: Sequence[Result]) -> bool:
        """Assign dimensions to outputs; those of an output that was written in place are unified with its old ones.

        Returns:
            Whether the shapes fit.
        """
        for out, deferred in zip(outs, ruled, strict=False):
            if callable(deferred):
                self._entry_of(out).compute = deferred
        assigned = [(out, dims) for out, dims in zip(outs, ruled, strict=False) if not callable(dims)]
        shapes_fit = [shape_of(dims) for _, dims in assigned] == [tuple(out.shape) for out, _ in assigned]
        if not shapes_fit or len(ruled) < len(outs):
            return False
        for out, dims in assigned:
            self.index_spaces.append(dims)
            if not out.dim():
                continue
            entry = self._entry_of(out)
            if entry.dims is None:
                entry.dims = self.interned(dims)
                continue
            if shape_of(entry.dims) != shape_of(dims):
                raise RuntimeError("an op changes the shape of a tensor in place")
            for old, new in zip(entry.dims, dims, strict=True):
                unify(old, new)
        return True

    def _report(self, op: str, tensors: Sequence[Tensor]) -> None:
        """Record an op without a rule, if fixing its inputs, those that have values, costs symmetry."""
        if any(not atom.fixed and atom.size > 1 for t in tensors for atom in atoms_of(*self.lookup(t))):
            path = next((f"submodule {name!r}" for name in reversed(self.path) if name), "the module itself")
            self.unknown.setdefault(op, path)


def tensors_in(value: Any) -> tuple[Tensor, ...]:
    """All tensors in the arguments or the result of an op."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, list | tuple):
        return tuple(tensor for item in value if item is not None for tensor in tensors_in(item))
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    return ()


def _grouped_mm(rows: Tensor, matrices: Tensor, *_: Any, **__: Any) -> Tensor:
    """The fake result of a grouped matrix product; torch's own fake kernel only accepts bfloat16."""
    return rows.new_empty(*rows.shape[:-1], matrices.shape[-1])


def _written_not_returned(call: OpCall, func: OpOverload, plan: OpPlan) -> list[Tensor]:
    """The tensors that an op writes to and does not return, which only some rules support."""
    writes = [plan.communicates or (a.alias_info is not None and a.alias_info.is_write) for a in func._schema.arguments]
    written = tensors_in([call.args[a.name] for a, w in zip(func._schema.arguments, writes, strict=True) if w])
    return [tensor for tensor in written if all(tensor is not out for out in call.outs)]


def _bound_arguments(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an op by name, defaults included."""
    bound = {}
    for index, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        bound[argument.name] = args[index] if index < len(args) else kwargs.get(argument.name, default)
    return bound
