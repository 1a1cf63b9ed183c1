"""NFNOptimizer: the update rule behind the interface of `torch.optim.Optimizer`.

There is no mathematics here. A step gathers parameters, gradients and state by name, calls the rule, and writes back:

    update, new_state = rule(params, grads, state, symmetry, lr=..., weight_decay=...)
    p += update          in place, in the dtype of p
    state <- new_state   in place, float32 (float64 for float64 parameters, moments bfloat16 if wanted)

What a rule needs besides is the symmetry of the network. It is found at the first step
(`nfn_optim.optimizer.discovery`), so that
only the construction differs from `torch.optim.AdamW`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.func import functional_call

from nfn_optim.engine.executor import Kernel
from nfn_optim.engine.inductor import can_compile
from nfn_optim.engine.sharding import Shards, everywhere, is_divided, local
from nfn_optim.engine.stochastic_rounding import is_short
from nfn_optim.optimizer import state as param_state
from nfn_optim.optimizer.compiled_step import StepGraphs, is_small
from nfn_optim.optimizer.gradient_check import is_near, is_usable, usability
from nfn_optim.optimizer.param_groups import BETAS, COUNTERS, Slot, by_name, check_betas, check_numbers, moves
from nfn_optim.optimizer.parameter_index import Layout
from nfn_optim.optimizer.real_view import real
from nfn_optim.optimizer.state import ParamState
from nfn_optim.optimizer.state_dict import arrange
from nfn_optim.pretrained import load
from nfn_optim.rule import UpdateRule
from nfn_optim.symmetry import Symmetry

PATIENCE = 10**9  # updates of single weights after which compilation has paid
LEAST_WORK = 10**5  # a step costs at least as much as if it updated so many


class NFNOptimizer(torch.optim.Optimizer):
    """A learned optimizer; use it as `torch.optim.AdamW`.

    The symmetry of the network is, in this order: `symmetry`; traced from the inputs of the forward passes before the
    first step, of the module given or of whatever modules are found to own the parameters; or none, every dimension of
    every tensor an axis of its own, with one warning. In the last case it is still adopted once a forward is seen.

    The entry `betas` of the groups is there for schedulers that expect one (OneCycleLR, CyclicLR). The decay of the
    moments is part of the rule: a group that is given other betas is refused, and what schedulers write is ignored.

    Numbers are kept in the groups, tensors in `state[p]`, by the names of AdamW; a state of AdamW can be loaded. A
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
        state_dtype: `torch.bfloat16` keeps the moments in 16 bits, rounded up or down by chance
            (`nfn_optim.engine.stochastic_rounding`):
            half the state. Counters and the numbers of neurons stay as they are, and so do the moments of complex
            parameters, since there is no complex bfloat16. None: float32, or float64 for float64 parameters.
        compile: Whether steps are compiled, ten seconds to two minutes once and a few in each later process. By
            default they are as soon as that has paid: after `PATIENCE` updates of single weights, 100 steps of ten
            million parameters or 10,000 of a small network, and where there is a compiler. Compiled and uncompiled
            steps differ by rounding.

    Raises:
        ValueError: No parameters, a hyperparameter out of range, or a symmetry or rule that does not fit.
        TypeError: An argument of the wrong type.

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
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": BETAS,
            "maximize": maximize,
            "total_steps": total_steps,
            **dict.fromkeys(COUNTERS, 0),
        }
        check_numbers(defaults)
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
        self._cast: dict[tuple[torch.device, torch.dtype], tuple[list[tuple[int, int]], dict[str, Tensor]]] = {}
        self._tensors: dict[str, Tensor] = {}
        self._graphs = StepGraphs()
        self._unsettled: Tensor | None = None
        self._layout = Layout(model)
        super().__init__(params_or_model, defaults)
        self._layout.label(self.param_groups)
        if symmetry is not None:
            self._layout.adopt(symmetry, self.param_groups)
        elif self.rule.learns:
            self._layout.seek(model)

    # ------------------------------------------------------------------------------------------------ what it says

    @property
    def symmetry(self) -> Symmetry | None:
        """The symmetry of all parameters by `names`; None before it is known."""
        return self._layout.symmetry

    @property
    def names(self) -> tuple[str, ...]:
        """The name of every parameter in the order of the groups: given, the module's, or "group.index"."""
        self._layout.renew(self.param_groups)
        return tuple(self._layout.names)

    @property
    def skipped_steps(self) -> int:
        """Steps not taken because a gradient was not finite, or so large that its square is not."""
        self._settle()
        return int(self.param_groups[0]["skipped_steps"])

    @property
    def fallbacks(self) -> int:
        """How often the learned update of one tensor was out of range and the nominal one was taken."""
        states = [self.state[p] for group in self.param_groups for p in group["params"] if p in self.state]
        return sum(int(s["fallbacks"].item()) for s in states if "fallbacks" in s)

    def __repr__(self) -> str:
        self._settle()
        lines = [f"{type(self).__name__} (", f"Rule {self._rule_name}"]
        for k, group in enumerate(self.param_groups):
            shown = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            lines += [f"Parameter Group {k}", f"    params: {len(group['params'])}"]
            lines += [f"    {key}: {value}" for key, value in sorted(shown.items())]
        return "\n".join([*lines, ")"])

    # -------------------------------------------------------------------------------------------------- the one step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch._disable_dynamo  # type: ignore[attr-defined] # a step decides on values, which a graph cannot
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; a step with a non-finite gradient is counted and otherwise leaves everything as it is.

        Where gradients are not on a CPU it waits for nothing, and such steps are counted when `skipped_steps` is asked.

        Args:
            closure: Reevaluates the model with gradients and returns the loss.

        Returns:
            What `closure` returned.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        everyone = [(p, group) for group in self.param_groups for p in group["params"]]
        grads = [real(p.grad) for p, _ in everyone if p.grad is not None]
        if not grads:
            return loss
        usable, here = None, [local(g) for g in grads]
        if is_near(here) or any(is_divided(g) for g in grads):
            if not everywhere(is_usable(here), grads):
                self._count(skipped=1)
                return loss
        else:
            usable = usability(here)
            self._unsettled = ~usable + (0 if self._unsettled is None else self._unsettled)
        self._resolve()
        named = zip(self._layout.names, everyone, strict=True)
        slots = [Slot(name, p, group) for name, (p, group) in named if p.grad is not None]
        for _, p, _ in slots:
            if not self.state[p]:
                self.state[p] = param_state.fresh(self.rule, p, self._state_dtype)
        if not any(moves(group) for group in self.param_groups) and not any(g.any() for g in grads):
            return loss  # a checkpoint that wants the state to be there
        full = [slot for slot in slots if slot.param.numel() > 0]
        talk = self.rule.talks(self.param_groups[0]["steps_taken"])
        for device in dict.fromkeys(slot.param.device for slot in full):
            self._update([slot for slot in full if slot.param.device == device], talk, usable)
        self._count(taken=1)
        return loss

    def _count(self, taken: int = 0, skipped: int = 0) -> None:
        """Count steps."""
        for group in self.param_groups:
            group["steps_taken"] += taken
            group["skipped_steps"] += skipped

    def _settle(self) -> None:
        """Count the steps of which it was left to the device whether they are taken; waits for it."""
        if self._unsettled is not None:
            skipped, self._unsettled = int(self._unsettled.item()), None
            self._count(taken=-skipped, skipped=skipped)

    def _update(self, slots: list[Slot], talk: bool, usable: Tensor | None) -> None:
        """Call the rule for parameters of one device and write back what it says, but where gradients are unusable."""
        shards = Shards.of({name: p for name, p, _ in slots})
        params = {name: local(real(p)) for name, p, _ in slots}
        grads = {name: local(real(p.grad), p) for name, p, _ in slots if p.grad is not None}
        grads |= {name: -grads[name] for name, _, group in slots if group["maximize"]}
        kept = {name: self._state_of(p) for name, p, _ in slots}
        dtypes = {s["step"].dtype for s in kept.values()}
        dtype, device = max(dtypes, key=lambda d: d.itemsize), params[slots[0].name].device
        state = {name: {key: x if is_short(x) else x.to(dtype) for key, x in s.items()} for name, s in kept.items()}
        symmetry = self._layout.restricted({name: p for name, p, _ in slots})
        hypers = {
            "lr": by_name(slots, "lr"),
            "weight_decay": by_name(slots, "weight_decay"),
            "total_steps": self.param_groups[0]["total_steps"],
            "talk": talk,
        }
        kernel = self._kernel(sum(p.numel() for p in params.values()))
        kernel = kernel if usable is None else replace(kernel, usable=usable.to(device))
        with torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext():
            theta, given = self._theta(device, dtype), (params, grads, state)
            whole = kernel.compiled and shards is None and is_small(params)
            graph = self.rule, theta or self._tensors, given, symmetry, hypers | {"usable": kernel.usable}
            if not (whole and self._graphs.step_(*graph)):
                args, hypers = (*given, symmetry), hypers | {"kernel": kernel, "shards": shards}
                functional_call(self.rule, theta, args, hypers) if theta else self.rule(*args, **hypers)
        if len(dtypes) > 1:
            entries = [(value, state[name][key]) for name, s in kept.items() for key, value in s.items()]
            torch._foreach_copy_([old for old, _ in entries], [value for _, value in entries])

    def _kernel(self, weights: int) -> Kernel:
        """How a step runs over so many weights."""
        self._work += max(weights, LEAST_WORK)
        return Kernel(compiled=(self._work > PATIENCE and can_compile()) if self._compile is None else self._compile)

    def _state_of(self, p: Tensor) -> ParamState:
        """The state of a parameter as the rule sees it: real, and this process's part."""
        state = param_state.real_views(self.state[p]) if p.is_complex() else self.state[p]
        return {key: local(value) for key, value in state.items()}

    def _theta(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The rule's tensors where and in which dtype they are needed; empty if that is how they are."""
        theta = self._tensors
        if next(self.rule.parameters(), None) is not next(iter(theta.values()), None):  # to walk through all takes long
            theta = self._tensors = {**dict(self.rule.named_parameters()), **dict(self.rule.named_buffers())}
        if all(t.device == device and t.dtype in (dtype, torch.int64, torch.bool) for t in theta.values()):
            return {}
        versions = [(id(t), t._version) for t in theta.values()]
        if self._cast.get((device, dtype), ([], {}))[0] != versions:
            cast = {n: t.detach().to(device, dtype if t.is_floating_point() else None) for n, t in theta.items()}
            self._cast[device, dtype] = versions, cast
        return self._cast[device, dtype][1]

    def _resolve(self) -> None:
        """Make sure that names, symmetry and state are those of the parameters that there are now."""
        if self._layout.renew(self.param_groups):
            self._fit_state()
        self._layout.resolve(self.param_groups)

    def _fit_state(self) -> None:
        """Let the state follow its parameters to another device, and start afresh at another shape."""
        changed = []
        params = [p for group in self.param_groups for p in group["params"]]
        for name, p in zip(self._layout.names, params, strict=True):
            if p not in self.state or param_state.fits(self.state[p], p):
                continue
            if self.state[p]["exp_avg"].shape == p.shape:
                self.state[p] = param_state.read(self.rule, name, p, self.state[p], self._state_dtype)
            else:
                self.state[p] = param_state.fresh(self.rule, p, self._state_dtype)
                changed.append(name)
        if changed:
            warnings.warn(f"{changed} changed their shape: what was remembered of them starts afresh", stacklevel=8)

    # ------------------------------------------------------------------------------------- groups, saving and loading

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; a traced symmetry is traced again at the next step.

        Args:
            param_group: `params`, and what differs from the defaults. Parameters that a symmetry given by hand does not
                name get axes of their own.

        Raises:
            ValueError: A hyperparameter is out of range, or the group has other betas than the rule.
        """
        super().add_param_group(self._layout.labelled(param_group, self.param_groups))
        try:
            check_numbers(self.param_groups[-1])
            check_betas(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if len(self.param_groups) > 1:
            self.param_groups[-1] |= {key: self.param_groups[0][key] for key in COUNTERS}
        self._layout.listen()

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer of torch; where gradients are not on a CPU, it waits for the device."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, in the precision of this optimizer's, whatever that of the parameters or of what was saved.

        Where both optimizers were constructed with a module or with named parameters, it is taken over by name: groups
        may be others, and in another order. Otherwise groups must be the same.

        Args:
            state_dict: What `state_dict()` of such an optimizer, or of `torch.optim.AdamW`, returned. What a rule keeps
                besides starts fresh where it is not there.

        Raises:
            ValueError: The state is another model's or another optimizer's; nothing is changed then.
        """
        self._settle()
        loaded: dict[Tensor, ParamState] = {}
        remarks: list[str] = []

        def read(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            arranged = arrange(state_dict, self.param_groups)
            remarks.extend([arranged.remark] if arranged.remark else [])
            params = [p for group in self.param_groups for p in group["params"]]
            for name, p, found in zip(self.names, params, arranged.states, strict=True):
                if found:
                    loaded[p] = param_state.read(self.rule, name, p, found, self._state_dtype)
            groups = []
            for numbers, group in zip(arranged.groups, self.param_groups, strict=True):
                check_numbers(numbers)
                groups.append({**numbers, "params": list(range(len(group["params"])))})
            return {**state_dict, "state": arranged.rest, "param_groups": groups}

        def place(_: torch.optim.Optimizer) -> None:
            self.state.update(loaded)
            self._layout.find_names(self.param_groups)

        before = self.register_load_state_dict_pre_hook(read)  # after those of the user
        after = self.register_load_state_dict_post_hook(place, prepend=True)  # before those of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        for remark in remarks:
            warnings.warn(remark, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        mine = ("rule", "_rule_name", "_compile", "_work", "_state_dtype", "_layout")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in mine}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_cast", {})
        self.__dict__.setdefault("_tensors", {})
        self.__dict__.setdefault("_graphs", StepGraphs())
        self.__dict__.setdefault("_unsettled", None)
        self.__dict__.setdefault("_state_dtype", None)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # which the base class adds here
                    group.setdefault(key, value)
