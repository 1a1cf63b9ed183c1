"""NFNOptimizer inside `higher`: training of any module as a function of theta, initial weights, learning rate and data.

    register()
    with higher.innerloop_ctx(model, optimizer, override={"theta": [theta]}) as (fmodel, diffopt):
        for x, y in batches:
            diffopt.step(loss(fmodel(x), y))
        loss(fmodel(x_held), y_held).backward()        to theta, and whatever else requires gradients
        diffopt.write_back()                           model and optimizer now stand where the inner loop ended

A step calls the same rule as `NFNOptimizer.step`, differentiably; there is no mathematics here. `higher` copies
groups, state, weights and buffers when the context is entered, so entering it anew for every window of a long run
truncates the history, and `write_back` carries the run over. Moments are in full precision inside, whatever the
optimizer's `state_dtype`; `write_back` rounds them to nearest. `override` accepts, besides the entries of groups:

    theta           a mapping from names of the rule's tensors to replacements; by default the rule's own tensors,
                    which receive gradients where they require them
    second_order    whether the gradient of the inner loss is differentiated too, by default True

References:
    Generalized Inner Loop Meta-Learning (Grefenstette et al., 2019), arXiv:1910.01727
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import higher
import torch
from torch import Tensor
from torch.func import functional_call

from nfn_optim.optimizer.gradient_check import grads_finite
from nfn_optim.optimizer.optimizer import NFNOptimizer
from nfn_optim.optimizer.param_groups import COUNTERS
from nfn_optim.optimizer.state import ParamState, entries_of, read_state
from nfn_optim.optimizer.wrapper import unwrap
from nfn_optim.rule.members import forms_of


class DifferentiableSlot(NamedTuple):
    """One parameter at one step: its group, the states of the group, its index in both, and its gradient."""

    group: dict[str, Any]
    states: dict[int, dict[str, Tensor]]
    position: int
    grad: Tensor

    @property
    def param(self) -> Tensor:
        """The parameter."""
        p: Tensor = self.group["params"][self.position]
        return p


def register() -> None:
    """Make `higher` know `NFNOptimizer`; once is enough, twice does no harm."""
    higher.register_optim(NFNOptimizer, DifferentiableNFNOptimizer)


class DifferentiableNFNOptimizer(higher.optim.DifferentiableOptimizer):  # type: ignore[misc]
    """The differentiable counterpart of an `NFNOptimizer` in `higher`. It takes and skips the same steps.

    The symmetry is the optimizer's; if that has seen no forward pass yet, it is traced from the first one of the
    functional
    module, and the optimizer adopts it.

    Args:
        other: The optimizer, unchanged until `write_back`.
        reference_params: The parameters of the module, in its order.
        *args: As of `higher.optim.DifferentiableOptimizer`.
        **kwargs: Likewise.
    """

    def __init__(self, other: NFNOptimizer, reference_params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        reference_params = list(reference_params)
        super().__init__(other, reference_params, *args, **kwargs)
        for group, states in zip(other.param_groups, self.state, strict=True):
            for i, p in enumerate(group["params"]):
                if isinstance(state := other.state.get(p), ParamState):  # the loop that copied it met no hidden entries
                    states[i] |= {key: value.clone() for key, value in state.hidden.items()}
        self._optimizer = other
        self._reference = reference_params
        self._newest: Sequence[Tensor] = [p.detach() for p in reference_params]

    def step(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Take one differentiable step.

        Args:
            *args: The loss, 0-d, and more as of `higher.optim.DifferentiableOptimizer.step`.
            **kwargs: Likewise.

        Returns:
            The new parameters, in the order of the module.
        """
        self._newest = super().step(*args, **kwargs)
        return list(self._newest)

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy parameters, buffers and state of the inner loop to the module and the optimizer."""
        for p, newest in zip(self._reference, self._newest, strict=True):
            p.copy_(newest)
        if self._fmodel is not None:
            module = unwrap(self._fmodel)
            for name, part in self._fmodel.named_modules(remove_duplicate=False):
                buffers = module.get_submodule(name)._buffers
                for key, buffer in part._buffers.items():
                    if (old := buffers[key]) is not None:
                        old.copy_(buffer)
        for group, real, states in zip(self.param_groups, self._optimizer.param_groups, self.state, strict=True):
            real |= {key: int(group[key]) for key in COUNTERS}
            for i, state in states.items():
                p = real["params"][i]
                outer, state_dtype = self._optimizer.state.get(p) or {}, self._optimizer._state_dtype
                foreign = {key: value for key, value in outer.items() if key not in state}
                read = read_state(self._optimizer.rule, f"{i}", p, state, state_dtype)
                self._optimizer.state[p] = ParamState({**foreign, **entries_of(read)})

    def _update(self, grouped_grads: Sequence[Sequence[Tensor | None]], **_: Any) -> None:
        """Replace parameters and state by those after a step of the rule; called by `step`."""
        self._optimizer._resolve()
        slots = self._slots(grouped_grads)
        if not slots:
            return
        if not grads_finite([slot.grad.detach() for slot in slots.values()]):
            for group in self.param_groups:
                group["skipped_steps"] += 1
            return
        for device in dict.fromkeys(slot.param.device for slot in slots.values()):
            self._step({name: slot for name, slot in slots.items() if slot.param.device == device}, device)
        for group in self.param_groups:
            group["steps_taken"] = group["steps_taken"] + 1

    def _slots(self, grouped_grads: Sequence[Sequence[Tensor | None]]) -> dict[str, DifferentiableSlot]:
        """The parameters with a gradient, by name; frozen ones have none, even if `higher` unfreezes them."""
        slots = {}
        names = iter(self._optimizer.names)
        reference = (p for group in self._optimizer.param_groups for p in group["params"])
        for group, states, grads in zip(self.param_groups, self.state, grouped_grads, strict=True):
            for i, g in enumerate(grads):
                name, trained = next(names), next(reference).requires_grad
                if g is not None and trained and g.numel():
                    grad = g if group.get("second_order", True) else g.detach()
                    slots[name] = DifferentiableSlot(group, states, i, -grad if group["maximize"] else grad)
        return slots

    def _step(self, slots: dict[str, DifferentiableSlot], device: torch.device) -> None:
        """Call the rule for the parameters of one device."""
        optimizer, symmetry = self._optimizer, self._optimizer.symmetry
        assert symmetry is not None
        params = {name: slot.param for name, slot in slots.items()}
        state = {}
        for name, initial in optimizer.rule.init(params, forms=forms_of(symmetry)).items():
            found = slots[name].states[slots[name].position]
            fitting = {k: x for k, x in found.items() if k in initial and x.shape == initial[k].shape}
            state[name] = initial | fitting  # coefficients start afresh where the symmetry was not known before
        dtype = max((s["step"].dtype for s in state.values()), key=lambda d: d.itemsize)
        state = {name: {key: value.to(dtype) for key, value in s.items()} for name, s in state.items()}
        grads = {name: slot.grad for name, slot in slots.items()}
        hypers: dict[str, Any] = {
            key: {n: slot.group[key] for n, slot in slots.items()} for key in ("lr", "weight_decay")
        }
        hypers["total_steps"] = self.param_groups[0]["total_steps"]
        hypers["refresh"] = optimizer.rule.refreshes(int(self.param_groups[0]["steps_taken"]))
        symmetry = symmetry if params.keys() == symmetry.dims.keys() else symmetry.restrict(params)
        with torch.set_grad_enabled(self._track_higher_grads), torch.autocast(device.type, enabled=False):
            theta = self._theta(device, dtype)
            update, new = functional_call(optimizer.rule, theta, (params, grads, state, symmetry), hypers)
        for name, (group, states, i, _) in slots.items():
            group["params"][i] = (params[name] + update[name]).to(params[name].dtype)
            states[i] = new[name]

    def _theta(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The rule's tensors, or their replacements, on a device and in a dtype."""
        rule, given = self._optimizer.rule, self.param_groups[0].get("theta", {})
        theta = {**dict(rule.named_parameters()), **dict(rule.named_buffers())}
        if unknown := [name for name in given if name not in theta]:
            raise ValueError(f"expected names of the rule's tensors in theta, found {unknown}; it has {list(theta)}")
        return {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in {**theta, **given}.items()}
