"""Inner training under a rule, differentiable with respect to theta.

    loss_k = loss(p_k, batch_k)       g_k = d loss_k / d p_k       p_{k+1} = p_k + rule(p_k, g_k, state_k)

for all members of a task at once. The inner gradient is that of the sum of the vmapped losses, which are independent:
cheaper than a gradient inside `vmap`, and the same numbers. Theta may be one for all members or one for each.

With `segment`, activations are kept at the borders of segments only and computed again on the way back: a window of k
steps in segments of s needs the memory of k/s + s steps and one more forward pass.
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
from meta_train.objective import worst
from meta_train.recompute import replayed
from meta_train.tasks import Params, Task, Tensors
from nfn_optim.engine.moments import State
from nfn_optim.rule import UpdateRule

LR = 1e-3  # the learning rate at which rules are meta-trained, the optimizer's default


@dataclass(frozen=True)
class Carry:
    """What survives from one window to the next.

    Attributes:
        params: `(members, *shape)`.
        state: The rule's.
        member: What distinguishes the members.
        total_steps: `(members,)`, the horizon where the member's rule is told, else 0.
        first_loss: `(members,)`, the loss before the first step.
        alive: `(members,)`, False from where a member diverged.
        steps: Steps taken.
        horizon: Steps after which the inner run ends.
        copies: How often every member stands in it, all of them one after the other; copies see the same batches.
        drift: `(members / copies, size of theta)`, the perturbations summed over the windows so far; of evolution
            strategies only, else None.
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
    drift: Tensor | None = None

    def detach(self) -> Carry:
        """The same numbers without their history."""
        params = {name: p.detach() for name, p in self.params.items()}
        state = {name: {key: value.detach() for key, value in s.items()} for name, s in self.state.items()}
        return replace(self, params=params, state=state)


@dataclass(frozen=True)
class Unrolling:
    """How inner training is carried out.

    Args:
        lr: Learning rate that the rule is given, per step; a number or `(members,)`.
        second_order: Whether inner gradients are differentiated too.
        segment: Steps between two points at which activations are kept; 0 keeps all.
        held_out: Whether losses are measured on data that is held out, instead of the batches trained on.
        expert: Optimizer whose updates are compared with the rule's, or None.
    """

    lr: float | Tensor = LR
    second_order: bool = True
    segment: int = 0
    held_out: bool = False
    expert: Expert | None = None


@dataclass(frozen=True)
class Window:
    """What came of some steps.

    Attributes:
        losses: `(steps, members)`, after the first step, ..., after the last.
        carry: Where inner training stands now.
        mean_params: The mean of the parameters after the steps of the second half, `(members, *shape)` by name.
        disagreement: `(members,)`, with the expert, mean over steps; 0 without one.
    """

    losses: Tensor
    carry: Carry
    mean_params: Params
    disagreement: Tensor


def start(
    rule: UpdateRule, task: Task, members: int, horizon: int, generator: torch.Generator, *, copies: int = 1
) -> Carry:
    """Begin an inner run; every member is told its horizon with probability one half.

    Args:
        rule: The update rule.
        task: What is trained.
        members: How many, copies included.
        horizon: Steps after which the run ends.
        generator: Of everything random.
        copies: How often every member is to stand in the carry.

    Raises:
        ValueError: The members are not a multiple of the copies.
    """
    if members % copies or members < 1:
        raise ValueError(f"expected a number of members that is a multiple of {copies}, found {members}")
    return _begun(rule, task, *task.draw(members // copies, generator), horizon, generator, copies)


def restart(rule: UpdateRule, task: Task, carry: Carry, horizon: int, generator: torch.Generator) -> Carry:
    """Begin an inner run where another one ended, as who goes on with a trained network and a new optimizer.

    Args:
        rule: The update rule.
        task: What was trained.
        carry: Where it ended; of copies the first one counts.
        horizon: Steps after which the new run ends.
        generator: Of everything random.
    """
    count = len(carry.total_steps) // carry.copies
    params = {name: p[:count] for name, p in carry.params.items()}
    member = {name: value[:count] for name, value in carry.member.items()}
    return _begun(rule, task, params, member, horizon, generator, carry.copies)


def _begun(
    rule: UpdateRule, task: Task, params: Params, member: Tensors, horizon: int, generator: torch.Generator, copies: int
) -> Carry:
    count = len(next(iter(params.values())))
    told = (torch.rand(count, generator=generator) < 0.5) * float(horizon)  # noqa: PLR2004
    with torch.no_grad():
        first_loss = losses_of(task, params, member, task.batch(count, generator))
    params = _repeated(params, copies)
    return Carry(
        params=params,
        state=rule.init(params, batch_dims=1),
        member=_repeated(member, copies),
        total_steps=told.to(first_loss.device).repeat(copies),
        first_loss=first_loss.repeat(copies),
        alive=first_loss.isfinite().repeat(copies),
        steps=0,
        horizon=horizon,
        copies=copies,
    )


def losses_of(task: Task, params: Params, member: Tensors, batch: Tensors) -> Tensor:
    """The loss of every member, `(members,)`."""
    return task.losses(params, member, batch)


def batch_of(task: Task, carry: Carry, generator: torch.Generator, *, held_out: bool = False) -> Tensors:
    """A batch for every member; copies get the same."""
    batch = task.batch(len(carry.total_steps) // carry.copies, generator, held_out=held_out)
    return _repeated(batch, carry.copies)


def unroll(
    rule: UpdateRule,
    task: Task,
    carry: Carry,
    steps: int,
    generator: torch.Generator,
    *,
    theta: dict[str, Tensor] | None = None,
    how: Unrolling = Unrolling(),
) -> Window:
    """Train for some steps; with gradients enabled, what comes of it depends on theta.

    Args:
        rule: The update rule.
        task: What is trained.
        carry: Where training stands; not changed.
        steps: How many steps.
        generator: For the batches.
        theta: The rule's parameters, `(*shape)` or `(members, *shape)` by name; by default its own.
        how: How it is carried out.
    """
    differentiable = torch.is_grad_enabled()
    tail = steps - steps // 2
    theta = dict(rule.named_parameters()) if theta is None else theta
    rates = {"lr": how.lr}

    def segment(
        batches: Sequence[tuple[Tensors, Tensors]],
        weights: Sequence[float],
        taken: int,
        params: Params,
        state: State,
        theta: dict[str, Tensor],
        rates: dict[str, Tensor | float],
    ) -> tuple[Params, State, list[Tensor], list[Tensor], Params]:
        losses, apart = [], []
        mean: Params = {}
        for number, ((batch, unseen), weight) in enumerate(zip(batches, weights, strict=True), taken):
            loss, grads = _inner_gradient(task, params, carry.member, batch, how.second_order)
            hypers = {**rates, "total_steps": carry.total_steps, "batch_dims": 1, "talk": rule.talks(number)}
            update, state = functional_call(rule, theta, (params, grads, state, task.symmetry), hypers)
            params = {name: p + update[name] for name, p in params.items()}
            losses.append(losses_of(task, params, carry.member, unseen) if how.held_out else loss)
            if how.expert is not None:
                apart.append(disagreement(how.expert, update, state, how.lr))
            if weight:
                mean = {name: mean[name] + p * weight if mean else p * weight for name, p in params.items()}
        return params, state, losses, apart, mean

    params, state = carry.params, carry.state
    losses: list[Tensor] = []
    apart: list[Tensor] = []
    mean: Params = {}
    length = how.segment or (steps if differentiable else 1)
    for first in range(0, steps, length):
        span = range(first, min(first + length, steps))
        batches = [
            (batch_of(task, carry, generator), batch_of(task, carry, generator, held_out=True) if how.held_out else {})
            for _ in span
        ]
        weights = [1 / tail if step >= steps - tail else 0.0 for step in span]
        run = partial(segment, batches, weights, carry.steps + first)
        call = replayed if differentiable and how.segment else _called
        params, state, more, further, part = call(run, params, state, theta, rates)
        losses, apart = losses + more, apart + further
        mean = {name: mean[name] + value if mean else value for name, value in part.items()} if part else mean
    if not how.held_out:  # the loss before every step is that after the one before, on the batch that comes next
        losses = [*losses[1:], losses_of(task, params, carry.member, batch_of(task, carry, generator))]
    seen = torch.stack(losses)
    alive = carry.alive & (seen[-1].detach() < worst(carry.first_loss))  # False for NaN
    end = replace(carry, params=params, state=state, steps=carry.steps + steps, alive=alive)
    return Window(seen, end, mean, torch.stack(apart).mean(0) if apart else torch.zeros_like(carry.first_loss))


def _called(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function; what `replayed` does but for memory."""
    return function(*args)


def _inner_gradient(
    task: Task, params: Params, member: Tensors, batch: Tensors, second_order: bool
) -> tuple[Tensor, Params]:
    """The loss of every member, `(members,)`, and the gradients by name."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in params.items()}
        loss = losses_of(task, leaves, member, batch)
        grads = torch.autograd.grad(
            loss.sum(),
            list(leaves.values()),
            create_graph=differentiable and second_order,
            retain_graph=differentiable,
        )
    return loss if differentiable else loss.detach(), dict(zip(params, grads, strict=True))


def _repeated(tensors: Tensors, copies: int) -> Tensors:
    """Each member as often, all of them one after the other. `(count, ...) -> (copies * count, ...)`."""
    return {name: value.repeat(copies, *(1,) * (value.dim() - 1)) for name, value in tensors.items()}
