"""NFNOptimizer inside `higher`: training of any module as a function of theta, initial weights, learning rate and data.

    register()
    with higher.innerloop_ctx(model, optimizer, override={"theta": [theta]}) as (fmodel, diffopt):
        for x, y in batches:
            diffopt.step(loss(fmodel(x), y))
        loss(fmodel(x_held), y_held).backward()        to theta, and whatever else requires gradients
        diffopt.write_back()                           model and optimizer now stand where the inner loop ended

A step calls the same rule as `NFNOptimizer.step`, with gradients on; there is no mathematics here. `higher` copies
groups, state, weights and buffers when the context is entered, so entering it anew for every window of a long run
truncates the history, and `write_back` carries the run over. Moments are in full precision inside, whatever the
optimizer's `state_dtype`; `write_back` rounds them to the nearest. What `override` may name, besides the entries of
groups:

    theta           a mapping from names of the rule's tensors to what takes their place; by default the rule's own
                    tensors, which get gradients themselves where they require them
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

from nfn_optim.optimizer import state as param_state
from nfn_optim.optimizer.discovery import unwrap
from nfn_optim.optimizer.gradient_check import is_usable
from nfn_optim.optimizer.optimizer import NFNOptimizer
from nfn_optim.optimizer.param_groups import COUNTERS


class Entry(NamedTuple):
    """One parameter at one step: its group, the states of that, its number in both, and its gradient."""

    group: dict[str, Any]
    states: dict[int, dict[str, Tensor]]
    number: int
    grad: Tensor

    @property
    def param(self) -> Tensor:
        """The parameter."""
        p: Tensor = self.group["params"][self.number]
        return p


def register() -> None:
    """Make `higher` know `NFNOptimizer`; once is enough, twice does no harm."""
    higher.register_optim(NFNOptimizer, DifferentiableNFNOptimizer)


class DifferentiableNFNOptimizer(higher.optim.DifferentiableOptimizer):  # type: ignore[misc]
    """What `higher` makes of an `NFNOptimizer`. It takes the same steps, and skips the same ones.

    The symmetry is the optimizer's; where that has seen no forward pass yet, it is traced from the first one of the
    functional module, and the optimizer keeps it.

    Args:
        other: The optimizer, left as it is until `write_back`.
        reference_params: The parameters of the module, in its order.
        *args: As `higher.optim.DifferentiableOptimizer` has them.
        **kwargs: Likewise.
    """

    def __init__(self, other: NFNOptimizer, reference_params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        reference_params = list(reference_params)
        super().__init__(other, reference_params, *args, **kwargs)
        self._optimizer = other
        self._reference = reference_params
        self._newest: Sequence[Tensor] = [p.detach() for p in reference_params]

    def step(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Take one differentiable step.

        Args:
            *args: The loss, 0-d, and more as `higher.optim.DifferentiableOptimizer.step` has it.
            **kwargs: Likewise.

        Returns:
            The new parameters, in the order of the module.
        """
        self._newest = super().step(*args, **kwargs)
        return list(self._newest)

    @torch.no_grad()
    def write_back(self) -> None:
        """Set the module's parameters and buffers, and the optimizer's state, to where the inner loop stands now."""
        for p, newest in zip(self._reference, self._newest, strict=True):
            p.copy_(newest)
        if self._fmodel is not None:
            module = unwrap(self._fmodel)
            for name, part in self._fmodel.named_modules(remove_duplicate=False):
                theirs = module.get_submodule(name)._buffers
                for key, buffer in part._buffers.items():
                    if (old := theirs[key]) is not None:
                        old.copy_(buffer)
        for group, real, states in zip(self.param_groups, self._optimizer.param_groups, self.state, strict=True):
            real |= {key: int(group[key]) for key in COUNTERS}
            for i, state in states.items():
                p = real["params"][i]
                kept_in = self._optimizer._state_dtype
                self._optimizer.state[p] = param_state.read(self._optimizer.rule, f"{i}", p, state, kept_in)

    def _update(self, grouped_grads: Sequence[Sequence[Tensor | None]], **_: Any) -> None:
        """Replace parameters and state by what the rule makes of them; called by `step`."""
        self._optimizer._resolve()
        entries = self._entries(grouped_grads)
        if not entries:
            return
        if not is_usable([entry.grad.detach() for entry in entries.values()]):
            for group in self.param_groups:
                group["skipped_steps"] += 1
            return
        for device in dict.fromkeys(entry.param.device for entry in entries.values()):
            self._advance({name: entry for name, entry in entries.items() if entry.param.device == device}, device)
        for group in self.param_groups:
            group["steps_taken"] = group["steps_taken"] + 1

    def _entries(self, grouped_grads: Sequence[Sequence[Tensor | None]]) -> dict[str, Entry]:
        """The parameters that have a gradient, by name; what is frozen has none, though `higher` may thaw it."""
        entries = {}
        names = iter(self._optimizer.names)
        reference = (p for group in self._optimizer.param_groups for p in group["params"])
        for group, states, grads in zip(self.param_groups, self.state, grouped_grads, strict=True):
            for i, g in enumerate(grads):
                name, trained = next(names), next(reference).requires_grad
                if g is not None and trained and g.numel():
                    grad = g if group.get("second_order", True) else g.detach()
                    entries[name] = Entry(group, states, i, -grad if group["maximize"] else grad)
        return entries

    def _advance(self, entries: dict[str, Entry], device: torch.device) -> None:
        """Call the rule for parameters of one device."""
        optimizer, symmetry = self._optimizer, self._optimizer.symmetry
        assert symmetry is not None
        params = {name: entry.param for name, entry in entries.items()}
        fresh = optimizer.rule.init(params)
        state = {name: entry.states[entry.number] or fresh[name] for name, entry in entries.items()}
        dtype = max((s["step"].dtype for s in state.values()), key=lambda d: d.itemsize)
        state = {name: {key: value.to(dtype) for key, value in s.items()} for name, s in state.items()}
        grads = {name: entry.grad for name, entry in entries.items()}
        hypers: dict[str, Any] = {
            key: {n: entry.group[key] for n, entry in entries.items()} for key in ("lr", "weight_decay")
        }
        hypers["total_steps"] = self.param_groups[0]["total_steps"]
        hypers["talk"] = optimizer.rule.talks(int(self.param_groups[0]["steps_taken"]))
        symmetry = symmetry if params.keys() == symmetry.dims.keys() else symmetry.restrict(params)
        with torch.set_grad_enabled(self._track_higher_grads), torch.autocast(device.type, enabled=False):
            theta = self._theta(device, dtype)
            update, new = functional_call(optimizer.rule, theta, (params, grads, state, symmetry), hypers)
        for name, (group, states, i, _) in entries.items():
            group["params"][i] = (params[name] + update[name]).to(params[name].dtype)
            states[i] = new[name]

    def _theta(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The rule's tensors, or what was put in their place, where and in which dtype they are needed."""
        rule, given = self._optimizer.rule, self.param_groups[0].get("theta", {})
        theta = {**dict(rule.named_parameters()), **dict(rule.named_buffers())}
        if unknown := [name for name in given if name not in theta]:
            raise ValueError(f"expected names of the rule's tensors in theta, found {unknown}; it has {list(theta)}")
        return {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in {**theta, **given}.items()}
