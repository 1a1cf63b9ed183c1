"""Parameter groups, and the numbers in them, as `torch.optim.Optimizer` keeps them.

    params          tensors, changed by a step               weight_decay   per unit of learning rate
    param_names     their names, if they have any            maximize       whether to ascend
    lr              in Adam's units, per step                total_steps    the horizon in steps, or None
    betas           expected by some schedulers              skipped_steps  steps not taken
                                                             steps_taken    steps taken

A number may also be a tensor with one element. Other arguments of torch's optimizers are accepted with the values that
need nothing done, in the constructor and in groups (`TORCH_ARGUMENTS`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

BETAS = (0.9, 0.999)
"""Decay of Adam's moments; part of the rule, so that groups cannot have others."""
COUNTERS = ("skipped_steps", "steps_taken")
"""Counts of the whole optimizer, the same in every group."""


TORCH_ARGUMENTS: dict[str, tuple[tuple[object, ...], str]] = {
    "betas": (
        (BETAS,),
        "the decay of the moments is part of the rule: leave betas out of the constructor and the groups",
    ),
    "eps": ((1e-8,), "it is part of the rule: leave eps out"),
    "amsgrad": ((False,), "the rule has no maximum of second moments: leave amsgrad out, or use torch.optim.AdamW"),
    "foreach": ((None, False), "a step always goes over all tensors together: leave foreach out"),
    "fused": ((None, False), "leave fused out; compile=True fuses steps"),
    "capturable": (
        (False,),
        "a step cannot be captured in a CUDA graph: leave capturable out, capture forward and backward, and take the "
        "step outside",
    ),
    "differentiable": ((False,), "leave it out; nfn_optim.optimizer.differentiable differentiates through training"),
    "decoupled_weight_decay": (
        (True,),
        "weight decay is always decoupled, as AdamW's: leave it out, and add an L2 penalty to the loss if you want one",
    ),
}
"""Arguments of torch's optimizers that mean nothing here: values accepted, the default first, and what else to do."""


class TorchArguments(TypedDict, total=False):
    """The arguments in `TORCH_ARGUMENTS`."""

    betas: tuple[float, float]
    eps: float
    amsgrad: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool
    decoupled_weight_decay: bool


class ParamSlot(NamedTuple):
    """One parameter at one step."""

    name: str
    param: Tensor
    group: dict[str, Any]


def check_numbers(group: Mapping[str, Any]) -> None:
    """Raise unless the numbers of a group are valid.

    Args:
        group: A group, or some entries of one.

    Raises:
        TypeError: A number is of another type.
        ValueError: A number is out of range.
    """
    for key in ("lr", "weight_decay"):
        value = group.get(key, 0.0)
        if not isinstance(value, Real | Tensor):
            hint = "; betas are no argument here, weight_decay comes after lr" if isinstance(value, tuple) else ""
            kind = type(value).__name__
            raise TypeError(f"expected {key} as a number or a tensor, found {value!r} of type {kind}{hint}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {key} must be 1-element, a number or a tensor of one; found {tuple(value.shape)}")
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"expected {key} >= 0 and finite, found {value}; to ascend use maximize=True")
    total = group.get("total_steps")
    whole = isinstance(total, Real) and not isinstance(total, bool) and float(total).is_integer()
    if total is not None and not (whole and total >= 1):
        raise ValueError(f"expected total_steps as a positive whole number of steps or None, found {total!r}")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise unless the numbers of a new group are valid, and torch's other arguments in it need nothing done.

    Raises:
        TypeError: A number is of another type.
        ValueError: A number is out of range, or one of `TORCH_ARGUMENTS` has another value; says what to do instead.
    """
    check_numbers(group)
    for key, (accepted, advice) in TORCH_ARGUMENTS.items():
        if key in group and not any(_equal(group[key], value) for value in accepted):
            if key == "decoupled_weight_decay" and group[key] is False and float(group["weight_decay"]) == 0:
                continue  # Adam's default
            raise ValueError(f"expected {key} as {accepted[0]}, found {group[key]!r}; {advice}")


def check_names(given: Mapping[str, Any]) -> None:
    """Raise if there is an argument that means nothing to any optimizer here.

    Raises:
        TypeError: There is.
    """
    if unknown := [key for key in given if key not in TORCH_ARGUMENTS]:
        raise TypeError(
            f"NFNOptimizer got an unexpected keyword argument {unknown[0]!r}; expected lr, weight_decay, rule, model, "
            f"symmetry, total_steps, maximize, state_dtype, compile, or at their defaults {', '.join(TORCH_ARGUMENTS)}"
        )


def _equal(value: object, expected: object) -> bool:
    """Whether a value is the expected one; numbers may be in other types, tuples in lists."""
    if isinstance(expected, tuple):
        parts = value if isinstance(value, list | tuple) else ()
        return len(parts) == len(expected) and all(map(_equal, parts, expected))
    if isinstance(expected, float):
        is_number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        return is_number and math.isclose(float(value), expected, rel_tol=1e-6)  # type: ignore[arg-type] # as float32
    return value is expected


def moves(group: Mapping[str, Any]) -> bool:
    """Whether a step can change the parameters of a group; at a learning rate of 0 it must not change any bit."""
    lr = group["lr"]
    return bool(lr != 0) if not isinstance(lr, Tensor) or lr.is_cpu else True  # reading it elsewhere synchronises


def by_name(slots: list[ParamSlot], key: str) -> Any:
    """A number: one value if the groups agree, else by name of the parameter. A learning rate of 0 is the number 0."""
    values = {id(slot.group): 0.0 if key == "lr" and not moves(slot.group) else slot.group[key] for slot in slots}
    first, *others = values.values()
    return {slot.name: values[id(slot.group)] for slot in slots} if any(not _same(first, v) for v in others) else first


def _same(a: object, b: object) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
