"""A saved state, arranged for an optimizer that may have its parameters in other groups or in another order.

    names on both sides              by name
    none in common, or on one side   by group and order, as torch does it
    keys that are names themselves   by group and order: torch.distributed.checkpoint has arranged them already

A group takes over the numbers on which all those saved groups agree that its parameters were in, and keeps its own
where they do not. Where groups correspond, that is every number that was saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Group = Mapping[str, Any]
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that come and go with how a model is run."""


class Arranged(NamedTuple):
    """A saved state in the order of an optimizer.

    Attributes:
        states: For each parameter what was saved, None where nothing was.
        groups: For each group its numbers and names, without `params`.
        rest: What was saved for no parameter.
        remark: What the user should know about it, or "".
    """

    states: list[Mapping[str, Any] | None]
    groups: list[dict[str, Any]]
    rest: dict[str, Any]
    remark: str


class Origin(NamedTuple):
    """Where one group comes from.

    Attributes:
        groups: The saved groups that its parameters were in.
        keys: For each parameter the key of its state, None where there is none.
    """

    groups: list[Group]
    keys: list[Any]


def arrange(state_dict: Mapping[str, Any], groups: Sequence[Group]) -> Arranged:
    """Find what was saved of every parameter and every group.

    Args:
        state_dict: What `state_dict()` of an optimizer returned.
        groups: The groups of the optimizer that it is for.

    Raises:
        ValueError: It is not the state of an optimizer, or of one with other parameters.
    """
    if missing := [key for key in ("state", "param_groups") if key not in state_dict]:
        raise ValueError(
            f"expected the state dict of an optimizer, found no {missing} in it but {list(state_dict)[:4]}; "
            f"is it the model's?"
        )
    saved, states = state_dict["param_groups"], state_dict["state"]
    origins, remark = _origins(saved, groups)
    taken = {key for group in saved for key in group["params"]}
    return Arranged(
        states=[states.get(key) for origin in origins for key in origin.keys],
        groups=[_numbers(group, origin.groups) for group, origin in zip(groups, origins, strict=True)],
        rest={key: value for key, value in states.items() if isinstance(key, str) and key not in taken},
        remark=remark,
    )


def _origins(saved: Sequence[Group], groups: Sequence[Group]) -> tuple[list[Origin], str]:
    """Where each group comes from, and what there is to say about it."""
    theirs, ours = _names_of(saved), _names_of(groups)
    if theirs is None or ours is None or theirs == ours:
        return _by_order(saved, groups), ""
    places = {
        name: (group, key)
        for group, names in zip(saved, theirs, strict=True)
        for name, key in zip(names, group["params"], strict=True)
    }
    wanted = dict.fromkeys(name for names in ours for name in names)
    new, gone = [n for n in wanted if n not in places], [n for n in places if n not in wanted]
    if len(new) == len(wanted):
        remark = f"no parameter has a name of the saved ones, {gone}: their state was taken over in order"
        return _by_order(saved, groups), remark
    origins = []
    for names in ours:
        found = [places.get(name) for name in names]
        homes = {id(place[0]): place[0] for place in found if place is not None}
        origins.append(Origin(list(homes.values()), [place and place[1] for place in found]))
    partly = f"the state was taken over by name: {new} start afresh, what was saved of {gone} is not used"
    return origins, partly if new or gone else ""


def _by_order(saved: Sequence[Group], groups: Sequence[Group]) -> list[Origin]:
    """Where each group comes from if the groups correspond.

    Raises:
        ValueError: They do not.
    """
    if len(saved) != len(groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups, {len(saved)} instead of {len(groups)}; "
            f"to load it by name, construct both optimizers with a module or with named parameters"
        )
    sizes, expected = ([len(group["params"]) for group in gs] for gs in (saved, groups))
    if sizes != expected:
        raise ValueError(
            f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
            f"{sizes} parameters instead of {expected}; is it the state of another model?"
        )
    return [Origin([group], list(group["params"])) for group in saved]


def _names_of(groups: Sequence[Group]) -> list[list[str]] | None:
    """The names of all parameters by group, without wrappers; None if they have none, or are arranged already."""
    if not all("param_names" in group for group in groups):
        return None
    if any(isinstance(key, str) for group in groups for key in group["params"]):
        return None
    if any(len(group["param_names"]) != len(group["params"]) for group in groups):
        raise ValueError(
            "expected as many names as parameters in every group, found "
            f"{[(len(group['param_names']), len(group['params'])) for group in groups]}"
        )
    names = [[".".join(p for p in n.split(".") if p not in WRAPPERS) for n in g["param_names"]] for g in groups]
    return names if len({n for ns in names for n in ns}) == sum(map(len, names)) else [g["param_names"] for g in groups]


def _numbers(group: Group, origins: Sequence[Group]) -> dict[str, Any]:
    """The entries of a group: what all its origins say, or else its own; its own names in any case."""
    first, *others = origins or [group]
    agreed = {k: v for k, v in first.items() if all(k in other and _same(v, other[k]) for other in others)}
    arranged = {**group, **agreed}
    if any(isinstance(key, str) for key in first["params"]):
        arranged.pop("param_names", None)  # which do not go along when groups are arranged elsewhere
    if "param_names" in group:
        arranged["param_names"] = group["param_names"]
    del arranged["params"]
    return arranged


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
