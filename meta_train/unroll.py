"""Inner training under a rule, differentiable with respect to theta.

    loss_k = loss(p_k, batch_k)       g_k = d loss_k / d p_k       p_{k+1} = p_k + rule(p_k, g_k, state_k)

for all members of a task at once. The inner gradient is that of the sum of the vmapped losses, which are independent:
cheaper than a gradient inside `vmap`, and the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meta_train.tasks import Params, Task, Tensors
from nfn_optim.features import State
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
        steps: Steps taken.
        horizon: Steps after which the inner run ends.
    """

    params: Params
    state: State
    member: Tensors
    total_steps: Tensor
    first_loss: Tensor
    steps: int
    horizon: int

    def detach(self) -> Carry:
        """The same numbers without their history."""
        return Carry(
            {name: p.detach() for name, p in self.params.items()},
            {name: {key: value.detach() for key, value in s.items()} for name, s in self.state.items()},
            self.member,
            self.total_steps,
            self.first_loss,
            self.steps,
            self.horizon,
        )


def start(rule: UpdateRule, task: Task, members: int, horizon: int, generator: torch.Generator) -> Carry:
    """Begin an inner run; every member is told its horizon with probability one half."""
    params, member = task.draw(members, generator)
    told = torch.rand(members, generator=generator) < 0.5  # noqa: PLR2004
    with torch.no_grad():
        first_loss = losses_of(task, params, member, task.batch(members, generator))
    return Carry(params, rule.init(params, batch_dims=1), member, told * float(horizon), first_loss, 0, horizon)


def losses_of(task: Task, params: Params, member: Tensors, batch: Tensors) -> Tensor:
    """The loss of every member, `(members,)`."""
    return torch.func.vmap(task.loss)(params, member, batch)


def unroll(
    rule: UpdateRule, task: Task, carry: Carry, steps: int, generator: torch.Generator, *, second_order: bool = True
) -> tuple[Tensor, Carry, Params]:
    """Train for some steps; with gradients enabled, losses and carry depend on theta.

    Args:
        rule: The update rule.
        task: What is trained.
        carry: Where training stands; not changed.
        steps: How many steps.
        generator: For the batches: one for each step and one more.
        second_order: Whether the inner gradient is differentiated too.

    Returns:
        Losses `(steps, members)`: after the first step, ..., after the last, each on the batch that comes next; the
        carry after the last step; and the mean of the parameters after the steps of the second half.
    """
    differentiable = torch.is_grad_enabled()
    params, state = carry.params, carry.state
    members = len(carry.total_steps)
    losses = []
    tail = steps - steps // 2
    mean: Params = {}
    for step in range(steps + 1):
        batch = task.batch(members, generator)
        if step == steps:
            losses.append(losses_of(task, params, carry.member, batch))
            break
        with torch.enable_grad():
            if not differentiable or step == 0:
                params = {name: p.detach().requires_grad_() for name, p in params.items()}
            loss = losses_of(task, params, carry.member, batch)
            grads = torch.autograd.grad(
                loss.sum(),
                list(params.values()),
                create_graph=differentiable and second_order,
                retain_graph=differentiable,
            )
        if step > 0:
            losses.append(loss if differentiable else loss.detach())
        update, state = rule(
            params,
            dict(zip(params, grads, strict=True)),
            state,
            task.symmetry,
            lr=LR,
            total_steps=carry.total_steps,
            batch_dims=1,
        )
        params = {name: p + update[name] for name, p in params.items()}
        if step >= steps - tail:
            mean = {name: mean[name] + p / tail if mean else p / tail for name, p in params.items()}
    return torch.stack(losses), replace(carry, params=params, state=state, steps=carry.steps + steps), mean
