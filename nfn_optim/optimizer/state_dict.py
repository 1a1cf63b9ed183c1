"""Matching a saved state to an optimizer that may have its parameters in other groups or in another order.

    names on both sides              matched by name
    none in common, or on one side   matched by group and order, as torch does
    keys that are names themselves   matched by group and order: torch.distributed.checkpoint has matched them already

A group adopts the numbers on which all saved groups of its parameters agree, and keeps its own where they differ. Where
groups correspond, that is every saved number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Group = Mapping[str, Any]
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that wrappers add."""


class MatchedState(NamedTuple):
    """A saved state in the order of an optimizer's groups.

    Attributes:
        states: The saved state of each parameter, None where there is none.
        groups: For each group its numbers and names, without `params`.
        rest: Saved entries that belong to no parameter.
        warning: For the user, or "".
    """

    states: list[Mapping[str, Any] | None]
    groups: list[dict[str, Any]]
    rest: dict[str, Any]
    warning: str


class Origin(NamedTuple):
    """The saved groups and states that one group is matched with.

    Attributes:
        groups: The saved groups of its parameters.
        keys: For each parameter the key of its saved state, None where there is none.
    """

    groups: list[Group]
    keys: list[Any]


def match_state(state_dict: Mapping[str, Any], groups: Sequence[Group]) -> MatchedState:
    """Match a saved state to parameter groups.

    Args:
        state_dict: Of an optimizer.
        groups: Of the optimizer to load it into.

    Raises:
        ValueError: It is not the state of an optimizer, or of one with other parameters.
    """
    if missing := [key for key in ("state", "param_groups") if key not in state_dict]:
        raise ValueError(
            f"expected the state dict of an optimizer, found no {missing} in it but {list(state_dict)[:4]}; "
            f"is it the model's?"
        )
    saved, states = state_dict["param_groups"], state_dict["state"]
    origins, warning = _origins(saved, groups)
    taken = {key for group in saved for key in group["params"]}
    return MatchedState(
        states=[states.get(key) for origin in origins for key in origin.keys],
        groups=[_numbers(group, origin.groups) for group, origin in zip(groups, origins, strict=True)],
        rest={key: value for key, value in states.items() if isinstance(key, str) and key not in taken},
        warning=warning,
    )


def _origins(saved: Sequence[Group], groups: Sequence[Group]) -> tuple[list[Origin], str]:
    """The origin of each group, and a warning or ""."""
    saved_names, own_names = _names_of(saved), _names_of(groups)
    if saved_names is None or own_names is None or saved_names == own_names:
        return _by_order(saved, groups), ""
    places = {
        name: (group, key)
        for group, names in zip(saved, saved_names, strict=True)
        for name, key in zip(names, group["params"], strict=True)
    }
    wanted = dict.fromkeys(name for names in own_names for name in names)
    new, unused = [n for n in wanted if n not in places], [n for n in places if n not in wanted]
    if len(new) == len(wanted):
        warning = f"no parameter has one of the saved names, {unused}: states were matched by order"
        return _by_order(saved, groups), warning
    origins = []
    for names in own_names:
        matched = [places.get(name) for name in names]
        saved_groups = {id(place[0]): place[0] for place in matched if place is not None}
        origins.append(Origin(list(saved_groups.values()), [place and place[1] for place in matched]))
    parts = [f"{new} are initialised"] if new else []
    parts += [f"the saved states of {unused} are not used"] if unused else []
    return origins, f"states were matched by name: {', '.join(parts)}" if parts else ""


def _by_order(saved: Sequence[Group], groups: Sequence[Group]) -> list[Origin]:
    """The origins of groups that correspond to the saved ones.

    Raises:
        ValueError: They do not correspond.
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
    """The names of all parameters by group, without wrappers; None if they have none, or are matched already."""
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
    """The entries of a group: those on which its origins agree, else its own; its own names in any case."""
    first, *others = origins or [group]
    agreed = {k: v for k, v in first.items() if all(k in other and _same(v, other[k]) for other in others)}
    entries = {**group, **agreed}
    if any(isinstance(key, str) for key in first["params"]):
        entries.pop("param_names", None)  # not matched along with groups elsewhere
    if "param_names" in group:
        entries["param_names"] = group["param_names"]
    del entries["params"]
    return entries


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
