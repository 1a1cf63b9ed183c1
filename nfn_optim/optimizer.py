"""NFNOptimizer: the update rule behind the interface of `torch.optim.Optimizer`.

There is no mathematics here. A step gathers parameters, gradients and state by name, calls the rule, and writes back:

    update, new_state = rule(params, grads, state, symmetry, lr=..., weight_decay=...)
    p += update          in place, in the dtype of p
    state <- new_state   in place, float32 (float64 for float64 parameters)

What a rule needs besides is the symmetry of the network. It is found at the first step (`nfn_optim.discovery`), so that
only the construction differs from `torch.optim.AdamW`.
"""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nfn_optim.discovery import Discovery, complete, names_of, symmetry_of_calls, unwrap
from nfn_optim.kernel import Kernel, can_compile
from nfn_optim.pretrained import load
from nfn_optim.rule import UpdateRule
from nfn_optim.shards import Shards, everywhere, local
from nfn_optim.symmetry import Symmetry

BETAS = (0.9, 0.999)
PATIENCE = 10**9  # updates of single weights after which compilation has paid
MAX_RESTRICTIONS = 64  # symmetries of parts of the network kept, for steps in which some parameters have no gradient


class Slot(NamedTuple):
    """One parameter at one step."""

    name: str
    param: Tensor
    group: dict[str, Any]


class NFNOptimizer(torch.optim.Optimizer):
    """A learned optimizer; use it as `torch.optim.AdamW`.

    The symmetry of the network is, in this order: `symmetry`; traced from the inputs of the forward passes before the
    first step, of the module given or of whatever modules are found to own the parameters; or none, every dimension of
    every tensor an axis of its own, with one warning. In the last case it is still adopted once a forward is seen.

    The entry `betas` of the groups is there for schedulers that expect one (OneCycleLR, CyclicLR). The decay of the
    moments is part of the rule: a group that is given other betas is refused, and what schedulers write is ignored.

    Numbers are kept in the groups, tensors in `state[p]`, by the names of AdamW; a state of AdamW can be loaded.

    Args:
        params_or_model: A module, or an iterable of parameters, of (name, parameter) pairs or of groups.
        lr: Learning rate in Adam's units, per step; a number or a tensor with one element.
        weight_decay: Decoupled weight decay, per unit of learning rate.
        rule: Name of a pretrained rule, path of one, an `UpdateRule` (kept by reference), or "adamw": AdamW itself.
        model: The module that owns the parameters, where `params_or_model` are groups. Only weakly referenced.
        symmetry: The symmetry of the parameters by name, or in order when the parameters have no names.
        total_steps: The horizon in steps, if known.
        maximize: Ascend instead of descend.
        compile: Whether steps are compiled, which takes some ten seconds once and then some seconds in each process. By
            default they are as soon as that has paid: after `PATIENCE` updates of single weights, 100 steps of ten
            million parameters, and where there is a compiler. Compiled and uncompiled steps differ by rounding.

    Raises:
        ValueError: No parameters, a hyperparameter out of range, or a symmetry or rule that does not fit.
        TypeError: A complex parameter, or an argument of the wrong type.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = NFNOptimizer(model, rule="adamw")
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
    """

    _cast: tuple[tuple[Any, ...], dict[str, Tensor]]  # what theta was cast for, and the result

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
        compile: bool | None = None,
    ) -> None:
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
        for expected, name, value in ((nn.Module, "model", model), (Symmetry, "symmetry", symmetry)):
            if value is not None and not isinstance(value, expected):
                raise TypeError(f"expected {name}= as a {expected.__name__}, found {type(value).__name__}")
        if not isinstance(rule, str | os.PathLike | UpdateRule):
            raise TypeError(f"expected rule= as a name, a path or an UpdateRule, found {type(rule).__name__}")
        self.rule = rule if isinstance(rule, UpdateRule) else load(rule)
        self._rule_name = type(rule).__name__ if isinstance(rule, UpdateRule) else os.fspath(rule)
        self._modules = [] if model is None else [weakref.ref(unwrap(model))]
        self._given = symmetry
        self._compile, self._work = compile, 0
        self._ready = self._warned = self._traced = False
        self._forget_layout()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": BETAS,
            "maximize": maximize,
            "total_steps": total_steps,
            "skipped_steps": 0,
        }
        super().__init__(params_or_model, defaults)
        if symmetry is not None:
            self._adopt(symmetry)
        self._ready = True
        self._listen(model)

    # ------------------------------------------------------------------------------------------------ what it says

    @property
    def symmetry(self) -> Symmetry | None:
        """The symmetry of all parameters by `names`; None before it is known."""
        return self._symmetry

    @property
    def names(self) -> tuple[str, ...]:
        """The name of every parameter in the order of the groups: given, the module's, or "group.index"."""
        return tuple(self._layout())

    @property
    def skipped_steps(self) -> int:
        """Steps not taken because a gradient was not finite, or so large that its square is not."""
        return int(self.param_groups[0]["skipped_steps"])

    @property
    def fallbacks(self) -> int:
        """How often the learned update of one tensor was out of range and the nominal one was taken."""
        return sum(int(s["fallbacks"].sum().item()) for s in self.state.values() if "fallbacks" in s)

    def __repr__(self) -> str:
        return super().__repr__().replace(" (", f" (\nRule {self._rule_name}", 1)

    # -------------------------------------------------------------------------------------------------- the one step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; a step with a non-finite gradient is counted and otherwise leaves everything as it is.

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
        grads = [p.grad for p, _ in everyone if p.grad is not None]
        if not grads:
            return loss
        if not everywhere(_is_usable([local(g) for g in grads]), grads):
            for group in self.param_groups:
                group["skipped_steps"] += 1
            return loss
        self._resolve()
        slots = [Slot(name, *of) for name, of in zip(self._layout(), everyone, strict=True) if of[0].grad is not None]
        for name, p, _ in slots:
            if not self.state[p]:
                self.state[p] = self.rule.init({name: p})[name]
        full = [slot for slot in slots if slot.param.numel() > 0]
        for device in dict.fromkeys(slot.param.device for slot in full):
            self._update([slot for slot in full if slot.param.device == device])
        return loss

    def _update(self, slots: list[Slot]) -> None:
        """Call the rule for parameters of one device and write back what it says."""
        shards = Shards.of({name: p for name, p, _ in slots})
        params = {name: local(p) for name, p, _ in slots}
        grads = {name: local(p.grad, p) for name, p, _ in slots}  # type: ignore[arg-type]
        grads = {name: -grads[name] if group["maximize"] else grads[name] for name, _, group in slots}
        kept = {name: {key: local(value) for key, value in self.state[p].items()} for name, p, _ in slots}
        dtypes = {s["exp_avg"].dtype for s in kept.values()}
        dtype, device = max(dtypes, key=lambda d: d.itemsize), params[slots[0].name].device
        state = {name: {key: value.to(dtype) for key, value in s.items()} for name, s in kept.items()}
        hypers = {
            "lr": _by_name(slots, "lr"),
            "weight_decay": _by_name(slots, "weight_decay"),
            "total_steps": self.param_groups[0]["total_steps"],
            "kernel": self._kernel(sum(p.numel() for p in params.values())),
            "shards": shards,
        }
        with torch.autocast(device.type, enabled=False):
            functional_call(
                self.rule, self._theta(device, dtype), (params, grads, state, self._restricted(params)), hypers
            )
        if len(dtypes) > 1:
            entries = [(value, state[name][key]) for name, s in kept.items() for key, value in s.items()]
            torch._foreach_copy_([old for old, _ in entries], [value for _, value in entries])

    def _kernel(self, weights: int) -> Kernel:
        """How a step runs over so many weights."""
        self._work += weights
        return Kernel(compiled=(self._work > PATIENCE and can_compile()) if self._compile is None else self._compile)

    def _theta(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The rule's tensors where and in which dtype they are needed; empty if that is how they are."""
        theta = {**dict(self.rule.named_parameters()), **dict(self.rule.named_buffers())}
        if all(t.device == device and t.dtype in (dtype, torch.int64, torch.bool) for t in theta.values()):
            return {}
        key = (device, dtype, *((id(t), t._version) for t in theta.values()))
        if self._cast[0] != key:
            cast = {n: t.detach().to(device, dtype if t.is_floating_point() else None) for n, t in theta.items()}
            self._cast = key, cast
        return self._cast[1]

    # ------------------------------------------------------------------------------------------- names and symmetry

    def _forget_layout(self) -> None:
        """Forget what can be found again: whose name is which, and what derives from it."""
        self._ids: list[int] = []
        self._names: list[str] = []
        self._symmetry: Symmetry | None = None
        self._restrictions: dict[frozenset[str], Symmetry] = {}
        self._cast = (), {}
        self._discovery: Discovery | None = None

    def _listen(self, model: nn.Module | None = None) -> None:
        """Wait for a forward pass unless the symmetry is known or makes no difference."""
        if self._ready and self._given is None and self.rule.learns and self._discovery is None:
            self._discovery = Discovery(model)

    def _layout(self) -> list[str]:
        """A name for every parameter, found again when the parameters in the groups have changed."""
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [id(p) for p in params]
        if ids == self._ids:
            return self._names
        modules = [module for ref in self._modules if (module := ref()) is not None]
        names = names_of(self.param_groups, modules, self._names)
        self._ids, self._names = ids, names
        if self._symmetry is not None and set(names) != set(self._symmetry.dims):
            self._symmetry = complete(self._symmetry, dict(zip(names, params, strict=True)))
        self._restrictions.clear()
        return names

    def _named(self) -> dict[str, Tensor]:
        """All parameters by name."""
        return dict(zip(self._layout(), (p for group in self.param_groups for p in group["params"]), strict=True))

    def _adopt(self, symmetry: Symmetry) -> None:
        """Take a symmetry given by hand.

        Raises:
            ValueError: It does not name all parameters, or a shape does not fit.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        if not self._modules and not any("param_names" in group for group in self.param_groups):
            if len(symmetry.dims) != len(params):
                raise ValueError(
                    f"expected a symmetry of {len(params)} tensors, one for each parameter in order, found "
                    f"{len(symmetry.dims)}; pass model= or model.named_parameters() to match them by name"
                )
            self._ids, self._names = [id(p) for p in params], list(symmetry.dims)
        named = self._named()
        if missing := [name for name in named if name not in symmetry.dims]:
            raise ValueError(
                f"expected the symmetry to name every parameter, {missing} are not among {list(symmetry.dims)}; "
                f"trace the whole model, or rename with symmetry.rename"
            )
        restricted = symmetry.restrict(named)
        restricted.check(named)
        self._symmetry = restricted

    def _resolve(self) -> None:
        """Make sure that there is a symmetry: the one traced from the calls heard so far, or separate axes."""
        if self._discovery is None and self._symmetry is not None:
            return
        params = self._named()
        if self._discovery is not None and (calls := self._discovery.calls_that_own(params.values())):
            self._discovery.close()
            self._discovery = None
            if not self._modules:
                self._modules, self._ids, self._symmetry = [weakref.ref(call.module) for call in calls], [], None
                params = self._named()
            self._symmetry, self._traced = symmetry_of_calls(calls, params), True
            self._restrictions.clear()
        if self._symmetry is None:
            self._symmetry = Symmetry.separate({name: p.shape for name, p in params.items()})
        waiting = self._discovery is not None and not self._traced
        if waiting and not self._warned and any(_moves(group) for group in self.param_groups):
            self._warned = True
            warnings.warn(
                "no forward pass of a module that owns these parameters was seen before step(): the optimizer works, "
                "but treats every tensor by itself. Use NFNOptimizer(model), or model= with groups, and call the model "
                "before the first step, or pass symmetry=.",
                stacklevel=5,  # the caller of step, outside of torch's two wrappers
            )

    def _restricted(self, names: Iterable[str]) -> Symmetry:
        """The symmetry of some of the parameters."""
        assert self._symmetry is not None
        key = frozenset(names)
        if key not in self._restrictions:
            if len(self._restrictions) >= MAX_RESTRICTIONS:
                self._restrictions.clear()
            self._restrictions[key] = self._symmetry.restrict(name for name in self._layout() if name in key)
        return self._restrictions[key]

    # ------------------------------------------------------------------------------------- groups, saving and loading

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; a traced symmetry is traced again at the next step.

        Args:
            param_group: `params`, and what differs from the defaults. Parameters that a symmetry given by hand does not
                name get axes of their own.

        Raises:
            ValueError: A hyperparameter is out of range, or the group has other betas than the rule.
            TypeError: A parameter is complex.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if len(self.param_groups) > 1:
            self.param_groups[-1]["skipped_steps"] = self.skipped_steps
        self._listen()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, in full precision whatever the dtype of the parameters.

        Args:
            state_dict: What `state_dict()` of such an optimizer, or of `torch.optim.AdamW`, returned. What a rule keeps
                besides starts fresh where it is not there.

        Raises:
            ValueError: The state is another model's or another optimizer's; nothing is changed then.
        """
        loaded: dict[Tensor, dict[str, Tensor]] = {}

        def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            loaded.update(self._read(state_dict))
            return {**state_dict, "state": {}}

        def place(_: torch.optim.Optimizer) -> None:
            self.state.update(loaded)

        before = self.register_load_state_dict_pre_hook(check)  # after those of the user
        after = self.register_load_state_dict_post_hook(place, prepend=True)  # before those of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _read(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """Copy the state of every parameter out of a state dict, or raise."""
        groups, saved = self.param_groups, state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved]:
            return {}  # the base class says so
        keys = [key for g in saved for key in g["params"]]
        params = [p for g in groups for p in g["params"]]
        loaded = {}
        for name, key, p in zip(self._layout(), keys, params, strict=True):
            if not (found := state_dict["state"].get(key)):
                continue
            loaded[p] = fresh = self.rule.init({name: p})[name]
            if unknown := [entry for entry in found if entry not in fresh]:
                raise ValueError(
                    f"expected the state {list(fresh)} for {name!r}, found also {unknown}; "
                    f"load it into an optimizer with the rule that it was saved with"
                )
            for entry, value in found.items():
                tensor = torch.as_tensor(value)
                if tensor.shape != fresh[entry].shape:
                    raise ValueError(
                        f"expected {entry!r} of {name!r} of shape {tuple(fresh[entry].shape)}, found "
                        f"{tuple(tensor.shape)}; the state was saved for another model"
                    )
                fresh[entry].copy_(tensor)
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        mine = (
            "rule",
            "_rule_name",
            "_compile",
            "_work",
            "_given",
            "_ready",
            "_warned",
            "_traced",
            "_names",
            "_symmetry",
        )
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in mine}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "rule" in state:  # a copy or an unpickled one, not a state dict being loaded
            self._forget_layout()
            self._modules = []
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # which the base class adds here
                    group.setdefault(key, value)
        if "rule" in state and not self._traced:
            self._listen()


def _check_group(group: Mapping[str, Any]) -> None:
    """Raise unless a group can be optimized."""
    for key in ("lr", "weight_decay"):
        value = group[key]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"expected {key} as a number or a tensor with one element, found {tuple(value.shape)}")
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"expected {key} >= 0 and finite, found {value}; to ascend use maximize=True")
    if (total := group["total_steps"]) is not None and (isinstance(total, bool) or int(total) != total or total < 1):
        raise ValueError(f"expected total_steps as a positive whole number of steps or None, found {total!r}")
    if tuple(group["betas"]) != BETAS:
        raise ValueError(
            f"expected betas {BETAS}, found {group['betas']}; the decay of the moments is part of the rule: "
            f"leave betas out of the groups"
        )
    for p in group["params"]:
        if p.is_complex():
            raise TypeError(f"expected real parameters, found {p.dtype}; optimize torch.view_as_real of it")


def _is_usable(grads: list[Tensor]) -> bool:
    """Whether all gradients are finite and so are their squares, in the precision of the state. One synchronization.

    Raises:
        RuntimeError: A gradient is sparse.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in grads:
        if g.layout != torch.strided:
            raise RuntimeError(
                f"NFNOptimizer does not support sparse gradients: expected dense ones, found {g.layout} of shape "
                f"{tuple(g.shape)}; build the embedding with sparse=False or give it to torch.optim.SparseAdam"
            )
        if g.numel() > 0:
            kinds.setdefault((g.device, g.dtype), []).append(g)
    for (_, dtype), dense in kinds.items():
        precise = torch.promote_types(dtype, torch.float32)
        if not torch.stack(torch._foreach_norm(dense, dtype=precise)).sum().isfinite().item():  # which is fast ...
            largest = torch.stack(torch._foreach_norm(dense, math.inf)).max().item()  # ... and may overflow
            if not largest < math.sqrt(torch.finfo(precise).max):
                return False
    return True


def _moves(group: Mapping[str, Any]) -> bool:
    """Whether a step can change the parameters of a group; at a learning rate of 0 it must not, to the last bit."""
    return isinstance(group["lr"], Tensor) or group["lr"] != 0


def _by_name(slots: list[Slot], key: str) -> Any:
    """A hyperparameter: one value if the groups agree, else by name."""
    first = slots[0].group[key]
    if all(slot.group is slots[0].group or _same(slot.group[key], first) for slot in slots):
        return first
    return {slot.name: slot.group[key] for slot in slots}


def _same(a: object, b: object) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
