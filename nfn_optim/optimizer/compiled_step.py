"""Whole steps of small networks, each recorded once and compiled.

A step of a small network costs what hundreds of calls of PyTorch do, whatever they compute. So the rule is called once
in place, on copies, while every operation is recorded; what was recorded is one function of parameters, gradients,
state, theta and numbers that changes the first and the third, and the compiler makes a few loops of it. Of a larger
network only the passes over the weights are compiled (`nfn_optim.engine.executor`), for all shapes alike; here
every network has
a graph for the steps at which its neurons talk and one for those in between.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from nfn_optim.engine.executor import Kernel
from nfn_optim.engine.inductor import graph_of, has_failed
from nfn_optim.engine.moments import State
from nfn_optim.rule import UpdateRule
from nfn_optim.rule.schedule import is_zero
from nfn_optim.symmetry import Symmetry

MOST_WEIGHTS = 2**21  # of a network that is small: what lies between two passes is held for all of it
MOST_TENSORS = 32  # likewise: to compile takes as long as the graph is
MOST_GRAPHS = 8  # of one optimizer: if there are more kinds of steps, to compile them all does not pay
NUMBERS = ("lr", "weight_decay", "total_steps")  # that may change from step to step


def is_small(params: Mapping[str, Tensor]) -> bool:
    """Whether steps of a network are compiled whole, where they are compiled."""
    return len(params) <= MOST_TENSORS and sum(p.numel() for p in params.values()) <= MOST_WEIGHTS


class StepGraphs:
    """The graphs of an optimizer, made as they are needed."""

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

        It cannot where a learning rate is the number 0 (such parameters keep every bit), where somebody listens to the
        rule, where a tensor has holes in memory, where there are too many kinds of steps, each of other gradients, or
        where the compiler fails, once with a warning.

        Args:
            rule: Who steps.
            theta: Its tensors by name.
            tensors: Parameters, gradients and state as `UpdateRule.forward` wants them, without batch dimensions.
            symmetry: Their axes.
            hypers: `lr`, `weight_decay`, `total_steps` and `talk` likewise, and `usable` as a kernel wants it.

        Returns:
            Whether the step was taken; if not, nothing has changed.
        """
        params, grads, state = tensors
        if has_failed() or any(is_zero(hypers["lr"], n) for n in params) or (rule.learns and rule.gains._forward_hooks):
            return False
        numbers = _as_tensors(hypers, next(iter(state.values()))["step"]) | {"usable": hypers["usable"]}
        inputs = (*tensors, theta, numbers)
        flat = [x for part in (params, grads, *state.values(), theta) for x in part.values()]
        flat = [x.detach() for x in (*flat, *_leaves(numbers))]  # the leaves of `inputs`, at every step, so faster
        names = tuple(params), tuple(key for key, value in hypers.items() if isinstance(value, Mapping))
        kinds = tuple((x.stride(), x.dtype) for x in flat)
        absent = tuple(key for key, value in numbers.items() if value is None)
        key = (rule, symmetry, names, kinds, flat[0].device, absent, hypers["talk"], torch.get_num_threads())
        if key not in self._runs and len(self._runs) < MOST_GRAPHS:
            self._runs[key] = _compiled(rule, symmetry, inputs, flat, talk=hypers["talk"])
        run = self._runs.get(key)
        if run is None:
            return False
        run(*flat)
        torch.autograd.graph.increment_version(list(params.values()))  # a compiled step does not tell
        return True


def _compiled(
    rule: UpdateRule, symmetry: Symmetry, inputs: Any, flat: list[Tensor], *, talk: bool
) -> Callable[..., Any] | None:
    """A step of one kind as a function that changes its arguments in place; None where there can be none.

    Args:
        rule: Who steps.
        symmetry: Axes of the tensors.
        inputs: Parameters, gradients, state, theta and numbers, as trees.
        flat: The tensors in them.
        talk: Whether neurons talk.
    """
    copies = [x.clone() for x in flat]
    if any(x.stride() != copy.stride() for x, copy in zip(flat, copies, strict=True)):
        return None

    def step(*tensors: Tensor) -> tuple[()]:
        params, grads, state, theta, numbers = _like(inputs, iter(tensors))
        kernel = Kernel(band=MOST_WEIGHTS, usable=numbers.pop("usable"))
        functional_call(rule, theta, (params, grads, state, symmetry), {**numbers, "talk": talk, "kernel": kernel})
        return ()

    step(*(x.clone() for x in flat))  # makes whatever is made once, which is not to be recorded
    graph = graph_of(step, copies)
    return None if graph is None else graph.run


def _as_tensors(hypers: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
    """Learning rate, weight decay and horizon with tensors for numbers, so that they may change from step to step."""
    found: dict[str, Any] = {}
    for key in NUMBERS:
        value = hypers[key]
        if isinstance(value, Mapping):
            found[key] = {name: _as_tensor(x, like) for name, x in value.items()}
        else:
            found[key] = None if value is None else _as_tensor(value, like)
    return found


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
