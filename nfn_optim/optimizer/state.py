"""The state of one parameter between steps: `optimizer.state[p]`.

    exp_avg  exp_avg_sq  exp_avg_slow    moments, as large as the parameter; complex where the parameter is
    step                                 counter, 0-d
    ...                                  entries of others, such as Lookahead's: kept, saved and loaded

These entries are the dict's own. Scripts that add or remove rows of a parameter loop over them and index or concatenate
each but `step` alike, so the dict has no others. The entries of other shapes are hidden: `state[p]["gains"]` reads one,
and `state_dict()` has them all, but loops over `state[p]` do not meet them.

    fallbacks                            counter, 0-d
    log_step_size                        0-d, of a rule with step-size adaptation
    row_coeffs  gains                    coefficients in effect, `(shape[0] or 1, terms + 7)`; gains of the tensor, its
                                         rows and its other dimensions, `(1 + (shape[0] or 1) + sum of other sizes,)`;
                                         see `nfn_optim.rule.coefficients`
    basis                                of the subspace of a matrix, `(*shape[1:], k)`
    column_gram  whitener                of a matrix with whitening (`nfn_optim.rule.whitening`), `(k, k)`
    active_columns                       0-d, of a matrix with orthogonal directions; see `nfn_optim.rule.pooled`

Of a tensor that holds several (`nfn_optim.rule.members`), the entries but for moments and `step` are those of its
members one after the other, in one dimension. A rule without a learned part has only the first two moments and `step`.
Coefficients, bases and Gram matrices are whole on every process where the parameter is sharded. Everything is float32,
or float64 for float64 parameters, whatever the precision of the parameter. Moments may be in bfloat16 instead
(`nfn_optim.engine.stochastic_rounding`), but not those of complex parameters, since there is no complex bfloat16. Names
are those of `torch.optim.AdamW` where it has the same thing.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nfn_optim.engine.form import Form
from nfn_optim.engine.moments import MOMENTS
from nfn_optim.optimizer.real_view import real
from nfn_optim.rule import UpdateRule
from nfn_optim.rule.members import WHOLE

HIDDEN = frozenset(
    {"active_columns", "fallbacks", "log_step_size", "row_coeffs", "gains", "basis", "column_gram", "whitener"}
)
"""Entries that loops over a state do not meet."""
CHECKPOINT = "torch.distributed.checkpoint.state_dict"
"""Loads those entries of a flattened state whose names iterating over `state[p]` yields."""


class ParamState(dict[str, Any]):
    """The state of one parameter.

    Args:
        entries: Name -> value; of a `ParamState` all, hidden ones included.

    Attributes:
        hidden: The entries in `HIDDEN`.
        of_rule: Names of the entries that the rule reads, hidden ones included; known once the state was found to fit.
        form: What an edit of the state would change (`nfn_optim.optimizer.edited_state`); None: not known.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        entries = entries_of(entries)
        super().__init__({key: value for key, value in entries.items() if key not in HIDDEN})
        self.hidden = {key: value for key, value in entries.items() if key in HIDDEN}
        self.of_rule: tuple[str, ...] = ()
        self.form: Hashable = None

    def __missing__(self, key: str) -> Any:
        return self.hidden[key]

    def __iter__(self) -> Iterator[str]:
        if sys._getframe(1).f_globals.get("__name__") == CHECKPOINT:
            return iter(entries_of(self))
        return super().__iter__()


def entries_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """All entries of a state, hidden ones included."""
    return {**dict(state.items()), **(state.hidden if isinstance(state, ParamState) else {})}


def init_state(
    rule: UpdateRule, param: Tensor, state_dtype: torch.dtype | None = None, form: Form | None = None
) -> ParamState:
    """The state of a parameter before its first step.

    Args:
        rule: Of the optimizer.
        param: The parameter.
        state_dtype: Dtype of the moments of real parameters; None for that of everything else.
        form: How the parameter, or its real view, is seen; None for whole, or if that is not known.
    """
    view, forms = real(param), {} if form is None else {"": form}
    if view is param:
        return ParamState(rule.init({"": param}, forms=forms, state_dtype=state_dtype)[""])
    state = rule.init({"": view}, forms=forms)[""]
    return ParamState({key: torch.view_as_complex(value) if key in MOMENTS else value for key, value in state.items()})


def check_states(states: Iterable[Mapping[str, Any] | None]) -> None:
    """Raise if the saved states of all parameters have nothing but entries of others.

    Raises:
        ValueError: They have, so that they belong to another optimizer.
    """
    entries = list(dict.fromkeys(key for state in states for key in state or {}))
    if entries and not HIDDEN.union(MOMENTS, ["step"]) & set(entries):
        raise ValueError(
            f"expected the state of an NFNOptimizer or of AdamW, found only {entries}; it belongs to another optimizer"
        )


def read_state(
    rule: UpdateRule, name: str, param: Tensor, saved: Mapping[str, Any], state_dtype: torch.dtype | None = None
) -> ParamState:
    """Copy the saved state of a parameter in the dtypes used here; entries that were not saved are initialised.

    Entries that the rule does not have are those of others, and copied as they are.

    Args:
        rule: Of the optimizer.
        name: The parameter's name, for errors.
        param: The parameter.
        saved: Entry -> tensor, or number for counters.
        state_dtype: Dtype of the moments, as of `init_state`; saved values are rounded to nearest.

    Raises:
        ValueError: It belongs to another parameter, or to another rule.
    """
    state = entries_of(init_state(rule, param, state_dtype))
    if is_divided := isinstance(rows := saved.get("row_coeffs"), Tensor) and rows.dim() == 1:
        state = {key: value for key, value in state.items() if key in WHOLE or key in saved}
    for entry, value in saved.items():
        if entry not in state:
            state[entry] = tree_map_only(Tensor, lambda x: x.to(param.device), copy.deepcopy(value))
            continue
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
    return ParamState(state)
