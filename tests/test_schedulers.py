"""Every scheduler of torch drives it as it drives AdamW, with the learning rate a number or a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR
from trained_net import net, same, snapshot, through_file, train

from nfn_optim.optimizer import NFNOptimizer

Optimizer = torch.optim.Optimizer

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.0001, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, gamma=0.8), lr_scheduler.StepLR(o, step_size=2)], optimizer=o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, T_max=4)], milestones=[2]
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=2, cycle_momentum=False),
    "CyclicLR with momentum": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=8, cycle_momentum=False),
    "OneCycleLR with momentum": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3),
}
BASE = {"LRScheduler"}  # of all others


def advance(scheduler: Any) -> None:
    """One step, at a loss that does not fall."""
    scheduler.step(*[1.0][: isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)])


def rate(optimizer: Optimizer) -> float:
    """The learning rate of the last group."""
    return float(optimizer.param_groups[-1]["lr"])


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers(name: str, as_tensor: bool) -> None:
    ours, theirs = net(), net()

    def lr() -> Any:
        return torch.tensor(3e-3) if as_tensor else 3e-3

    one = NFNOptimizer(ours, lr=lr(), rule="adamw")
    other = torch.optim.AdamW(theirs.parameters(), lr=lr(), weight_decay=0.0, foreach=False)
    rates: list[list[float]] = [[], []]
    for model, optimizer, seen in ((ours, one, rates[0]), (theirs, other, rates[1])):
        scheduler = SCHEDULERS[name](optimizer)
        for _ in range(5):
            train(model, optimizer, 1)
            advance(scheduler)
            seen.append(rate(optimizer))
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    assert isinstance(one.param_groups[0]["lr"], torch.Tensor) == isinstance(other.param_groups[0]["lr"], torch.Tensor)
    if "momentum" not in name:  # which AdamW would follow
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_resume_under_a_scheduler(name: str) -> None:
    straight, resumed = net(), net(seed=1)
    one = NFNOptimizer(straight, rule="adamw")
    first = SCHEDULERS[name](one)
    for _ in range(3):
        train(straight, one, 1)
        advance(first)
    saved = through_file({"model": straight.state_dict(), "optimizer": one.state_dict()})
    other = NFNOptimizer(resumed.parameters(), rule="adamw")
    second = SCHEDULERS[name](other)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(first.state_dict())
    other.load_state_dict(saved["optimizer"])
    for _ in range(4):
        for model, optimizer, scheduler in ((straight, one, first), (resumed, other, second)):
            train(model, optimizer, 1)
            advance(scheduler)
        assert rate(one) == rate(other)
    assert same(snapshot(one), snapshot(other))


def test_no_scheduler_is_left_out() -> None:
    assert {name.split()[0] for name in SCHEDULERS} == {*lr_scheduler.__all__, "SWALR"} - BASE


def test_groups_are_scheduled_apart() -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters()}]
    optimizer = NFNOptimizer(groups, lr=1e-3, rule="adamw")
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda k: 1.0, lambda k: 0.5**k])
    for _ in range(2):
        train(model, optimizer, 1)
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.25e-3]


def test_a_warm_up_from_zero_remembers_the_first_gradients() -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule="adamw")
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: k / 3)
    before = snapshot(optimizer)
    train(model, optimizer, 1)
    assert same((snapshot(optimizer)[0], []), (before[0], []))
    assert all(state["step"] == 1 and state["exp_avg"].any() for state in optimizer.state.values())
    scheduler.step()
    train(model, optimizer, 1)
    assert not same((snapshot(optimizer)[0], []), (before[0], []))
