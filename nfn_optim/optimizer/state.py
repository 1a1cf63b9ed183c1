"""The state of one parameter between steps: `optimizer.state[p]`, a tensor by name.

    exp_avg  exp_avg_sq  exp_avg_slow    moments, as large as the parameter; complex where the parameter is
    step  fallbacks                      counters, 0-d
    log_step_size                        0-d, of a rule with step-size adaptation
    row_coeffs  gains                    coefficients in effect, `(shape[0] or 1, terms + 5)`; gains of the tensor, its
                                         rows and its other dimensions, `(1 + (shape[0] or 1) + sum of other sizes,)`;
                                         see `nfn_optim.rule.coefficients`
    basis                                of the subspace of a matrix, `(*shape[1:], k)`
    active_columns                       0-d, of a matrix with orthogonal directions; see `nfn_optim.rule.pooled`

Of a tensor that holds several (`nfn_optim.rule.members`), the entries but for moments and `step` are those of its
members one after the other, in one dimension. A rule without a learned part has only the first two moments and `step`.
Coefficients and bases are whole on every process where the parameter is sharded. Everything is float32, or float64 for
float64 parameters, whatever the precision of the parameter. Moments may be in bfloat16 instead
(`nfn_optim.engine.stochastic_rounding`), but not those of complex parameters, since there is no complex bfloat16. Names
are those of `torch.optim.AdamW` where it has the same thing.
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
from nfn_optim.rule.members import WHOLE

ParamState = dict[str, Tensor]


def init_state(rule: UpdateRule, param: Tensor, state_dtype: torch.dtype | None = None) -> ParamState:
    """The state of a parameter before its first step.

    Args:
        rule: Of the optimizer.
        param: The parameter.
        state_dtype: Dtype of the moments of real parameters; None for that of everything else.
    """
    view = real(param)
    if view is param:
        return rule.init({"": param}, state_dtype=state_dtype)[""]
    state = rule.init({"": view})[""]
    return {key: torch.view_as_complex(value) if key in MOMENTS else value for key, value in state.items()}


def real_views(state: ParamState) -> ParamState:
    """The state of a complex parameter as the rule reads it, the same memory."""
    return {key: real(value) for key, value in state.items()}


def fits(state: ParamState, param: Tensor) -> bool:
    """Whether a state has the shape and device of a parameter; one without moments fits all."""
    moment = state.get("exp_avg")
    return moment is None or (moment.shape == param.shape and moment.device == param.device)


def read_state(
    rule: UpdateRule, name: str, param: Tensor, saved: Mapping[str, Any], state_dtype: torch.dtype | None = None
) -> ParamState:
    """Copy the saved state of a parameter in the dtypes used here; entries that were not saved are initialised.

    Args:
        rule: Of the optimizer.
        name: The parameter's name, for errors.
        param: The parameter.
        saved: Entry -> tensor, or number for counters.
        state_dtype: Dtype of the moments, as of `init_state`; saved values are rounded to nearest.

    Raises:
        ValueError: It belongs to another parameter, or to another rule.
    """
    state = init_state(rule, param, state_dtype)
    if unknown := [entry for entry in saved if entry not in state]:
        raise ValueError(
            f"expected the state {list(state)} for {name!r}, found also {unknown}; "
            f"load it into an optimizer with the rule that it was saved with"
        )
    if is_divided := isinstance(rows := saved.get("row_coeffs"), Tensor) and rows.dim() == 1:
        state = {key: value for key, value in state.items() if key in WHOLE or key in saved}
    for entry, value in saved.items():
        if not isinstance(value, Tensor | Real):
            raise ValueError(f"expected {entry!r} of {name!r} as a tensor, found {type(value).__name__}")
        tensor, target = torch.as_tensor(value), state[entry]
        if is_divided and entry not in WHOLE:  # the symmetry, by which it is divided, is not known here
            state[entry] = tensor.detach().clone().to(target)
            continue
        if tensor.shape != target.shape or tensor.is_complex() != target.is_complex():
            raise ValueError(
                f"expected {entry!r} of {name!r} of shape {tuple(target.shape)} and {target.dtype}, found "
                f"{tuple(tensor.shape)} and {tensor.dtype}; the state was saved for another model"
            )
        target.copy_(tensor)
    return state
