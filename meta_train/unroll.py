"""Inner training under a rule, differentiable with respect to theta.

    loss_k = loss(p_k, batch_k)       g_k = d loss_k / d p_k       p_{k+1} = p_k + rule(p_k, g_k, state_k)

for all members of a task at once. The inner gradient is that of the sum of the vmapped losses, which are independent:
cheaper than a gradient inside `vmap`, and the same numbers. Theta is shared by all members or has a member dimension.

With `segment`, activations are stored at segment boundaries only and recomputed in the backward pass: a window of k
steps in segments of s takes the memory of k/s + s steps and one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from meta_train.imitation import Expert, disagreement
from meta_train.objective import divergence_threshold
from meta_train.recompute import recomputed
from meta_train.tasks import Params, Task, Tensors
from nfn_optim.engine.moments import State
from nfn_optim.rule import UpdateRule
from nfn_optim.rule.members import forms_of

LR = 1e-3  # the learning rate at which rules are meta-trained, the optimizer's default


@dataclass(frozen=True)
class Carry:
    """The state of inner training between two windows.

    Attributes:
        params: `(members, *shape)`.
        state: The rule's.
        member: Data that distinguishes the members.
        total_steps: `(members,)`, the horizon for members whose rule knows it, else 0.
        first_loss: `(members,)`, the loss before the first step.
        alive: `(members,)`, False once a member has diverged.
        steps: Steps taken.
        horizon: Steps after which the inner run ends.
        copies: Copies of every member, concatenated along the member dimension; they see the same batches. Antithetic
            copies in evolution strategies.
        accumulated_perturbation: `(members / copies, size of theta)`, sum of the perturbations over the windows so
            far; of persistent evolution strategies only, else None.
    """

    params: Params
    state: State
    member: Tensors
    total_steps: Tensor
    first_loss: Tensor
    alive: Tensor
    steps: int
    horizon: int
    copies: int = 1
    accumulated_perturbation: Tensor | None = None

    def detach(self) -> Carry:
        """The same values without their autograd history."""
        params = {name: p.detach() for name, p in self.params.items()}
        state = {name: {key: value.detach() for key, value in s.items()} for name, s in self.state.items()}
        return replace(self, params=params, state=state)


@dataclass(frozen=True)
class Unrolling:
    """Options of inner training.

    Args:
        lr: Learning rate of the rule, per step; a number or `(members,)`.
        second_order: Whether to differentiate inner gradients too.
        segment: Steps between stored activations; 0 stores all.
        held_out: Whether losses are measured on held-out data, instead of the training batches.
        expert: Optimizer whose updates are compared with the rule's, or None.
    """

    lr: float | Tensor = LR
    second_order: bool = True
    segment: int = 0
    held_out: bool = False
    expert: Expert | None = None


@dataclass(frozen=True)
class Window:
    """The result of some steps of inner training.

    Attributes:
        losses: `(steps, members)`, after the first step, ..., after the last.
        carry: The state of inner training after the last step.
        mean_params: The mean of the parameters after the steps of the second half, `(members, *shape)` by name.
        disagreement: `(members,)`, with the expert, mean over steps; 0 without an expert.
    """

    losses: Tensor
    carry: Carry
    mean_params: Params
    disagreement: Tensor


def start(
    rule: UpdateRule, task: Task, members: int, horizon: int, generator: torch.Generator, *, copies: int = 1
) -> Carry:
    """Start an inner run; each member's rule knows the horizon with probability one half.

    Args:
        rule: The update rule.
        task: The task to train.
        members: Number of members, copies included.
        horizon: Steps after which the run ends.
        generator: The only source of randomness.
        copies: Copies of every member in the carry.

    Raises:
        ValueError: The number of members is not a multiple of the copies.
    """
    if members % copies or members < 1:
        raise ValueError(f"expected a number of members that is a multiple of {copies}, found {members}")
    return _initial_carry(rule, task, *task.draw(members // copies, generator), horizon, generator, copies)


def warm_start(rule: UpdateRule, task: Task, carry: Carry, horizon: int, generator: torch.Generator) -> Carry:
    """Start an inner run from the final parameters of another one, with a new optimizer state.

    Args:
        rule: The update rule.
        task: The task of the other run.
        carry: Its final state; of copies the first one is used.
        horizon: Steps after which the new run ends.
        generator: The only source of randomness.
    """
    count = len(carry.total_steps) // carry.copies
    params = {name: p[:count] for name, p in carry.params.items()}
    member = {name: value[:count] for name, value in carry.member.items()}
    return _initial_carry(rule, task, params, member, horizon, generator, carry.copies)


def _initial_carry(
    rule: UpdateRule, task: Task, params: Params, member: Tensors, horizon: int, generator: torch.Generator, copies: int
) -> Carry:
    count = len(next(iter(params.values())))
    total_steps = (torch.rand(count, generator=generator) < 0.5) * float(horizon)  # noqa: PLR2004
    with torch.no_grad():
        first_loss = task.losses(params, member, task.batch(count, generator))
    params = _repeat_members(params, copies)
    return Carry(
        params=params,
        state=rule.init(params, batch_dims=1, forms=forms_of(task.symmetry)),
        member=_repeat_members(member, copies),
        total_steps=total_steps.to(first_loss.device).repeat(copies),
        first_loss=first_loss.repeat(copies),
        alive=first_loss.isfinite().repeat(copies),
        steps=0,
        horizon=horizon,
        copies=copies,
    )


def draw_batch(task: Task, carry: Carry, generator: torch.Generator, *, held_out: bool = False) -> Tensors:
    """Draw a batch for every member; copies get the same."""
    batch = task.batch(len(carry.total_steps) // carry.copies, generator, held_out=held_out)
    return _repeat_members(batch, carry.copies)


def unroll(
    rule: UpdateRule,
    task: Task,
    carry: Carry,
    steps: int,
    generator: torch.Generator,
    *,
    theta: dict[str, Tensor] | None = None,
    unrolling: Unrolling = Unrolling(),
) -> Window:
    """Train for some steps; with gradients enabled, the result is differentiable with respect to theta.

    Args:
        rule: The update rule.
        task: The task to train.
        carry: The state to start from; not changed.
        steps: Number of steps.
        generator: Of the batches.
        theta: The rule's parameters, `(*shape)` or `(members, *shape)` by name; by default its own.
        unrolling: Options of inner training.
    """
    differentiable = torch.is_grad_enabled()
    tail = steps - steps // 2
    theta = dict(rule.named_parameters()) if theta is None else theta
    rates = {"lr": unrolling.lr}

    def segment(
        batches: Sequence[tuple[Tensors, Tensors]],
        weights: Sequence[float],
        first_step: int,
        params: Params,
        state: State,
        theta: dict[str, Tensor],
        rates: dict[str, Tensor | float],
    ) -> tuple[Params, State, list[Tensor], list[Tensor], Params]:
        losses, disagreements = [], []
        mean: Params = {}
        for step, ((batch, held_out_batch), weight) in enumerate(zip(batches, weights, strict=True), first_step):
            loss, grads = _inner_gradient(task, params, carry.member, batch, unrolling.second_order)
            options = {**rates, "total_steps": carry.total_steps, "batch_dims": 1, "refresh": rule.refreshes(step)}
            update, state = functional_call(rule, theta, (params, grads, state, task.symmetry), options)
            params = {name: p + update[name] for name, p in params.items()}
            losses.append(task.losses(params, carry.member, held_out_batch) if unrolling.held_out else loss)
            if unrolling.expert is not None:
                disagreements.append(disagreement(unrolling.expert, update, state, unrolling.lr))
            if weight:
                mean = {name: mean[name] + p * weight if mean else p * weight for name, p in params.items()}
        return params, state, losses, disagreements, mean

    params, state = carry.params, carry.state
    losses: list[Tensor] = []
    disagreements: list[Tensor] = []
    mean: Params = {}
    length = unrolling.segment or (steps if differentiable else 1)
    call = recomputed if differentiable and unrolling.segment else _call
    for first in range(0, steps, length):
        span = range(first, min(first + length, steps))
        batches = [
            (
                draw_batch(task, carry, generator),
                draw_batch(task, carry, generator, held_out=True) if unrolling.held_out else {},
            )
            for _ in span
        ]
        weights = [1 / tail if step >= steps - tail else 0.0 for step in span]
        run = partial(segment, batches, weights, carry.steps + first)
        params, state, new_losses, new_disagreements, partial_mean = call(run, params, state, theta, rates)
        losses, disagreements = losses + new_losses, disagreements + new_disagreements
        if partial_mean:
            mean = {name: mean[name] + value if mean else value for name, value in partial_mean.items()}
    if not unrolling.held_out:  # the loss before a step is the loss after the step before, on the next batch
        losses = [*losses[1:], task.losses(params, carry.member, draw_batch(task, carry, generator))]
    stacked = torch.stack(losses)
    alive = carry.alive & (stacked[-1].detach() < divergence_threshold(carry.first_loss))  # False for NaN
    end = replace(carry, params=params, state=state, steps=carry.steps + steps, alive=alive)
    mean_disagreement = torch.stack(disagreements).mean(0) if disagreements else torch.zeros_like(carry.first_loss)
    return Window(stacked, end, mean, mean_disagreement)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function and store its activations; the counterpart of `recomputed`."""
    return function(*args)


def _inner_gradient(
    task: Task, params: Params, member: Tensors, batch: Tensors, second_order: bool
) -> tuple[Tensor, Params]:
    """The loss of every member, `(members,)`, and the gradients by name."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in params.items()}
        loss = task.losses(leaves, member, batch)
        grads = torch.autograd.grad(
            loss.sum(),
            list(leaves.values()),
            create_graph=differentiable and second_order,
            retain_graph=differentiable,
        )
    return loss if differentiable else loss.detach(), dict(zip(params, grads, strict=True))


def _repeat_members(tensors: Tensors, copies: int) -> Tensors:
    """Copies of all members, concatenated. `(count, ...) -> (copies * count, ...)`."""
    return {name: value.repeat(copies, *(1,) * (value.dim() - 1)) for name, value in tensors.items()}
