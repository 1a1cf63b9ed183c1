"""Whole steps of small networks, traced and compiled.

A step of a small network costs the hundreds of PyTorch calls in it, whatever they compute. So `UpdateRule.step_` is
traced once, on copies; the trace is one function of parameters, gradients, state, theta and hyperparameters that
changes parameters and state in place, and the compiler fuses it to a few loops. Of a larger network only the passes
over the weights are compiled (`nfn_optim.engine.executor`), for all shapes alike; here every network has a graph for
steps with a refresh and one for steps without.

In the background (`nfn_optim.engine.background`) both are compiled from a description. Of a whole step it is the
function and the shapes of its tensors; passes are found by taking the step on tensors without numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from nfn_optim.engine.background import Job, submit
from nfn_optim.engine.executor import Execution
from nfn_optim.engine.inductor import Call, compile_graph, has_failed, run_compiled, run_graph
from nfn_optim.engine.moments import MOMENTS, State
from nfn_optim.engine.passes import Terms
from nfn_optim.rule import UpdateRule
from nfn_optim.rule.hyperparameters import is_zero
from nfn_optim.rule.update_rule import step_with_theta_
from nfn_optim.symmetry import Symmetry

MAX_WEIGHTS = 2**21  # of a small network: features are held for all of it
MAX_TENSORS = 32  # of a small network: compile time grows with the graph
MAX_GRAPHS = 8  # of one optimizer: compiling more kinds of steps does not pay
MAX_KINDS = 64  # of steps whose passes are looked for: those of others are hardly new
HYPERPARAMETERS = ("lr", "weight_decay", "total_steps")  # may change from step to step


def is_small(params: Mapping[str, Tensor]) -> bool:
    """Whether steps of a network are compiled as a whole, where they are compiled."""
    return len(params) <= MAX_TENSORS and sum(p.numel() for p in params.values()) <= MAX_WEIGHTS


@dataclass(frozen=True)
class Given:
    """What a step is computed from.

    Attributes:
        rule: The rule.
        theta: Its tensors by name.
        tensors: Parameters, gradients and state, as of `UpdateRule.step_`.
        symmetry: Their axes.
        hypers: All arguments of `UpdateRule.step_` by keyword.
    """

    rule: UpdateRule
    theta: Mapping[str, Tensor]
    tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor], State]
    symmetry: Symmetry
    hypers: Mapping[str, Any]


class CompiledSteps:
    """The compiled steps of an optimizer, compiled when they are needed."""

    def __init__(self) -> None:
        self._runs: dict[Hashable, Callable[..., Any] | Job | None] = {}
        self._passes: dict[Hashable, Job | None] = {}  # None where they are ready

    def step_(self, given: Given) -> bool:
        """Take a step in place, if it can be compiled.

        It cannot where a learning rate is the number 0 (such parameters keep every bit), where a tensor is not
        contiguous, where there are too many kinds of steps (other parameters with gradients at each), while it is
        compiled in the background, or where compilation fails, which warns once.

        Returns:
            Whether the step was taken; if not, nothing has changed.
        """
        hypers, (params, grads, state) = given.hypers, given.tensors
        if has_failed() or any(is_zero(hypers["lr"], n) for n in params):
            return False
        execution: Execution = hypers["execution"]
        numbers = _as_tensors(hypers, next(iter(state.values()))["step"]) | {"grads_finite": execution.grads_finite}
        inputs = (*given.tensors, given.theta, numbers)
        flat = [x for part in (params, grads, *state.values(), given.theta) for x in part.values()]
        flat = [x.detach() for x in (*flat, *_leaves(numbers))]  # the leaves of `inputs`, in a fast way
        names = tuple(params), tuple(key for key, value in hypers.items() if isinstance(value, Mapping))
        kinds = tuple((x.stride(), x.dtype) for x in flat)
        absent = tuple(key for key, value in numbers.items() if value is None)
        of_network = given.rule, given.symmetry, names, kinds, flat[0].device
        key = (*of_network, absent, hypers["refresh"], execution.terms, torch.get_num_threads())
        if key not in self._runs and len(self._runs) < MAX_GRAPHS:
            trees = _like(inputs, repeat(True))
            whole = _WholeStep(given.rule, given.symmetry, trees, hypers["refresh"], execution.terms)
            self._runs[key] = _compile(whole, flat, background=execution.background)
        run = self._runs.get(key)
        if isinstance(run, Job):
            if run.is_lost:
                del self._runs[key]
            if not run.is_ready:
                return False
            ((call, graph),) = run.graphs
            run = self._runs[key] = partial(run_graph, graph, call)
        if run is None:
            return False
        run(*flat)
        torch.autograd.graph.increment_version(list(params.values()))  # compiled steps do not
        return True

    def execution(self, given: Given) -> Execution:
        """How a step is run whose passes are compiled in the background: uncompiled until all of them are ready."""
        hypers, (params, grads, state) = given.hypers, given.tensors
        execution: Execution = hypers["execution"]
        compiled, uncompiled = replace(execution, run=run_compiled), replace(execution, compiled=False)
        kinds = [  # of all tensors: the rest of the state follows, and looking at it takes long where tensors are many
            (p.shape, p.stride(), p.dtype, g.stride(), g.dtype, s[MOMENTS[0]].dtype)
            for p, g, s in zip(params.values(), grads.values(), state.values(), strict=True)
        ]
        zeros = tuple(is_zero(hypers["lr"], n) for n in params)
        of_network = given.rule, given.symmetry, tuple(params), tuple(kinds)
        key = (*of_network, zeros, hypers["refresh"], execution.terms, torch.get_num_threads())
        if key not in self._passes or ((job := self._passes[key]) and job.is_lost):
            if len(self._passes) >= MAX_KINDS:
                return compiled
            calls = _calls(given)
            known = all(call.find_graph() for call in calls)
            self._passes[key] = None if known else submit(calls)
        if (job := self._passes[key]) is not None:
            if not job.is_ready:
                return uncompiled
            for call, graph in job.graphs:
                call.keep(graph)
            self._passes[key] = None
        return compiled


@dataclass(frozen=True, eq=False)
class _WholeStep:
    """A step of one kind as a function of tensors, which it changes.

    Attributes:
        rule: The rule.
        symmetry: Axes of the tensors.
        inputs: Parameters, gradients, state, theta and hyperparameters, as trees of anything.
        refresh: Whether coefficients are computed.
        terms: Of which updates may be made.
    """

    rule: UpdateRule
    symmetry: Symmetry
    inputs: Any
    refresh: bool
    terms: Terms

    def __call__(self, *tensors: Tensor) -> tuple[()]:
        """Take the step, given the leaves of `inputs`."""
        params, grads, state, theta, numbers = _like(self.inputs, iter(tensors))
        numbers |= {"refresh": self.refresh}
        execution = Execution(tile=MAX_WEIGHTS, grads_finite=numbers.pop("grads_finite"), terms=self.terms)
        step_with_theta_(self.rule, theta, params, grads, state, self.symmetry, **numbers, execution=execution)
        return ()


def _compile(whole: _WholeStep, flat: list[Tensor], *, background: bool) -> Callable[..., Any] | Job | None:
    """The compiled function, or the job that compiles it; None where it cannot be compiled.

    Args:
        whole: The function.
        flat: Its arguments.
        background: Whether it is compiled in the background.
    """
    copies = [x.clone() for x in flat]
    if any(x.stride() != copy.stride() for x, copy in zip(flat, copies, strict=True)):
        return None
    if background:
        return submit([Call(whole, [_described(x) for x in flat], dynamic=False)])
    whole(*(x.clone() for x in flat))  # fills caches, which must not be traced
    graph = compile_graph(whole, copies)
    return None if graph is None else partial(run_graph, graph, whole)


def _calls(given: Given) -> list[Call]:
    """The calls of functions to be compiled in a step, with descriptions of tensors."""
    calls: list[Call] = []

    def run(function: Callable[..., Any], *args: Any, dynamic: bool = True) -> Any:
        call = Call(function, args, dynamic=dynamic)
        calls.extend([call] if call.is_contiguous() else [])
        return function(*args)

    inputs = given.tensors, given.theta
    described, described_theta = _like(inputs, (_described(x) for x in _leaves(inputs)))
    hypers = {**given.hypers, "execution": replace(given.hypers["execution"], run=run)}
    step_with_theta_(given.rule, described_theta, *described, given.symmetry, **hypers)
    return calls


def _described(x: Tensor) -> Tensor:
    """A tensor of the same kind without numbers."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _as_tensors(hypers: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
    """Learning rate, weight decay and horizon as tensors, so that they may change from step to step."""
    tensors: dict[str, Any] = {}
    for key in HYPERPARAMETERS:
        value = hypers[key]
        if isinstance(value, Mapping):
            tensors[key] = {name: _as_tensor(x, like) for name, x in value.items()}
        else:
            tensors[key] = None if value is None else _as_tensor(value, like)
    return tensors


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    return value.reshape(()) if isinstance(value, Tensor) else like.new_full((), float(value))


def _leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors in tuples and mappings, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif tree is not None:
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _leaves(part)


def _like(tree: Any, leaves: Iterator[Any]) -> Any:
    """The same tuples and dicts with other leaves."""
    if isinstance(tree, Mapping):
        return {key: _like(part, leaves) for key, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_like(part, leaves) for part in tree)
    return tree if tree is None else next(leaves)
