"""The symmetry of a network, from a trace of its ops.

For those who ask for it: an optimizer traces real forward passes instead (`nfn_optim.symmetry.live_trace`), with the
same mode and the same rules. Here the module runs once on fake tensors, which have shapes but no data, so that nothing
is computed or allocated. A dispatch mode (`nfn_optim.symmetry.dispatch`) intercepts every ATen op, a rule
(`nfn_optim.symmetry.op_rules`) relates the axes of its outputs to those of its inputs, and a union-find
(`nfn_optim.symmetry.unification`) collects the relations. Every dimension of every parameter starts as a free axis of
its own. Axes that are unified are permuted together. Axes of inputs, outputs and kernel taps are fixed, as are axes on
whose order an op depends. The class of a module is never used.

    op has a rule            ->  apply it
    op can be decomposed     ->  trace its parts
    otherwise                ->  fix all axes of its inputs and outputs, and warn once
    the trace itself fails   ->  every dimension is a fixed axis of its own, and a warning gives the reason

The result is sound, i.e. never more symmetric than the network, as far as the rules are correct; `certify` checks it
numerically. Random tensors made in the forward pass count as constants, except dropout masks.

References:
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_map

from nfn_optim.symmetry.axes import IN, OUT, Dims, fresh
from nfn_optim.symmetry.dispatch import AxisTracer
from nfn_optim.symmetry.module import (
    find_tensors,
    is_fsdp1,
    remove_communication_hooks,
    restored,
    tensors_of,
    tensors_of_output,
    unwrap_with_prefix,
)
from nfn_optim.symmetry.naming import symmetry_from
from nfn_optim.symmetry.storage_table import storage_of
from nfn_optim.symmetry.symmetry import Symmetry
from nfn_optim.symmetry.unification import fix

_TRACE_LOCK = threading.RLock()  # a trace changes global settings of torch


def symmetry_of(module: nn.Module, *inputs: Any, **kwargs: Any) -> Symmetry:
    """Find the permutation symmetry of a network by tracing one forward pass.

    The module is traced in its current mode and is not changed: neither are its parameters, buffers, attributes and
    training flags, nor the random number generators.

    Args:
        module: Any module; `torch.compile`, `DataParallel` and `DistributedDataParallel` are unwrapped.
        *inputs: Positional arguments of its forward. Only shapes and dtypes of tensors matter: they may be fake or on
            the meta device.
        **kwargs: Keyword arguments of its forward.

    Returns:
        The symmetry of all named parameters, then all named buffers of at least one dimension. Free axes are called
        `h0, h1, ...`; fixed ones `in0`, `out0` if they occur in inputs or outputs, `k0` if they are kernel taps, else
        `x0`. Axes of size 1 are fixed. Fixed axes that only occur together, as one product, are one axis. If the
        network cannot be traced, all dimensions are separate and fixed, with one warning.

    Raises:
        ValueError: A lazy parameter has no shape yet.
    """
    tensors = tensors_of(module)
    inner, _ = unwrap_with_prefix(module)
    try:
        if is_fsdp1(inner):
            raise RuntimeError("FSDP1 flattens parameters; FSDP2, fully_shard, keeps their shapes")
        try:
            with _TRACE_LOCK, torch.inference_mode(False), torch.enable_grad():
                dims, index_spaces, unknown = _trace(inner, list(tensors.values()), inputs, kwargs)
        except Exception:
            if torch.is_grad_enabled():
                raise
            with _TRACE_LOCK:  # the forward pass may write to parameters, which only works without gradients
                dims, index_spaces, unknown = _trace(inner, list(tensors.values()), inputs, kwargs)
    except Exception as error:  # the forward of an arbitrary module may raise anything; training must go on
        reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:300]}"
        warnings.warn(
            f"{type(module).__name__} could not be traced ({reason}); every dimension of every tensor becomes a fixed "
            f"axis of its own. To use its symmetry, write it by hand (Symmetry.spec)",
            stacklevel=2,
        )
        return Symmetry.separate({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for op, path in unknown.items():
        warnings.warn(
            f"no rule for the op {op} (first called in {path}); the axes of its inputs and outputs are fixed. "
            f"The rest of the network is not affected",
            stacklevel=2,
        )
    return symmetry_from(dict(zip(tensors, dims, strict=True)), index_spaces)


def _trace(
    module: nn.Module, tensors: Sequence[Tensor], inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Dims], list[Dims], dict[str, str]]:
    """Run the module once on fake tensors.

    Returns:
        The dimensions of `tensors`; the index spaces of all ops; the ops without a rule: name -> where it was first
        called.

    Raises:
        Exception: Any error that the forward raises on fake tensors.
    """
    scalars = [b for b in module.buffers() if not b.dim()]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    devices = [t.device for t in [*tensors, *find_tensors((inputs, kwargs))] if not t.is_meta]
    device = devices[0] if devices else torch.device("cpu")  # for meta tensors, which cannot be mixed with others

    def faked(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fake_device = device if value.is_meta else value.device
        with mode:
            fake = torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device=fake_device)
        if isinstance(value, nn.Parameter):
            return nn.Parameter(fake, value.requires_grad)
        return fake.requires_grad_(value.requires_grad and value.is_leaf)

    tracer = AxisTracer()
    with restored(module):
        remove_communication_hooks(module)
        fakes = {id(tensor): faked(tensor) for tensor in [*tensors, *scalars]}
        for tensor in tensors:
            dims = fresh(tuple(tensor.shape))
            for known in (tensor, fakes[id(tensor)]):  # an op may meet the real one, if it bypasses us
                tracer.give(known, dims, is_weight=True, until_used=True)
        named = [*module.named_parameters(), *module.named_buffers()]
        fake_inputs, fake_kwargs = tree_map(faked, (inputs, kwargs))
        for tensor in find_tensors((fake_inputs, fake_kwargs)):
            tracer.give(tensor, fresh(tuple(tensor.shape), fixed=True, role=IN))
        storages = {key: storage_of(fake) for key, fake in fakes.items()}
        with _plain_kernels(), mode, tracer, _tracking_submodules(module, tracer.path):
            own = {name: fakes[id(tensor)] for name, tensor in named}
            output = functional_call(module, own, fake_inputs, fake_kwargs, tie_weights=True)
        if any(storage_of(fake) != storages[key] for key, fake in fakes.items()):
            raise RuntimeError("the forward pass replaces the data of a parameter")
        for name, tensor in named:
            tracer.unify_reassigned(fakes[id(tensor)], own[name])
    for tensor in tensors_of_output(output):
        fix(*tracer.lookup(tensor), role=OUT)
    tracer.fix_unused()
    return [tracer.lookup(fakes[id(tensor)]) for tensor in tensors], tracer.index_spaces, tracer.unknown


@contextlib.contextmanager
def _tracking_submodules(module: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep the names of the submodules that are running in this thread; global hooks are called in all threads."""
    thread, names = threading.get_ident(), {id(sub): name for name, sub in module.named_modules()}

    def enter(sub: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            path.append(names.get(id(sub), type(sub).__name__))

    def leave(*_: Any) -> None:
        if threading.get_ident() == thread:
            path.pop()

    entering = register_module_forward_pre_hook(enter)
    leaving = register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        entering.remove()
        leaving.remove()


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Run modules op by op: no compiled graphs, no fused kernels that combine many ops in one."""
    fastpath, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # it logs exceptions that are caught here
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
