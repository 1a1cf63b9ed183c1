"""Whole steps of small networks, traced and compiled.

A step of a small network costs the hundreds of PyTorch calls in it, whatever they compute. So `UpdateRule.step_` is
traced once, on copies; the trace is one function of parameters, gradients, state, theta and hyperparameters that
changes parameters and state in place, and the compiler fuses it to a few loops. Of a larger network only the passes
over the weights are compiled (`nfn_optim.engine.executor`), for all shapes alike; here every network has a graph for
steps with a refresh and one for steps without.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nfn_optim.engine.executor import Execution
from nfn_optim.engine.inductor import compile_graph, has_failed
from nfn_optim.engine.moments import State
from nfn_optim.rule import UpdateRule
from nfn_optim.rule.hyperparameters import is_zero
from nfn_optim.rule.update_rule import step_with_theta_
from nfn_optim.symmetry import Symmetry

MAX_WEIGHTS = 2**21  # of a small network: features are held for all of it
MAX_TENSORS = 32  # of a small network: compile time grows with the graph
MAX_GRAPHS = 8  # of one optimizer: compiling more kinds of steps does not pay
HYPERPARAMETERS = ("lr", "weight_decay", "total_steps")  # may change from step to step


def is_small(params: Mapping[str, Tensor]) -> bool:
    """Whether steps of a network are compiled as a whole, where they are compiled."""
    return len(params) <= MAX_TENSORS and sum(p.numel() for p in params.values()) <= MAX_WEIGHTS


class CompiledSteps:
    """The compiled steps of an optimizer, compiled when they are needed."""

    def __init__(self) -> None:
        self._runs: dict[Hashable, Callable[..., Any] | None] = {}

    def step_(
        self,
        rule: UpdateRule,
        theta: Mapping[str, Tensor],
        tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor], State],
        symmetry: Symmetry,
        hypers: Mapping[str, Any],
    ) -> bool:
        """Take a step in place, if it can be compiled.

        It cannot where a learning rate is the number 0 (such parameters keep every bit), where a tensor is not
        contiguous, where there are too many kinds of steps (other parameters with gradients at each), or where
        compilation fails, which warns once.

        Args:
            rule: The rule.
            theta: Its tensors by name.
            tensors: Parameters, gradients and state, as of `UpdateRule.step_`.
            symmetry: Their axes.
            hypers: `lr`, `weight_decay`, `total_steps` and `refresh` likewise, and `grads_finite` as of `Execution`.

        Returns:
            Whether the step was taken; if not, nothing has changed.
        """
        params, grads, state = tensors
        if has_failed() or any(is_zero(hypers["lr"], n) for n in params):
            return False
        numbers = _as_tensors(hypers, next(iter(state.values()))["step"]) | {"grads_finite": hypers["grads_finite"]}
        inputs = (*tensors, theta, numbers)
        flat = [x for part in (params, grads, *state.values(), theta) for x in part.values()]
        flat = [x.detach() for x in (*flat, *_leaves(numbers))]  # the leaves of `inputs`, in a fast way
        names = tuple(params), tuple(key for key, value in hypers.items() if isinstance(value, Mapping))
        kinds = tuple((x.stride(), x.dtype) for x in flat)
        absent = tuple(key for key, value in numbers.items() if value is None)
        key = (rule, symmetry, names, kinds, flat[0].device, absent, hypers["refresh"], torch.get_num_threads())
        if key not in self._runs and len(self._runs) < MAX_GRAPHS:
            self._runs[key] = _compile(rule, symmetry, inputs, flat, refresh=hypers["refresh"])
        run = self._runs.get(key)
        if run is None:
            return False
        run(*flat)
        torch.autograd.graph.increment_version(list(params.values()))  # compiled steps do not
        return True


def _compile(
    rule: UpdateRule, symmetry: Symmetry, inputs: Any, flat: list[Tensor], *, refresh: bool
) -> Callable[..., Any] | None:
    """A step of one kind as a function that changes its arguments in place; None where it cannot be compiled.

    Args:
        rule: The rule.
        symmetry: Axes of the tensors.
        inputs: Parameters, gradients, state, theta and hyperparameters, as trees.
        flat: The tensors in them.
        refresh: Whether coefficients are computed.
    """
    copies = [x.clone() for x in flat]
    if any(x.stride() != copy.stride() for x, copy in zip(flat, copies, strict=True)):
        return None

    def step(*tensors: Tensor) -> tuple[()]:
        params, grads, state, theta, numbers = _like(inputs, iter(tensors))
        execution = Execution(tile=MAX_WEIGHTS, grads_finite=numbers.pop("grads_finite"))
        step_with_theta_(rule, theta, params, grads, state, symmetry, **numbers, refresh=refresh, execution=execution)
        return ()

    step(*(x.clone() for x in flat))  # fills caches, which must not be traced
    graph = compile_graph(step, copies)
    return None if graph is None else graph.run


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


def _like(tree: Any, leaves: Iterator[Tensor]) -> Any:
    """The same tuples and dicts with other tensors."""
    if isinstance(tree, Mapping):
        return {key: _like(part, leaves) for key, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_like(part, leaves) for part in tree)
    return tree if tree is None else next(leaves)
