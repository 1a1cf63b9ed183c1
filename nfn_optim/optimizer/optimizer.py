"""NFNOptimizer: the update rule behind the interface of `torch.optim.Optimizer`.

There is no mathematics here. A step gathers parameters, gradients and state by name and calls

    rule.step_(params, grads, state, symmetry, lr=..., weight_decay=..., ...)

which changes parameters and state in place. The symmetry of the network is found at the first step
(`nfn_optim.optimizer.discovery`), so that only the construction differs from `torch.optim.AdamW`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Unpack, overload

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available

from nfn_optim.engine import background
from nfn_optim.engine.executor import Execution
from nfn_optim.engine.inductor import can_compile, has_failed
from nfn_optim.engine.sharding import Shards, all_processes, is_sharded, local
from nfn_optim.engine.stochastic_rounding import is_bfloat16
from nfn_optim.optimizer import param_groups
from nfn_optim.optimizer.compiled_step import CompiledSteps, Given, is_small
from nfn_optim.optimizer.edited_state import EditedStates
from nfn_optim.optimizer.gradient_check import grads_finite, grads_finite_tensor, on_cpu
from nfn_optim.optimizer.param_groups import BETAS, COUNTERS, ParamSlot, TorchArguments, by_name, moves
from nfn_optim.optimizer.parameter_index import ParameterIndex
from nfn_optim.optimizer.real_view import real
from nfn_optim.optimizer.rule_tensors import RuleTensors
from nfn_optim.optimizer.skipped_steps import SkippedSteps
from nfn_optim.optimizer.state import ParamState, check_states, entries_of, read_state
from nfn_optim.optimizer.state_dict import match_state
from nfn_optim.pretrained import load
from nfn_optim.rule import UpdateRule
from nfn_optim.rule.members import members_of
from nfn_optim.rule.update_rule import step_with_theta_
from nfn_optim.symmetry import Symmetry

COMPILE_AFTER = 10**9  # weight updates after which compilation pays
MIN_WORK = 10**5  # a step of fewer weights costs as much as one of this many


class NFNOptimizer(torch.optim.Optimizer):
    """A learned optimizer; use it as `torch.optim.AdamW`.

    The symmetry of the network is `symmetry` if given; else traced from the forward passes before the first step, of
    the module given or of the modules found to own the parameters; else trivial (every dimension an axis of its own)
    with one warning, and replaced once a forward pass is seen.

    The entry `betas` of the groups exists for schedulers that expect one (OneCycleLR, CyclicLR). The decay of the
    moments is part of the rule: a group with other betas is refused, and values that schedulers write are ignored.

    Numbers are in the groups, tensors in `state[p]`, under the names of AdamW; a state of AdamW can be loaded. A
    complex parameter is optimized as its real view.

    Args:
        params_or_model: A module, or an iterable of parameters, of (name, parameter) pairs or of groups.
        lr: Learning rate in Adam's units, per step; a number or a tensor with one element.
        weight_decay: Decoupled weight decay, per unit of learning rate.
        rule: Name of a pretrained rule, path of one, an `UpdateRule` (kept by reference), or "adamw": AdamW itself.
        model: The module that owns the parameters, where `params_or_model` are groups. Only weakly referenced.
        symmetry: The symmetry of the parameters by name, or in order when the parameters have no names.
        total_steps: The horizon in steps, if known.
        maximize: Ascend instead of descend.
        state_dtype: `torch.bfloat16` stores the moments in 16 bits with stochastic rounding
            (`nfn_optim.engine.stochastic_rounding`): half the state. Counters and coefficients keep their precision,
            and so do the moments of complex parameters. None: float32, or float64 for float64 parameters.
        compile: Whether to compile steps, which takes ten seconds to minutes once and a few seconds in each later
            process; True compiles at the first steps. By default as soon as it pays: after `COMPILE_AFTER` weight
            updates (100 steps of ten million parameters, 10,000 of a small network), where there is a compiler, and
            on a CPU in the background (`nfn_optim.engine.background`). Compiled and uncompiled steps are equal to
            rounding.
        **torch_arguments: Others of `torch.optim.AdamW`, at their defaults; they mean nothing here.

    Raises:
        ValueError: No parameters, a hyperparameter out of range, or a symmetry or rule that does not fit.
        TypeError: An argument of the wrong type, or one that does not exist.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = NFNOptimizer(model, rule="adamw")
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params_or_model: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        rule: str | os.PathLike[str] | UpdateRule = "default",
        model: nn.Module | None = None,
        symmetry: Symmetry | None = None,
        total_steps: int | None = None,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        compile: bool | None = None,
        **torch_arguments: Unpack[TorchArguments],
    ) -> None:
        param_groups.check_names(torch_arguments)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": BETAS,
            "maximize": maximize,
            "total_steps": total_steps,
            **dict.fromkeys(COUNTERS, 0),
        }
        param_groups.check_group({**defaults, **torch_arguments})
        for expected, argument, value in ((nn.Module, "model", model), (Symmetry, "symmetry", symmetry)):
            if value is not None and not isinstance(value, expected):
                raise TypeError(f"expected {argument}= as a {expected.__name__}, found {type(value).__name__}")
        if not isinstance(rule, str | os.PathLike | UpdateRule):
            raise TypeError(f"expected rule= as a name, a path or an UpdateRule, found {type(rule).__name__}")
        if state_dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"expected state_dtype= as torch.bfloat16 or None, found {state_dtype!r}; None keeps the state in "
                f"float32, or in float64 for float64 parameters"
            )
        if isinstance(params_or_model, nn.Module):
            model = params_or_model if model is None else model
            params_or_model = [p for p in params_or_model.parameters() if p.is_floating_point() or p.is_complex()]
        elif not isinstance(params_or_model, Tensor):
            params_or_model = list(params_or_model)
        if isinstance(params_or_model, list) and not params_or_model:
            raise ValueError(
                "optimizer got an empty parameter list: expected a module with parameters, or parameters; "
                "an iterator such as model.parameters() can be read only once"
            )
        self.rule = rule if isinstance(rule, UpdateRule) else load(rule)
        self._rule_name = type(rule).__name__ if isinstance(rule, UpdateRule) else os.fspath(rule)
        self._compile, self._work, self._state_dtype = compile, 0, state_dtype
        self._rule_tensors, self._compiled_steps = RuleTensors(), CompiledSteps()
        self._skipped_steps, self._edited_states = SkippedSteps(), EditedStates(self.rule, state_dtype)
        self._index = ParameterIndex(model)
        super().__init__(params_or_model, defaults)
        self._index.bind(self)
        self._index.label(self.param_groups)
        if symmetry is not None:
            self._index.adopt(symmetry, self.param_groups)
        elif self.rule.learned:
            self._index.discover(model)

    # --------------------------------------------------------------------------------------------------- properties

    @property
    def symmetry(self) -> Symmetry | None:
        """The symmetry of all parameters by `names`; None before it is known."""
        return self._index.symmetry

    @property
    def names(self) -> tuple[str, ...]:
        """The name of every parameter in the order of the groups: given, the module's, or "group.index"."""
        self._index.update(self.param_groups)
        return tuple(self._index.names)

    @property
    def skipped_steps(self) -> int:
        """Steps not taken because a gradient was not finite, or so large that its square is not."""
        self._count_pending_skips()
        return int(self.param_groups[0]["skipped_steps"])

    @property
    def fallbacks(self) -> int:
        """How often the update of a tensor was out of range and fell back to Adam's."""
        states = [entries_of(self.state.get(p) or {}) for group in self.param_groups for p in group["params"]]
        return sum(int(s["fallbacks"].sum()) for s in states if "fallbacks" in s)

    def __repr__(self) -> str:
        self._count_pending_skips()
        lines = [f"{type(self).__name__} (", f"Rule {self._rule_name}"]
        for k, group in enumerate(self.param_groups):
            shown = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            lines += [f"Parameter Group {k}", f"    params: {len(group['params'])}"]
            lines += [f"    {key}: {value}" for key, value in sorted(shown.items())]
        return "\n".join([*lines, ")"])

    # --------------------------------------------------------------------------------------------------------- step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch._disable_dynamo  # type: ignore[attr-defined] # control flow depends on values
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; a step with a non-finite gradient is skipped and counted.

        A step never synchronises with a device other than the CPU, not even to check for non-finite gradients; there,
        skipped steps are counted when `skipped_steps` is read.

        Args:
            closure: Reevaluates the model with gradients and returns the loss.

        Returns:
            The return value of `closure`.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        all_params = [(p, group) for group in self.param_groups for p in group["params"]]
        grads = [real(p.grad) for p, _ in all_params if p.grad is not None]
        if not grads:
            return loss
        finite, local_grads = None, [local(g) for g in grads]
        if on_cpu(local_grads) or any(is_sharded(g) for g in grads):
            all_finite = all_processes(grads_finite(local_grads), grads)
            self._skipped_steps.note(all_finite, self._named, stacklevel=6)
            if not all_finite:
                self._count(skipped=1)
                return loss
        else:
            finite = grads_finite_tensor(local_grads)
            self._skipped_steps.note_on_device(finite, self._named, stacklevel=6)
        self._resolve()
        pairs = zip(self._index.names, all_params, strict=True)
        slots = [ParamSlot(name, p, group) for name, (p, group) in pairs if p.grad is not None]
        named = self._named()
        self._edited_states.fit_(self.state, named, self._index.forms(named), stacklevel=6)
        if not any(moves(group) for group in self.param_groups) and not any(g.any() for g in grads):
            return loss  # distributed checkpoints take such a step to create the state
        full = [slot for slot in slots if slot.param.numel() > 0]
        refresh = self.rule.refreshes(self.param_groups[0]["steps_taken"])
        for device in dict.fromkeys(slot.param.device for slot in full):
            self._update([slot for slot in full if slot.param.device == device], refresh, finite)
        self._count(taken=1)
        return loss

    def _count(self, taken: int = 0, skipped: int = 0) -> None:
        """Count steps."""
        for group in self.param_groups:
            group["steps_taken"] += taken
            group["skipped_steps"] += skipped

    def _count_pending_skips(self) -> None:
        """Count the skipped steps that are known to the device only; synchronises."""
        if skipped := self._skipped_steps.collect():
            self._count(taken=-skipped, skipped=skipped)

    def _update(self, slots: list[ParamSlot], refresh: bool, finite: Tensor | None) -> None:
        """Call the rule for the parameters of one device; nothing changes where `finite` is False."""
        symmetry = self._index.restricted({name: p for name, p, _ in slots})
        slots = [slots[0]._replace(name=next(iter(symmetry.dims)))] if len(slots) == 1 else slots
        shards = Shards.of({name: p for name, p, _ in slots})
        params = {name: local(real(p)) for name, p, _ in slots}
        grads = {name: local(real(p.grad), p) for name, p, _ in slots if p.grad is not None}
        grads |= {name: -grads[name] for name, _, group in slots if group["maximize"]}
        stored = {name: self._state_of(p) for name, p, _ in slots}
        dtypes = {s["step"].dtype for s in stored.values()}
        dtype, device = max(dtypes, key=lambda d: d.itemsize), params[slots[0].name].device
        state = {
            name: {key: x if is_bfloat16(x) else x.to(dtype) for key, x in s.items()} for name, s in stored.items()
        }
        hypers = {
            "lr": by_name(slots, "lr"),
            "weight_decay": by_name(slots, "weight_decay"),
            "total_steps": self.param_groups[0]["total_steps"],
            "refresh": refresh,
        }
        execution = self._execution(sum(p.numel() for p in params.values()), device)
        execution = execution if finite is None else replace(execution, grads_finite=finite.to(device))
        with torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext():
            theta, tensors = self._rule_tensors.copies(self.rule, device, dtype), (params, grads, state)
            execution = replace(execution, terms=self._rule_tensors.terms(self.rule))
            whole = execution.compiled and shards is None and is_small(members_of(symmetry).split(params))
            hypers |= {"execution": execution, "shards": shards}
            given = Given(self.rule, theta or self._rule_tensors.own, tensors, symmetry, hypers)
            if not (whole and self._compiled_steps.step_(given)):
                if execution.background:
                    uncompiled = replace(execution, compiled=False)
                    hypers["execution"] = uncompiled if whole else self._compiled_steps.execution(given)
                if theta:
                    step_with_theta_(self.rule, theta, *tensors, symmetry, **hypers)
                else:
                    self.rule.step_(*tensors, symmetry, **hypers)
        if len(dtypes) > 1:
            entries = [(value, state[name][key]) for name, s in stored.items() for key, value in s.items()]
            torch._foreach_copy_([old for old, _ in entries], [value for _, value in entries])

    def _execution(self, weights: int, device: torch.device) -> Execution:
        """How a step over this many weights is run."""
        self._work += max(weights, MIN_WORK)
        if self._compile is not None or self._work <= COMPILE_AFTER or not can_compile():
            return Execution(compiled=bool(self._compile) and not has_failed())
        background.adopt(self.param_groups[0]["steps_taken"] + 1)
        return Execution(compiled=not has_failed(), background=background.is_possible(device))

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter as the rule reads it: real, and the local part."""
        state: ParamState = self.state[p]
        return {key: local(real(state[key])) for key in state.of_rule}

    def _named(self) -> dict[str, Tensor]:
        """All parameters by name."""
        return dict(zip(self.names, (p for group in self.param_groups for p in group["params"]), strict=True))

    def _resolve(self) -> None:
        """Bring names and symmetry in line with the present parameters."""
        self._index.update(self.param_groups)
        self._index.resolve(self.param_groups)

    # ------------------------------------------------------------------------------------- groups, saving and loading

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; a traced symmetry is traced again at the next step.

        Args:
            param_group: `params`, and the values that differ from the defaults. Parameters that a symmetry given by
                hand does not name get axes of their own.

        Raises:
            ValueError: A hyperparameter is out of range, or the group has other betas than the rule.
        """
        super().add_param_group(self._index.labelled(param_group, self.param_groups))
        try:
            param_groups.check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if len(self.param_groups) > 1:
            self.param_groups[-1] |= {key: self.param_groups[0][key] for key in COUNTERS}
        self._index.observe()

    def state_dict(self) -> dict[str, Any]:
        """The state, as of any optimizer of torch; synchronises with devices other than the CPU."""
        self._count_pending_skips()

        def complete(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            states = state_dict["state"]
            states |= {key: entries_of(state) for key, state in states.items() if isinstance(state, ParamState)}

        hook = self.register_state_dict_post_hook(complete, prepend=True)  # before those of the user
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state in this optimizer's dtypes, whatever those of the parameters or of the saved state.

        Where both optimizers were constructed with a module or with named parameters, states are matched by name:
        groups may differ and be in another order. Otherwise groups must be the same.

        Args:
            state_dict: From `state_dict()` of such an optimizer or of `torch.optim.AdamW`. Entries that it lacks are
                initialised.

        Raises:
            ValueError: The state belongs to another model or another optimizer; nothing is changed then.
        """
        self._count_pending_skips()
        loaded: dict[Tensor, ParamState] = {}
        messages: list[str] = []

        def read(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            matched = match_state(state_dict, self.param_groups)
            check_states(matched.states)
            messages.extend([matched.warning] if matched.warning else [])
            params = [p for group in self.param_groups for p in group["params"]]
            for name, p, saved in zip(self.names, params, matched.states, strict=True):
                if saved:
                    loaded[p] = read_state(self.rule, name, p, saved, self._state_dtype)
            groups = []
            for numbers, group in zip(matched.groups, self.param_groups, strict=True):
                param_groups.check_numbers(numbers)
                groups.append({**numbers, "params": list(range(len(group["params"])))})
            return {**state_dict, "state": matched.rest, "param_groups": groups}

        def place(_: torch.optim.Optimizer) -> None:
            self.state.update(loaded)
            self._index.update_names(self.param_groups)

        before = self.register_load_state_dict_pre_hook(read)  # after those of the user
        after = self.register_load_state_dict_post_hook(place, prepend=True)  # before those of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        for message in messages:
            warnings.warn(message, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        self._count_pending_skips()
        own = ("rule", "_rule_name", "_compile", "_work", "_state_dtype", "_index")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._index.bind(self)
        self.__dict__.setdefault("_rule_tensors", RuleTensors())
        self.__dict__.setdefault("_compiled_steps", CompiledSteps())
        self.__dict__.setdefault("_state_dtype", None)
        self.__dict__.setdefault("_skipped_steps", SkippedSteps())
        self.__dict__.setdefault("_edited_states", EditedStates(self.rule, self._state_dtype))
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # added here by the base class
                    group.setdefault(key, value)
