"""The symmetry of a network, read off the graph of its ops.

The module runs once on fake tensors: shapes without numbers, so nothing is computed and nothing allocated. A dispatch
mode sees every ATen op; a rule (`nfn_optim.symmetry.op_rules`) says which axes of its inputs and outputs are the same,
and a union-find (`nfn_optim.symmetry.axes`) collects what follows. Every dimension of every parameter starts as a free
axis of its own. What is unified on the way moves together; what is fixed, because it is an input, an output, a kernel
tap or because an op depends on its order, stays. Nothing asks which class a module has.

    op has a rule            ->  apply it
    op can be decomposed     ->  look at the parts
    otherwise                ->  fix all it touches, name it once
    the trace itself fails   ->  every dimension is a fixed axis of its own, and a warning says why

The result is sound, never more symmetric than the network, as far as the rules are right; `certify` asks the numbers.
Random tensors made during the forward pass count as constants, except the masks of dropout.

References:
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from nfn_optim.symmetry.axes import IN, OUT, Dim, Dims, atoms_of, fix, fresh, shape_of, unify
from nfn_optim.symmetry.certificate import Certificate, certify
from nfn_optim.symmetry.layer_rules import channel_norm
from nfn_optim.symmetry.module import disconnect, find_tensors, is_flattened, minimised, tensors_of, untouched, unwrap
from nfn_optim.symmetry.naming import symmetry_from
from nfn_optim.symmetry.op_call import Call, Result, Rule
from nfn_optim.symmetry.op_rules import KEEP_UNIFORM, RULES, opaque, pointwise
from nfn_optim.symmetry.symmetry import Symmetry

__all__ = ["Certificate", "certify", "symmetry_of"]

_IGNORED = ("prim::", "profiler::", "aten::_assert", "aten::sym_", "aten::is_", "aten::_has_")
_ONE_AT_A_TIME = threading.RLock()  # what a trace switches off while it runs belongs to all threads


def symmetry_of(module: nn.Module, *inputs: Any, **kwargs: Any) -> Symmetry:
    """Find the permutation symmetry of a network by tracing one forward pass.

    The module is traced in the mode it is in, and is left as it was: its parameters, buffers, attributes, training
    flags and the random number generators.

    Args:
        module: Any module; `torch.compile`, `DataParallel` and `DistributedDataParallel` are looked through.
        *inputs: What its forward takes. Only shapes and dtypes of tensors matter: they may be fake or on meta.
        **kwargs: Its keyword arguments.

    Returns:
        The symmetry of all named parameters, then all named buffers of at least one dimension. Free axes are called
        `h0, h1, ...`; fixed ones `in0`, `out0` if they occur in inputs or outputs, `k0` if they are kernel taps, else
        `x0`. Axes of size 1 count as fixed. A product of fixed axes that occurs only as a whole is one axis. Everything
        is separate and fixed, with one warning, if the network cannot be traced.

    Raises:
        ValueError: A lazy parameter has no shape yet.
    """
    tensors = tensors_of(module)
    inner, _ = unwrap(module)
    try:
        if is_flattened(inner):
            raise RuntimeError("FSDP1 flattens parameters; FSDP2, fully_shard, keeps their shapes")
        try:
            with _ONE_AT_A_TIME, torch.inference_mode(False), torch.enable_grad():
                dims, joints, unknown = _trace(inner, list(tensors.values()), inputs, kwargs)
        except Exception:
            if torch.is_grad_enabled():
                raise
            with _ONE_AT_A_TIME:  # it may need to write to parameters
                dims, joints, unknown = _trace(inner, list(tensors.values()), inputs, kwargs)
    except Exception as error:  # whatever a stranger's forward raises; tracing never fails training
        reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:300]}"
        warnings.warn(
            f"{type(module).__name__} could not be traced ({reason}); each dimension of each tensor is taken as a "
            f"fixed axis of its own. To have more, write the symmetry by hand (Symmetry.spec)",
            stacklevel=2,
        )
        return Symmetry.separate({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for op, path in unknown.items():
        warnings.warn(
            f"no rule for the op {op} (first called in {path}); the axes that it touches are taken as fixed. "
            f"The rest of the network is not affected",
            stacklevel=2,
        )
    return symmetry_from(dict(zip(tensors, dims, strict=True)), joints)


# --------------------------------------------------------------------------------------------------------- the one pass


def _trace(
    module: nn.Module, tensors: Sequence[Tensor], inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Dims], list[Dims], dict[str, str]]:
    """Run the module once on fakes.

    Returns:
        The dimensions of `tensors`; the joint spaces of all ops; and the ops without a rule: name -> where it was
        called.

    Raises:
        Exception: Whatever the forward raises on fakes.
    """
    scalars = [b for b in module.buffers() if not b.dim()]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    devices = [t.device for t in [*tensors, *find_tensors((inputs, kwargs))] if not t.is_meta]
    device = devices[0] if devices else torch.device("cpu")  # for tensors on meta, which must not meet others

    def faked(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        where = device if value.is_meta else value.device
        with mode:
            fake = torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device=where)
        if isinstance(value, nn.Parameter):
            return nn.Parameter(fake, value.requires_grad)
        return fake.requires_grad_(value.requires_grad and value.is_leaf)

    tracer = _Tracer(module)
    with untouched(module):
        disconnect(module)
        fakes = {id(tensor): faked(tensor) for tensor in [*tensors, *scalars]}
        for tensor in tensors:
            tracer.adopt(tensor, fakes[id(tensor)])
        named = [*module.named_parameters(), *module.named_buffers()]
        fake_inputs, fake_kwargs = tree_map(faked, (inputs, kwargs))
        for tensor in find_tensors((fake_inputs, fake_kwargs)):
            tracer.dims[tensor] = fresh(tuple(tensor.shape), fixed=True, role=IN)
        storages = {key: _storage_of(fake) for key, fake in fakes.items()}
        with _plain_kernels(), mode, tracer, tracer.paths():
            own = {name: fakes[id(tensor)] for name, tensor in named}
            output = functional_call(module, own, fake_inputs, fake_kwargs, tie_weights=True)
        if any(_storage_of(fake) != storages[key] for key, fake in fakes.items()):
            raise RuntimeError("the forward pass replaces the data of a parameter")
        for name, tensor in named:
            tracer.replace(fakes[id(tensor)], own[name])
    tracer.finish(output)
    return [tracer.dims[fakes[id(tensor)]] for tensor in tensors], tracer.joints, tracer.unknown


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Run modules op by op: no compiled graphs, no fused kernels that hide many ops in one."""
    fastpath, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # says at length what a caught exception says
    level = logger.level
    with torch.compiler.set_stance("force_eager"):
        logger.setLevel(logging.CRITICAL)
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            logger.setLevel(level)
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch._C._set_mkldnn_enabled(onednn)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies the rules to all ops below it.

    Args:
        module: What is traced, for the paths of its submodules.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dims: Any = WeakTensorKeyDictionary()  # Tensor -> Dims
        self.unknown: dict[str, str] = {}
        self.joints: list[Dims] = []
        self._on_use: Any = WeakTensorKeyDictionary()  # Tensor -> Dim
        self._later: Any = WeakTensorKeyDictionary()  # Tensor -> what gives its dimensions, once somebody reads it
        self._uniform: Any = WeakTensorKeyDictionary()  # Tensor of one repeated value -> [True], shared with its views
        self._owned: dict[int, Dims] = {}  # parameters and buffers, by the ids of the real one and of the fake
        self._unused: dict[int, Dims] = {}  # of those that no op has read, by the ids of the dimensions
        self._storages: dict[int, list[Dims]] = {}  # of real parameters
        self._names = {id(sub): name for name, sub in module.named_modules()}
        self._stack: list[str] = []

    def adopt(self, real: Tensor, fake: Tensor) -> None:
        """Give a parameter or buffer free axes of its own, whether it is met as a fake or, bypassing us, as itself."""
        dims = fresh(tuple(real.shape))
        self.dims[real] = self.dims[fake] = dims
        self._owned[id(fake)] = self._owned[id(real)] = self._unused[id(dims)] = dims
        self._storages.setdefault(_storage_of(real), []).append(dims)

    @contextlib.contextmanager
    def paths(self) -> Iterator[None]:
        """Keep track of which submodule is running, in this thread; hooks hear all of them."""
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

    def replace(self, old: Tensor, new: Any) -> None:
        """Hold a buffer that the forward pass sets anew to the axes of what it was."""
        if old is new or not old.dim():
            return
        if not isinstance(new, Tensor) or new.shape != old.shape:
            fix(*self.dims[old])
            return
        for before, after in zip(self._lookup(old), self._lookup(new), strict=True):
            unify(before, after)

    def finish(self, output: Any) -> None:
        """Fix what the network returns, and what it never looked at."""
        found = find_tensors(minimised(output), strict=True)
        if not found:
            raise RuntimeError(f"no tensor found in its output of type {type(output).__name__}")
        for tensor in found:
            fix(*self._lookup(tensor), role=OUT)
        for dims in self._unused.values():
            fix(*dims)

    def _lookup(self, tensor: Tensor) -> Dims:
        """The dimensions of any tensor that an op or the output mentions."""
        self._unused.pop(id(self._owned.get(id(tensor))), None)
        if (watched := self._on_use.get(tensor)) is not None:
            fix(watched)
        if not tensor.dim():
            return ()
        if (later := self._later.pop(tensor, None)) is not None:
            self.dims[tensor] = found = later()
            self.joints.append(found)
        dims: Dims | None = self.dims.get(tensor)
        if dims is not None and shape_of(dims) == tuple(tensor.shape):
            return dims
        if dims is not None or isinstance(tensor, FakeTensor):
            raise RuntimeError("lost track of a tensor")
        for shared in self._storages.get(_storage_of(tensor), []):
            fix(*shared)
        self.dims[tensor] = dims = fresh(tuple(tensor.shape), fixed=True)
        return dims

    def _keep_uniform(
        self, func: OpOverload, rule: Rule | None, args: Any, kwargs: Any, outs: Sequence[Tensor]
    ) -> Callable[[Tensor], Dims]:
        """Note whether an op makes tensors of one repeated value; returns how the op is to look its inputs up.

        Such a tensor looks the same in any order, so that what meets it there need not be the same axes each time; only
        ops among such tensors, views above all, keep track of its own.
        """
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        uniform = [self._uniform.get(tensor, [False]) for tensor in tensors]
        made = all(flag[0] for flag in uniform) and rule in KEEP_UNIFORM
        made = made and torch.Tag.nondeterministic_seeded not in func.tags
        writes = _writes(func)
        for out in outs:
            shared = [flag for t, flag in zip(tensors, uniform, strict=True) if _storage_of(t) == _storage_of(out)]
            if made:
                self._uniform[out] = shared[0] if shared else [True]
            for flag in shared:
                if not made and writes:
                    flag[0] = False
                elif not made:
                    self._uniform[out] = flag
        if made:
            return self._lookup
        anew = {
            id(t): fresh(tuple(t.shape))
            for t, flag in zip(tensors, uniform, strict=True)
            if flag[0] and all(t is not out for out in outs)
        }
        return lambda tensor: anew.get(id(tensor)) or self._lookup(tensor)

    def _watch(self, tensor: Tensor, dims: Sequence[Dim]) -> None:
        self._on_use[tensor] = atoms_of(*dims)

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an op, then say what its outputs are; parts of a decomposed op come back here one by one."""
        options = dict(kwargs or {})
        full_name = func._schema.name
        if full_name.startswith(_IGNORED):
            return func(*args, **options)
        space, name = full_name.split("::")
        written = _writes(func)
        base = name.removesuffix("_") if written and not name.endswith("__") else name
        rule = RULES.get(base) if space in {"aten", "prims"} else None
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        if rule is None:
            with self:
                parts = func.decompose(*args, **options)
                if parts is NotImplemented and not written and func in decomposition_table:
                    parts = decomposition_table[func](*args, **options)
            if parts is not NotImplemented:
                return parts
        turned = args[0] if written and torch.Tag.inplace_view in func.tags else None
        first = next((value for value in tree_leaves((args, options)) if isinstance(value, Tensor)), None)
        before = ((), ()) if first is None else (tuple(first.shape), first.stride())
        known = () if turned is None else self._lookup(turned)
        result = _grouped(*args, **options) if name == "_grouped_mm" else func(*args, **options)
        outs = tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        read = self._keep_uniform(func, rule, args, options, outs)
        if turned is not None:  # the tensor itself has another shape now
            self.dims.pop(turned)
            otherwise = read
            read = lambda tensor: known if tensor is turned else otherwise(tensor)  # noqa: E731
        bound = _bound(func, args, options)
        call = Call(func._overloadname, bound, outs, read, self._watch, self.joints.append, before)
        try:
            ruled = None if rule is None or _writes_besides(call, func, rule) else rule(call)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError):
            ruled = None  # called in a way that the rule does not foresee
        if ruled is None or not self._assign(outs, ruled):
            self._report(full_name, call)
            self._assign(outs, opaque(call))
        return result

    def _assign(self, outs: Sequence[Tensor], ruled: Sequence[Result]) -> bool:
        """Give outputs their dimensions; one that had some, because it was written in place, keeps them as well."""
        for out, later in zip(outs, ruled, strict=False):
            if callable(later):
                self._later[out] = later
        found = [
            (out, dims if out.numel() else fresh(tuple(out.shape), True))
            for out, dims in zip(outs, ruled, strict=False)
            if not callable(dims)
        ]
        if [shape_of(dims) for _, dims in found] != [tuple(out.shape) for out, _ in found] or len(ruled) < len(outs):
            return False
        for out, dims in found:
            before: Dims | None = self.dims.get(out)
            self.joints.append(dims)
            if before is None:
                self.dims[out] = dims
                continue
            if shape_of(before) != shape_of(dims):
                raise RuntimeError("an op changes the shape of a tensor in place")
            for old, new in zip(before, dims, strict=True):
                unify(old, new)
        return True

    def _report(self, op: str, call: Call) -> None:
        """Remember an op without a rule, if it costs something."""
        if any(not atom.fixed and atom.size > 1 for t in call.tensors for atom in atoms_of(*self._lookup(t))):
            path = next((f"submodule {name!r}" for name in reversed(self._stack) if name), "the module itself")
            self.unknown.setdefault(op, path)


def _grouped(rows: Tensor, matrices: Tensor, *_: Any, **__: Any) -> Tensor:
    """What a grouped matrix product returns; its own fake kernel takes bfloat16 only."""
    return rows.new_empty(*rows.shape[:-1], matrices.shape[-1])


def _writes(func: OpOverload) -> bool:
    """Whether an op writes to one of its arguments."""
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments)


def _writes_besides(call: Call, func: OpOverload, rule: Rule) -> bool:
    """Whether an op writes to tensors that it does not return, which few rules foresee."""
    if rule in (channel_norm, pointwise):
        return False
    written = [call.args[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return any(all(value is not out for out in call.outs) for value in written)


def _storage_of(tensor: Tensor) -> int:
    """What tensors that are views of each other have in common."""
    return int(tensor.untyped_storage()._cdata)


def _bound(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an op by name, defaults included."""
    bound = {}
    for number, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        bound[argument.name] = args[number] if number < len(args) else kwargs.get(argument.name, default)
    return bound
