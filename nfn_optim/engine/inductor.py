"""Compiling functions of tensors with inductor, and falling back to eager execution where that fails.

A function is traced once with symbolic sizes and the trace is compiled. The graph serves all tensors of the same kinds
(number of dimensions, which sizes are 1, dtype, device) whose sizes meet the guards collected in tracing; guards are
evaluated once for each set of sizes, so that a call costs one dictionary lookup. The overhead of a call is a fifth of
`torch.compile`'s, which counts where a pass goes over a large tensor in many tiles.

`run` compiles at the first call, which stops training; `nfn_optim.engine.background` lets another process compile.

Compilers have faults. So a graph first runs on copies, beside the function itself, and is used once both agree.

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

from nfn_optim.engine.inductor_faults import mended

if TYPE_CHECKING:
    import sympy
    from torch.fx import GraphModule

Compiler = Callable[["GraphModule", list[Any], dict[str, Any]], Callable[..., Any]]
"""From a trace, its inputs and options of inductor to a function that takes the same inputs."""

Run = Callable[..., Any]
"""A function like `run`."""

STATIC_OPTIONS: dict[str, Any] = {"size_asserts": False}
"""Of graphs for fixed sizes: omit assertions on them, which keys of graphs check."""

OPTIONS: dict[str, Any] = {
    "realize_reads_threshold": 10**5,
    "realize_opcount_threshold": 10**5,
    "realize_acc_reads_threshold": 10**5,
    "max_fusion_size": 10**5,
    "size_asserts": False,
}
"""Prefer recomputing to storing, and omit assertions on sizes, which `run` has checked."""

TRIES = 3  # of a graph to agree with its function: where values nearly tie, rounding decides
RELATIVE_ERROR = 1e-2  # of a graph, relative to the change of a tensor
RESULT_ERROR = 1e-3  # relative to a tensor that is returned: long sums are added up in another order
ROUNDING_POWER = 2 / 3  # of the unit roundoff: error relative to the tensor itself
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


def fail(error: Exception, remedy: str = "install a C++ compiler") -> None:
    """Stop compiling in this process, with a warning."""
    _failures.append(repr(error))
    warnings.warn(
        f"the update rule could not be compiled and continues uncompiled, which is slower: {error!r:.500}; "
        f"{remedy}, or pass compile=False to silence this",
        stacklevel=4,
    )


@dataclass(eq=False)
class Graph:
    """A compiled function.

    Attributes:
        run: From tensors to the flat list of tensors returned.
        unflatten: From that list to the function's return value.
        sizes: Symbol of a dynamic size -> index of the argument, and of its dimension.
        guards: Conditions on the symbols.
        has_agreed: Whether it has done what the function did, see `run_graph`.
        tries: How often it may still do something else.
    """

    run: Callable[..., Any]
    unflatten: Callable[[list[Tensor]], Any]
    sizes: Mapping[sympy.Symbol, tuple[int, int]]
    guards: Sequence[sympy.Basic]
    has_agreed: bool = False
    tries: int = TRIES

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the guards hold for tensors of these sizes."""
        sizes = {symbol: tensors[index].shape[dim] for symbol, (index, dim) in self.sizes.items()}
        return all(guard.subs(sizes) == True for guard in self.guards)  # noqa: E712 - sympy's, or undecided


class Call:
    """A call of a function of tensors, and everything that a graph for it is specialised to.

    Args:
        function: As of `run`.
        args: Likewise; tensors on the meta device describe tensors on the CPU.
        dynamic: Likewise.
    """

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], *, dynamic: bool) -> None:
        self.function, self.dynamic, self.threads = function, dynamic, torch.get_num_threads()
        self.tensors, self.form = _flatten(args)

    def __call__(self, *tensors: Tensor) -> Any:
        """Call the function with other tensors."""
        return self.function(*_unflatten(self.form, iter(tensors)))

    @property
    def key(self) -> Hashable:
        """Of a call with tensors of the same sizes."""
        kinds = tuple([(x.shape, x.dtype, _device(x), x.is_contiguous()) for x in self.tensors])
        return self.function, self.form, kinds, self.threads

    @property
    def kind(self) -> Hashable:
        """Of a call that the same graph serves, if its guards hold."""
        limit = 2 if self.dynamic else sys.maxsize  # smaller sizes are specialised
        kinds = tuple((tuple(min(n, limit) for n in x.shape), x.dtype, _device(x)) for x in self.tensors)
        return self.function, self.form, kinds, self.threads

    def is_contiguous(self) -> bool:
        """Whether all tensors are, as those of a graph must be."""
        return all(x.is_contiguous() for x in self.tensors)

    def find_graph(self) -> Graph | None:
        """An existing graph that serves it."""
        return next((graph for graph in _graphs.get(self.kind, ()) if graph.holds(self.tensors)), None)

    def keep(self, graph: Graph) -> None:
        """Let a graph serve such calls from now on."""
        _graph_of_sizes[self.key] = graph
        graphs = _graphs.setdefault(self.kind, [])
        graphs += [] if graph in graphs else [graph]


def _device(x: Tensor) -> torch.device:
    return torch.device("cpu") if x.is_meta else x.device


_graphs: dict[Hashable, list[Graph]] = {}  # by kind of call
_graph_of_sizes: dict[Hashable, Graph] = {}  # by key of a call


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
    return _run(function, args, dynamic, compile_call)


def run_compiled(function: Callable[..., Any], *args: Any, dynamic: bool = True) -> Any:
    """`run`, but uncompiled where there is no graph."""
    return _run(function, args, dynamic, lambda _: None)


def _run(
    function: Callable[..., Any], args: Sequence[Any], dynamic: bool, compiler: Callable[[Call], Graph | None]
) -> Any:
    """`run` with something that makes graphs where there are none."""
    if _failures:
        return function(*args)
    call = Call(function, args, dynamic=dynamic)
    graph = _graph_of_sizes.get(call.key)
    if graph is None and call.is_contiguous() and (graph := call.find_graph() or compiler(call)):
        call.keep(graph)
    return function(*args) if graph is None else run_graph(graph, call, *call.tensors)


def run_graph(graph: Graph, function: Callable[..., Any], *tensors: Tensor) -> Any:
    """Run a graph or, until both agree, its function; where they never do, stop compiling, with a warning.

    Args:
        graph: Of the function.
        function: May change tensors in place.
        *tensors: Its arguments.
    """
    if graph.has_agreed:
        return graph.unflatten(graph.run(*tensors))
    before, copies = [x.clone() for x in tensors], [x.clone() for x in tensors]
    actual = graph.unflatten(graph.run(*copies))
    result = function(*tensors)
    results = zip(pytree.tree_leaves(actual), pytree.tree_leaves(result), strict=True)
    triples = [*zip(copies, tensors, before, strict=True), *((x, y, None) for x, y in results if y is not None)]
    graph.has_agreed = all(_agree(*triple) for triple in triples)
    graph.tries -= not graph.has_agreed
    if not graph.tries:
        fail(RuntimeError("what was compiled does something else, a fault of the compiler"), "update PyTorch")
    return result


def _agree(actual: Tensor, expected: Tensor, before: Tensor | None) -> bool:
    """Whether two results are equal but for rounding, and the change of a tensor but for `RELATIVE_ERROR`.

    Args:
        actual: By a graph.
        expected: By its function.
        before: The tensor, if it was changed; None for one that was returned.
    """
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (actual - expected).double()).norm()
    size = torch.nan_to_num(expected.double(), posinf=0.0, neginf=0.0).norm()
    if before is None:
        return bool(error <= RESULT_ERROR * size)
    change = torch.nan_to_num((expected - before).double(), posinf=0.0, neginf=0.0).norm()
    rounding = torch.finfo(expected.dtype).eps ** ROUNDING_POWER
    return bool(error <= RELATIVE_ERROR * change + rounding * size)


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


def compile_call(call: Call) -> Graph | None:
    """Compile a call now; None if that fails."""
    return compile_graph(call, call.tensors, dynamic=call.dynamic)


def compile_graph(function: Callable[..., Any], args: list[Tensor], *, dynamic: bool = False) -> Graph | None:
    """Trace a function of tensors, with everything that it calls, and compile the trace; None if that fails.

    Args:
        function: Must not depend on values of tensors for its control flow.
        args: Example tensors; they may be changed, unless the graph is dynamic.
        dynamic: Whether sizes of 2 and more may differ later; tensors are then contiguous.
    """
    announce()
    try:
        return build_graph(function, args, _inductor, dynamic=dynamic)
    except Exception as error:  # eager execution is always possible
        fail(error)
        return None


def build_graph(function: Callable[..., Any], args: Sequence[Tensor], compiler: Compiler, *, dynamic: bool) -> Graph:
    """`compile_graph` with a compiler of traces; raises what goes wrong."""
    unflatten: list[Callable[[list[Tensor]], Any]] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = function(*tensors)
        values, structure = pytree.tree_flatten(result)
        if isinstance(result, tuple) and all(isinstance(x, Tensor) for x in result):  # arranging a tree is slow
            unflatten.append(tuple)
        else:
            form = pytree.tree_unflatten(range(len(values)), structure)  # unlike a structure, unpickled in silence
            unflatten.append(itemgetter(0) if len(values) == 1 else partial(_arrange, form))
        return tuple(values)

    load()
    with _compile_lock, mended(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between parts of torch
        compiled, symbols, guards = _compile(flat, args, compiler, dynamic=dynamic)
    return Graph(compiled, unflatten[-1], symbols, guards)


def _arrange(form: Any, values: Sequence[Tensor]) -> Any:
    """A tree of tuples and lists from one of indices."""
    return values[form] if isinstance(form, int) else type(form)(_arrange(part, values) for part in form)


def _compile(
    function: Callable[..., tuple[Tensor, ...]], args: Sequence[Tensor], compiler: Compiler, *, dynamic: bool
) -> tuple[Callable[..., Any], dict[sympy.Symbol, tuple[int, int]], tuple[sympy.Basic, ...]]:
    """The parts of a `Graph` of a function that returns a tuple; arguments as of `build_graph`."""
    from sympy import Eq  # noqa: PLC0415 - heavy, as in `load`
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
        vars(traced).pop("shape_env", None)  # which keeps a graph out of the cache on disk
        compiled = _compile_trace(traced, inputs, OPTIONS if dynamic else STATIC_OPTIONS, compiler)
    equal = [Eq(symbol, value) for symbol, value in shapes.replacements.items()]
    return compiled, symbols, tuple(dict.fromkeys([*(guard.expr for guard in shapes.guards), *equal]))


def _compile_trace(
    traced: GraphModule, inputs: list[Any], options: dict[str, Any], compiler: Compiler
) -> Callable[..., Any]:
    """Compile a trace; libraries that a killed process has left half written in inductor's cache are made again."""
    while True:
        try:
            return compiler(traced, inputs, options)
        except Exception as error:  # inductor wraps what the loader raises
            broken = TRUNCATED.search(str(error))
            if broken is None or not Path(broken[1]).is_file():
                raise
            Path(broken[1]).unlink()


def _inductor(traced: GraphModule, inputs: list[Any], options: dict[str, Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch._inductor.compile(traced, inputs, options=options)
    return compiled


def _symbolic(x: Tensor, mode: Any) -> Tensor:
    """A fake tensor with symbolic sizes."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext  # noqa: PLC0415 - heavy

    kinds = [DimDynamic.STATIC if size < 2 else DimDynamic.DYNAMIC for size in x.shape]  # noqa: PLR2004
    fake: Tensor = mode.from_tensor(
        x.data, symbolic_context=StatelessSymbolicContext(kinds, constraint_sizes=[None] * x.dim())
    )
    return fake


@cache
def load() -> None:
    """Import the compiler at its first use, since that takes seconds."""
    load_deprecated()
    import torch._inductor.compile_fx  # noqa: F401, PLC0415 - heavy, and what torch._inductor.compile needs


@cache
def load_deprecated() -> None:
    """Import the part of the compiler that warns, which is quick; not in a thread, since filters are global."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        import torch.utils.mkldnn  # noqa: F401, PLC0415 - heavy, as in `load`
