"""Compilers: whether there is one, what it makes of a function, and what happens where it fails.

A function of tensors is recorded while it is called, on tensors that have symbols for their sizes, and what was
recorded is compiled. The graph serves all tensors of these kinds (number of dimensions, which of their sizes are 1,
precision, device) whose sizes meet the conditions that recording came upon; those are looked at once for each set of
sizes. So to call it is to look into a dict. That, and all else around the loops, takes a seventh of what it takes with
`torch.compile`, which counts where a pass goes over a large tensor in many bands.

Compilation that fails once is not tried again in the process; all goes on uncompiled, with one warning.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from operator import itemgetter
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
"""Keep the compiler from storing what is cheaper computed again, and graphs from asking what `run` has asked."""

_failures: list[str] = []  # in this process
_one_at_a_time = threading.Lock()  # whoever trains in threads


@cache
def can_compile() -> bool:
    """Whether there is a C++ compiler, as `torch.compile` looks for it."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def has_failed() -> bool:
    """Whether compilation is not to be tried any more."""
    return bool(_failures)


def fail(error: Exception) -> None:
    """Give compilation up, with a warning."""
    _failures.append(repr(error))
    warnings.warn(
        f"the update rule could not be compiled and goes on uncompiled, which is slower: {error!r:.500}; "
        f"install a C++ compiler, or say compile=False to silence this",
        stacklevel=4,
    )


@dataclass(frozen=True)
class Graph:
    """What the compiler made of a function.

    Attributes:
        run: From tensors to all tensors that it returns, in a list.
        returned: From that list to what the function returns.
        sizes: Symbol -> which argument, and which of its dimensions; of sizes that may be others.
        conditions: That must hold of the symbols.
    """

    run: Callable[..., Any]
    returned: Callable[[list[Tensor]], Any]
    sizes: Mapping[sympy.Symbol, tuple[int, int]]
    conditions: Sequence[sympy.Basic]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it may be run for tensors of such sizes."""
        sizes = {symbol: tensors[number].shape[dim] for symbol, (number, dim) in self.sizes.items()}
        return all(condition.subs(sizes) == True for condition in self.conditions)  # noqa: E712 - sympy's, or undecided


_graphs: dict[Hashable, list[Graph]] = {}  # by all that a graph is bound to
_found: dict[Hashable, Graph | None] = {}  # the one for tensors of certain sizes


def graphs() -> int:
    """How many functions were compiled, for some sizes or for all."""
    return sum(map(len, _graphs.values()))


def forget() -> None:
    """Compile everything anew that is asked for from now on."""
    _graphs.clear()
    _found.clear()


def run(function: Callable[..., Any], *args: Any, sizes: bool = True) -> Any:
    """Call a function, which may change tensors, compiled when it is first called.

    It is called as it is where tensors have holes in memory, and where the compiler fails.

    Args:
        function: Decides nothing upon the tensors' values.
        *args: For it: tensors, lists of tensors, and whatever else it is that makes a graph another one.
        sizes: Whether one graph is to serve for all sizes; 0 and 1 are others.

    Returns:
        What the function returns: tensors in tuples and lists.
    """
    if _failures:
        return function(*args)
    tensors, form = _taken_apart(args)
    kinds = tuple([(x.shape, x.dtype, x.device, x.is_contiguous()) for x in tensors])
    key = function, form, kinds, torch.get_num_threads()
    if key not in _found:
        dense = all(x.is_contiguous() for x in tensors)
        _found[key] = _graph_for(function, form, tensors, sizes=sizes) if dense else None
    graph = _found[key]
    if graph is None:
        return function(*args)
    return graph.returned(graph.run(*tensors))


def _graph_for(
    function: Callable[..., Any], form: tuple[Any, ...], tensors: Sequence[Tensor], *, sizes: bool
) -> Graph | None:
    """A graph that is there already or is made now, None if that fails; arguments as of `run`."""
    least = 2 if sizes else sys.maxsize  # what is smaller must be the same
    kinds = tuple((tuple(min(n, least) for n in x.shape), x.dtype, x.device) for x in tensors)
    there = _graphs.setdefault((function, form, kinds, torch.get_num_threads()), [])
    for graph in there:
        if graph.holds(tensors):
            return graph
    made = graph_of(lambda *xs: function(*_put_together(form, iter(xs))), list(tensors), sizes=sizes)
    there += [] if made is None else [made]
    return made


def _taken_apart(args: Sequence[Any]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The tensors in arguments, and all the rest: for a tensor `Tensor`, for a list of some their number in a list."""
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


def _put_together(form: Sequence[Any], tensors: Iterator[Tensor]) -> Iterator[Any]:
    """The inverse of `_taken_apart`."""
    for part in form:
        if part is Tensor:
            yield next(tensors)
        elif isinstance(part, tuple):
            yield list(islice(tensors, part[1]))
        else:
            yield part


def graph_of(function: Callable[..., Any], args: list[Tensor], *, sizes: bool = False) -> Graph | None:
    """A function of tensors recorded, with all that it calls, and compiled; None if that fails.

    Args:
        function: Decides nothing upon the tensors' values.
        args: Tensors for it; they may be changed, unless it is for all sizes.
        sizes: Whether sizes of 2 and more may be others when it is run; if so, tensors have no holes.
    """
    returned: list[Callable[[list[Tensor]], Any]] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = function(*tensors)
        values, structure = pytree.tree_flatten(found)
        if isinstance(found, tuple) and all(isinstance(x, Tensor) for x in found):  # putting a tree together takes long
            returned.append(tuple)
        else:
            returned.append(itemgetter(0) if len(values) == 1 else partial(pytree.tree_unflatten, treespec=structure))
        return tuple(values)

    try:
        with _one_at_a_time, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its parts for each other
            made, symbols, conditions = _compiled(flat, args, sizes=sizes)
    except Exception as error:  # whatever it is, there is a way without
        fail(error)
        return None
    return Graph(made, returned[-1], symbols, conditions)


def _compiled(
    function: Callable[..., tuple[Tensor, ...]], args: Sequence[Tensor], *, sizes: bool
) -> tuple[Callable[..., Any], dict[sympy.Symbol, tuple[int, int]], tuple[sympy.Basic, ...]]:
    """A graph but for `returned`, of a function that returns a tuple; arguments as of `graph_of`."""
    _load()
    from sympy import Eq  # noqa: PLC0415 - heavy, as in `_load`
    from torch._guards import TracingContext, tracing  # noqa: PLC0415 - likewise
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415 - likewise
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415 - likewise
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415 - likewise

    # without a shape environment what was compiled would not be looked up on disk
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, static_shapes=not sizes, allow_non_fake_inputs=True)
    given: list[Any] = [_sized(x, mode) for x in args] if sizes else [*args]
    symbols = {  # now: what turns out to be equal will be one symbol
        size.node.expr: (number, dim)
        for number, x in enumerate(given)
        for dim, size in enumerate(x.shape)
        if isinstance(size, torch.SymInt)
    }
    with tracing(TracingContext(mode)):
        recorded = make_fx(function, tracing_mode="symbolic" if sizes else "real")(*given)
        made: Callable[..., Any] = torch._inductor.compile(recorded, given, options=OPTIONS if sizes else None)
    equal = [Eq(symbol, value) for symbol, value in shapes.replacements.items()]
    return made, symbols, tuple(dict.fromkeys([*(guard.expr for guard in shapes.guards), *equal]))


def _sized(x: Tensor, mode: Any) -> Tensor:
    """A tensor without values, and with symbols for its sizes."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext  # noqa: PLC0415 - heavy

    kinds = [DimDynamic.STATIC if size < 2 else DimDynamic.DYNAMIC for size in x.shape]  # noqa: PLR2004
    fake: Tensor = mode.from_tensor(
        x.data, symbolic_context=StatelessSymbolicContext(kinds, constraint_sizes=[None] * x.dim())
    )
    return fake


@cache
def _load() -> None:
    """Import the compiler, which is heavy, and only for those who compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        import torch._inductor.compile_fx  # noqa: F401, PLC0415 - heavy, and what torch._inductor.compile needs
