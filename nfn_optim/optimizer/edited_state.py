"""States that were edited between steps: what fits is kept, what does not fit starts afresh.

Scripts that add or remove rows of a parameter put its state, indexed or concatenated, under a new parameter; others
strip it to the entries of Adam, clear it, or move it. A state fits a parameter where every entry has the shape that the
rule gives it. Without Adam's two moments nothing fits. Other dtypes and devices fit, and are converted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, MutableMapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nfn_optim.engine.form import Form
from nfn_optim.engine.moments import MOMENTS
from nfn_optim.engine.sharding import is_sharded, local
from nfn_optim.optimizer.state import ParamState, entries_of, init_state
from nfn_optim.rule import UpdateRule
from nfn_optim.rule.members import WHOLE


class EditedStates:
    """Fits the states of an optimizer to its parameters before every step, and warns of what is lost.

    Args:
        rule: Of the optimizer.
        state_dtype: Dtype of the moments, as of `init_state`.
    """

    def __init__(self, rule: UpdateRule, state_dtype: torch.dtype | None) -> None:
        self._rule, self._state_dtype = rule, state_dtype
        self._hidden: MutableMapping[Tensor, dict[str, Any]] = WeakTensorKeyDictionary()
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hidden": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _hidden=WeakTensorKeyDictionary())

    def fit_(
        self,
        states: MutableMapping[Tensor, Any],
        params: Mapping[str, Tensor],
        forms: Mapping[str, Form],
        *,
        stacklevel: int,
    ) -> None:
        """Give every parameter with a gradient, or with a state of ours, a state that fits.

        Warns where a state does not fit: of parameters that changed their shape every time, of other edits once.

        Args:
            states: `optimizer.state`, changed where a state is new or edited.
            params: By name.
            forms: How they are seen, of those that hold several tensors.
            stacklevel: Of the warning, as if the caller gave it.
        """
        reset: list[str] = []
        edited: list[str] = []
        first = ""
        for name, p in params.items():
            found = states.get(p)
            found = found if isinstance(found, Mapping) else {}
            form = forms.get(name)
            if isinstance(found, ParamState) and found.form == _form(found, p, form):
                continue
            if p.grad is None and not isinstance(found, ParamState):
                continue
            states[p], misfits = fit_state(self._rule, p, found, self._hidden.get(p, {}), self._state_dtype, form)
            self._hidden[p] = states[p].hidden
            if misfits:
                is_other_shape = isinstance(found.get(misfits[0]), Tensor) and misfits[0] == MOMENTS[0]
                (reset if is_other_shape else edited).append(name)
                first = first or _explanation(name, misfits[0], states[p], found)
        if reset:
            text = f"{reset} changed their shape: their optimizer state was reset ({first})"
            warnings.warn(text, stacklevel=stacklevel + 1)
        elif edited and not self._warned:
            self._warned = True
            warnings.warn(
                f"the optimizer state of {edited} was edited: {first}. What fits is kept, the rest starts afresh; to "
                f"keep all of it, treat all entries of state[p] but 'step' alike, not only exp_avg and exp_avg_sq",
                stacklevel=stacklevel + 1,
            )


def fit_state(
    rule: UpdateRule,
    param: Tensor,
    found: Mapping[str, Any],
    hidden: Mapping[str, Any],
    state_dtype: torch.dtype | None = None,
    form: Form | None = None,
) -> tuple[ParamState, list[str]]:
    """The state of a parameter whose state may have been edited.

    Args:
        rule: Of the optimizer.
        param: The parameter.
        found: Its state, edited or not.
        hidden: The parameter's last hidden entries, for a state without any.
        state_dtype: Dtype of the moments, as of `init_state`.
        form: How the parameter is seen, likewise.

    Returns:
        A state with as many of the tensors found as possible, and the names of entries, but for hidden ones, that are
        missing or do not fit: none for a state that never was one of ours.
    """
    fresh, given = entries_of(init_state(rule, param, state_dtype, form)), {**hidden, **entries_of(found)}
    fitting = {key: _converted(key, given[key], target) for key, target in fresh.items() if key in given}
    misfits = [key for key in WHOLE if key in fresh and fitting.get(key) is None]
    if misfits and misfits[0] in MOMENTS[:2]:
        fitting = {}
    foreign = {key: value for key, value in given.items() if key not in fresh}
    state = ParamState({**fresh, **foreign, **{key: x for key, x in fitting.items() if x is not None}})
    state.of_rule, state.form = tuple(fresh), _form(state, param, form)
    return state, misfits if any(key in found for key in WHOLE) else []


def _form(state: Mapping[str, Any], param: Tensor, form: Form | None) -> Hashable:
    """What changes when a state is edited, or its parameter gets another shape, device or form; cheap to compare."""
    entries = [state.get(key) for key in WHOLE]
    return (
        param.shape,
        param.device,
        form,
        *[(id(x), getattr(x, "shape", None), getattr(x, "dtype", None)) for x in entries],
    )


def _converted(key: str, value: object, target: Tensor) -> Tensor | None:
    """A value as an entry like `target`, if possible the same tensor; None if it does not fit."""
    if isinstance(value, Real) and target.dim() == 0:
        value = torch.as_tensor(float(value))
    if not isinstance(value, Tensor) or value.layout != torch.strided or is_sharded(value) != is_sharded(target):
        return None
    tensor = value.detach() if value.requires_grad else value
    value = tensor.reshape(()) if tensor.numel() == 1 and target.dim() == 0 < tensor.dim() else tensor
    if value.shape != target.shape or local(value).shape != local(target).shape:
        return None
    if value.is_complex() != target.is_complex() or (key == "step" and value.is_cpu and not 0 <= value < math.inf):
        return None
    is_dense = all(stride > 0 or size == 1 for stride, size in zip(value.stride(), value.shape, strict=True))
    if is_dense and (value.dtype, value.device) == (target.dtype, target.device):
        return value
    return target.copy_(value)


def _explanation(name: str, key: str, state: ParamState, found: Mapping[str, Any]) -> str:
    """What was expected of an entry, and found."""
    value = found.get(key)
    form = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "none" if value is None else repr(value)
    return f"expected {key} of {name!r} of shape {tuple(state[key].shape)}, found {form:.100}"
