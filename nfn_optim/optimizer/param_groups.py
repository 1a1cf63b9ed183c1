"""Parameter groups, and the numbers in them, as `torch.optim.Optimizer` keeps them.

    params          tensors, changed by a step               weight_decay   per unit of learning rate
    param_names     their names, if they have any            maximize       whether to ascend
    lr              in Adam's units, per step                total_steps    the horizon in steps, or None
    betas           expected by some schedulers              skipped_steps  steps not taken
                                                             steps_taken    steps taken

A number may also be a tensor with one element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

BETAS = (0.9, 0.999)
"""Decay of Adam's moments; part of the rule, so that groups cannot have others."""
COUNTERS = ("skipped_steps", "steps_taken")
"""Counts of the whole optimizer, the same in every group."""


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
            raise TypeError(f"expected {key} as a number or a tensor, found {value!r} of type {type(value).__name__}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {key} must be 1-element, a number or a tensor of one; found {tuple(value.shape)}")
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"expected {key} >= 0 and finite, found {value}; to ascend use maximize=True")
    total = group.get("total_steps")
    whole = isinstance(total, Real) and not isinstance(total, bool) and float(total).is_integer()
    if total is not None and not (whole and total >= 1):
        raise ValueError(f"expected total_steps as a positive whole number of steps or None, found {total!r}")


def check_betas(group: Mapping[str, Any]) -> None:
    """Raise if a group has other betas than the rule.

    Raises:
        ValueError: It has.
    """
    if tuple(group["betas"]) != BETAS:
        raise ValueError(
            f"expected betas {BETAS}, found {group['betas']}; the decay of the moments is part of the rule: "
            f"leave betas out of the groups"
        )


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
