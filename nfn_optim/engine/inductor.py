"""Compiling functions of tensors with inductor, and falling back to eager execution where that fails.

A function is traced once with symbolic sizes and the trace is compiled. The graph serves all tensors of the same kinds
(number of dimensions, which sizes are 1, dtype, device) whose sizes meet the guards collected in tracing; guards are
evaluated once for each set of sizes, so that a call costs one dictionary lookup. The overhead of a call is a fifth of
`torch.compile`'s, which counts where a pass goes over a large tensor in many tiles.

After one failure nothing is compiled any more in this process: everything continues uncompiled, with one warning.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

if TYPE_CHECKING:
    import sympy

OPTIONS: dict[str, Any] = {
    "realize_reads_threshold": 10**5,
    "realize_opcount_threshold": 10**5,
    "realize_acc_reads_threshold": 10**5,
    "max_fusion_size": 10**5,
    "size_asserts": False,
}
"""Prefer recomputing to storing, and omit assertions on sizes, which `run` has checked."""

TRUNCATED = re.compile(r"(/\S+\.so): file too short")  # what the loader says
_failures: list[str] = []  # in this process
_compile_lock = threading.Lock()  # for training in threads


@cache
def can_compile() -> bool:
    """Whether there is a C++ compiler, as `torch.compile` looks for it."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def has_failed() -> bool:
    """Whether compilation has failed in this process."""
    return bool(_failures)


@cache
def announce() -> None:
    """Say, once in a process, that training is about to stop for a while."""
    logging.getLogger(__name__).warning(
        "compiling the optimizer's steps, which takes half a minute or more once, and seconds in each later process; "
        "training then goes on, with faster steps; compile=False avoids it"
    )


def fail(error: Exception) -> None:
    """Stop compiling in this process, with a warning."""
    _failures.append(repr(error))
    warnings.warn(
        f"the update rule could not be compiled and continues uncompiled, which is slower: {error!r:.500}; "
        f"install a C++ compiler, or pass compile=False to silence this",
        stacklevel=4,
    )


@dataclass(frozen=True)
class Graph:
    """A compiled function.

    Attributes:
        run: From tensors to the flat list of tensors returned.
        unflatten: From that list to the function's return value.
        sizes: Symbol of a dynamic size -> index of the argument, and of its dimension.
        guards: Conditions on the symbols.
    """

    run: Callable[..., Any]
    unflatten: Callable[[list[Tensor]], Any]
    sizes: Mapping[sympy.Symbol, tuple[int, int]]
    guards: Sequence[sympy.Basic]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the guards hold for tensors of these sizes."""
        sizes = {symbol: tensors[index].shape[dim] for symbol, (index, dim) in self.sizes.items()}
        return all(guard.subs(sizes) == True for guard in self.guards)  # noqa: E712 - sympy's, or undecided


_graphs: dict[Hashable, list[Graph]] = {}  # by everything that a graph is specialised to
_graph_of_sizes: dict[Hashable, Graph | None] = {}


def graph_count() -> int:
    """Number of compiled graphs."""
    return sum(map(len, _graphs.values()))


def clear() -> None:
    """Forget all graphs, so that everything is compiled anew."""
    _graphs.clear()
    _graph_of_sizes.clear()


def run(function: Callable[..., Any], *args: Any, dynamic: bool = True) -> Any:
    """Call a function compiled, and uncompiled where tensors are not contiguous or compilation fails.

    Args:
        function: May change tensors in place; must not depend on their values for its control flow.
        *args: Tensors, lists of tensors, and hashable values, to which a graph is specialised.
        dynamic: Whether one graph serves all sizes; 0 and 1 are always specialised.

    Returns:
        The function's return value: tensors in tuples and lists.
    """
    if _failures:
        return function(*args)
    tensors, form = _flatten(args)
    kinds = tuple([(x.shape, x.dtype, x.device, x.is_contiguous()) for x in tensors])
    key = function, form, kinds, torch.get_num_threads()
    if key not in _graph_of_sizes:
        contiguous = all(x.is_contiguous() for x in tensors)
        _graph_of_sizes[key] = _graph_for(function, form, tensors, dynamic=dynamic) if contiguous else None
    graph = _graph_of_sizes[key]
    if graph is None:
        return function(*args)
    return graph.unflatten(graph.run(*tensors))


def _graph_for(
    function: Callable[..., Any], form: tuple[Any, ...], tensors: Sequence[Tensor], *, dynamic: bool
) -> Graph | None:
    """An existing graph or a new one, None if compilation fails; arguments as of `run`."""
    limit = 2 if dynamic else sys.maxsize  # smaller sizes are specialised
    kinds = tuple((tuple(min(n, limit) for n in x.shape), x.dtype, x.device) for x in tensors)
    graphs = _graphs.setdefault((function, form, kinds, torch.get_num_threads()), [])
    for graph in graphs:
        if graph.holds(tensors):
            return graph
    new = compile_graph(lambda *xs: function(*_unflatten(form, iter(xs))), list(tensors), dynamic=dynamic)
    graphs += [] if new is None else [new]
    return new


def _flatten(args: Sequence[Any]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The tensors in arguments, and the form of the rest: `Tensor` for one, (`Tensor`, length) for a list of them."""
    tensors: list[Tensor] = []
    form: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            tensors.append(arg)
            form.append(Tensor)
        elif isinstance(arg, list | tuple):
            tensors += arg
            form.append((Tensor, len(arg)))
        else:
            form.append(arg)
    return tensors, tuple(form)


def _unflatten(form: Sequence[Any], tensors: Iterator[Tensor]) -> Iterator[Any]:
    """The inverse of `_flatten`."""
    for part in form:
        if part is Tensor:
            yield next(tensors)
        elif isinstance(part, tuple):
            yield list(islice(tensors, part[1]))
        else:
            yield part


def compile_graph(function: Callable[..., Any], args: list[Tensor], *, dynamic: bool = False) -> Graph | None:
    """Trace a function of tensors, with everything that it calls, and compile the trace; None if that fails.

    Args:
        function: Must not depend on values of tensors for its control flow.
        args: Example tensors; they may be changed, unless the graph is dynamic.
        dynamic: Whether sizes of 2 and more may differ later; tensors are then contiguous.
    """
    announce()
    unflatten: list[Callable[[list[Tensor]], Any]] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = function(*tensors)
        values, structure = pytree.tree_flatten(result)
        if isinstance(result, tuple) and all(isinstance(x, Tensor) for x in result):  # unflattening a tree is slow
            unflatten.append(tuple)
        else:
            unflatten.append(itemgetter(0) if len(values) == 1 else partial(pytree.tree_unflatten, treespec=structure))
        return tuple(values)

    try:
        with _compile_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between parts of torch
            compiled, symbols, guards = _compile(flat, args, dynamic=dynamic)
    except Exception as error:  # eager execution is always possible
        fail(error)
        return None
    return Graph(compiled, unflatten[-1], symbols, guards)


def _compile(
    function: Callable[..., tuple[Tensor, ...]], args: Sequence[Tensor], *, dynamic: bool
) -> tuple[Callable[..., Any], dict[sympy.Symbol, tuple[int, int]], tuple[sympy.Basic, ...]]:
    """The parts of a `Graph` of a function that returns a tuple; arguments as of `compile_graph`."""
    _load()
    from sympy import Eq  # noqa: PLC0415 - heavy, as in `_load`
    from torch._guards import TracingContext, tracing  # noqa: PLC0415 - likewise
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415 - likewise
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415 - likewise
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415 - likewise

    # without a shape environment inductor does not use its cache on disk
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, static_shapes=not dynamic, allow_non_fake_inputs=True)
    inputs: list[Any] = [_symbolic(x, mode) for x in args] if dynamic else [*args]
    symbols = {  # before tracing, which merges symbols that turn out to be equal
        size.node.expr: (index, dim)
        for index, x in enumerate(inputs)
        for dim, size in enumerate(x.shape)
        if isinstance(size, torch.SymInt)
    }
    with tracing(TracingContext(mode)):
        traced = make_fx(function, tracing_mode="symbolic" if dynamic else "real")(*inputs)
        compiled = _compile_trace(traced, inputs, OPTIONS if dynamic else None)
    equal = [Eq(symbol, value) for symbol, value in shapes.replacements.items()]
    return compiled, symbols, tuple(dict.fromkeys([*(guard.expr for guard in shapes.guards), *equal]))


def _compile_trace(traced: Any, inputs: list[Any], options: dict[str, Any] | None) -> Callable[..., Any]:
    """Compile a trace; libraries that a killed process has left half written in inductor's cache are made again."""
    while True:
        try:
            compiled: Callable[..., Any] = torch._inductor.compile(traced, inputs, options=options)
            return compiled
        except Exception as error:  # inductor wraps what the loader raises
            broken = TRUNCATED.search(str(error))
            if broken is None or not Path(broken[1]).is_file():
                raise
            Path(broken[1]).unlink()


def _symbolic(x: Tensor, mode: Any) -> Tensor:
    """A fake tensor with symbolic sizes."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext  # noqa: PLC0415 - heavy

    kinds = [DimDynamic.STATIC if size < 2 else DimDynamic.DYNAMIC for size in x.shape]  # noqa: PLR2004
    fake: Tensor = mode.from_tensor(
        x.data, symbolic_context=StatelessSymbolicContext(kinds, constraint_sizes=[None] * x.dim())
    )
    return fake


@cache
def _load() -> None:
    """Import the compiler at its first use, since that takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        import torch._inductor.compile_fx  # noqa: F401, PLC0415 - heavy, and what torch._inductor.compile needs
