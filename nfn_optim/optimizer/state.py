"""What is remembered of one parameter between steps: `optimizer.state[p]`, a tensor by name.

    exp_avg  exp_avg_sq  exp_avg_slow    moments, as large as the parameter; complex where the parameter is
    step  fallbacks                      counters, 0-d
    growth                               of its steps, 0-d, of a rule with `RuleConfig.growth`
    words  gains                         what the neurons said last, of a rule whose neurons do not talk at every step:
                                         `(shape[0] or 1, words)` and `(sum of the other sizes,)`, whole where the
                                         parameter is divided among processes
    basis                                of the subspace in which the direction of a matrix is orthogonal,
                                         `(*shape[1:], k)`, whole likewise

All of it is float32, or float64 for float64 parameters, whatever the precision of the parameter. Moments may be in
bfloat16 instead (`nfn_optim.engine.stochastic_rounding`), but for those of complex parameters, since there is no
complex bfloat16. The names are those of `torch.optim.AdamW` where it has the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nfn_optim.engine.moments import MOMENTS
from nfn_optim.optimizer.real_view import real
from nfn_optim.rule import UpdateRule

ParamState = dict[str, Tensor]


def fresh(rule: UpdateRule, param: Tensor, kept_in: torch.dtype | None = None) -> ParamState:
    """The state of a parameter before its first step.

    Args:
        rule: The rule that it is for.
        param: The parameter.
        kept_in: Precision of the moments of real parameters; None for that of everything else.
    """
    view = real(param)
    if view is param:
        return rule.init({"": param}, kept_in=kept_in)[""]
    state = rule.init({"": view})[""]
    return {key: torch.view_as_complex(value) if key in MOMENTS else value for key, value in state.items()}


def real_views(state: ParamState) -> ParamState:
    """The state of a complex parameter as the rule sees it, the same memory."""
    return {key: real(value) for key, value in state.items()}


def fits(state: ParamState, param: Tensor) -> bool:
    """Whether a state is that of a parameter of this shape, on this device; a state without moments is nobody's."""
    moment = state.get("exp_avg")
    return moment is None or (moment.shape == param.shape and moment.device == param.device)


def read(
    rule: UpdateRule, name: str, param: Tensor, found: Mapping[str, Any], kept_in: torch.dtype | None = None
) -> ParamState:
    """Copy a saved state of one parameter in the precision that it has here; what was not saved starts fresh.

    Args:
        rule: The rule that it is for.
        name: The parameter's name, for errors.
        param: The parameter.
        found: Entry -> tensor, or number for counters.
        kept_in: Precision of the moments, as in `fresh`; if that is less than they were saved in, the nearest.

    Raises:
        ValueError: It is another parameter's, or another rule's.
    """
    state = fresh(rule, param, kept_in)
    if unknown := [entry for entry in found if entry not in state]:
        raise ValueError(
            f"expected the state {list(state)} for {name!r}, found also {unknown}; "
            f"load it into an optimizer with the rule that it was saved with"
        )
    for entry, value in found.items():
        if not isinstance(value, Tensor | Real):
            raise ValueError(f"expected {entry!r} of {name!r} as a tensor, found {type(value).__name__}")
        tensor, target = torch.as_tensor(value), state[entry]
        if tensor.shape != target.shape or tensor.is_complex() != target.is_complex():
            raise ValueError(
                f"expected {entry!r} of {name!r} of shape {tuple(target.shape)} and {target.dtype}, found "
                f"{tuple(tensor.shape)} and {tensor.dtype}; the state was saved for another model"
            )
        target.copy_(tensor)
    return state
