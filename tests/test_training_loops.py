"""The loops that people write around an optimizer: closures, accumulation, clipping, averages, mixed precision."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swap_in_optimizer_params_and_state
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from trained_net import RULE, X, backward, grad_of, net, same, snapshot, train

from nfn_optim.optimizer import NFNOptimizer


def made(seed: int = 0) -> tuple[nn.Sequential, NFNOptimizer]:
    """A network and its optimizer."""
    model = net(seed=seed)
    return model, NFNOptimizer(model, rule=RULE, weight_decay=0.1)


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    """The loss of `train`."""
    loss: Tensor = model(x).square().mean()
    return loss


# ------------------------------------------------------------------------------------------------------------ closures


def with_closure(model: nn.Module, optimizer: NFNOptimizer) -> None:
    def closure() -> float:
        backward(model, optimizer)
        return float(loss_of(model).detach())

    assert optimizer.step(closure) == pytest.approx(float(loss_of(model).detach()), rel=1.0)


def with_closure_after_backward(model: nn.Module, optimizer: NFNOptimizer) -> None:
    """As for LBFGS: the loss is evaluated outside, for the log, and again inside."""
    backward(model, optimizer)
    with_closure(model, optimizer)


def without_grad_mode(model: nn.Module, optimizer: NFNOptimizer) -> None:
    with torch.no_grad():
        with_closure(model, optimizer)


def with_zero_grad_in_place(model: nn.Module, optimizer: NFNOptimizer) -> None:
    optimizer.zero_grad(set_to_none=False)
    torch.autograd.backward(loss_of(model))
    optimizer.step()


def with_zero_grad_of_the_model(model: nn.Module, optimizer: NFNOptimizer) -> None:
    model.zero_grad()
    torch.autograd.backward(loss_of(model))
    optimizer.step()


def accumulated(model: nn.Module, optimizer: NFNOptimizer) -> None:
    """Rows of the batch one by one; the sum is the mean of the whole to rounding."""
    optimizer.zero_grad()
    for row in X:
        torch.autograd.backward(loss_of(model, row[None]) / len(X))
    optimizer.step()


LOOPS: dict[str, tuple[Callable[[nn.Module, NFNOptimizer], None], float]] = {
    "closure": (with_closure, 0.0),
    "closure after backward": (with_closure_after_backward, 0.0),
    "closure without grad mode": (without_grad_mode, 0.0),
    "zero_grad in place": (with_zero_grad_in_place, 0.0),
    "zero_grad of the model": (with_zero_grad_of_the_model, 0.0),
    "gradient accumulation": (accumulated, 1e-4),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_train_alike(loop: str) -> None:
    plain, looped = made(), made()
    run, tolerance = LOOPS[loop]
    for _ in range(4):
        train(*plain, steps=1)
        run(*looped)
    for p, q in zip(plain[0].parameters(), looped[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_a_second_step_takes_the_same_gradients_again() -> None:
    once, twice = made(), made()
    for _ in range(3):
        for model, optimizer in (once, twice):
            backward(model, optimizer)
            optimizer.step()
        saved = [grad_of(p).clone() for p in once[0].parameters()]
        twice[1].step()
        for p, g in zip(once[0].parameters(), saved, strict=True):
            p.grad = g
        once[1].step()
    assert same(snapshot(once[1]), snapshot(twice[1]))
    assert once[1].state[once[0][0].weight]["step"] == 6


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_clipped_gradients_are_what_is_seen(clip: Callable[..., object]) -> None:
    clipped, given = made(), made()
    for _ in range(3):
        backward(*clipped)
        clip(clipped[0].parameters(), 1e-3)
        for p, q in zip(given[0].parameters(), clipped[0].parameters(), strict=True):
            p.grad = grad_of(q).clone()
        given[0](X)
        clipped[1].step()
        given[1].step()
    assert same(snapshot(clipped[1]), snapshot(given[1]))
    assert max(grad_of(p).abs().max() for p in clipped[0].parameters()) <= 1e-3


# ------------------------------------------------------------------------------------------------------------ averages


@pytest.mark.parametrize("ema", [False, True])
def test_averaged_models(ema: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = NFNOptimizer(model, rule=RULE)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if ema else None)
    history = []
    for _ in range(4):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
        history.append(model[0].weight.detach().clone())
    expected = history[0]
    for k, value in enumerate(history[1:], 1):
        expected = expected + (value - expected) * (0.5 if ema else 1 / (k + 1))
    torch.testing.assert_close(averaged.module[0].weight, expected)
    update_bn([X], averaged)
    assert optimizer.names == tuple(name for name, _ in model.named_parameters())
    assert copy.deepcopy(averaged)(X).isfinite().all()


def test_parameters_and_state_swapped_in_for_a_while() -> None:
    """As torch does to take a step on others than the ones that were given."""
    model, optimizer = made()
    train(model, optimizer, 2)
    before = snapshot(optimizer)
    others = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    twin, reference = copy.deepcopy((model, optimizer))
    for p in others.values():
        p.grad = torch.ones_like(p)
    for p in twin.parameters():
        p.grad = torch.ones_like(p)
    with swap_in_optimizer_params_and_state(optimizer, others, state):
        optimizer.step()
    reference.step()
    assert all(torch.equal(p, q) for p, q in zip(others.values(), twin.parameters(), strict=True))
    assert same(snapshot(optimizer), before)
    train(model, optimizer, 1)
    assert optimizer.state[model[0].weight]["step"] == 3


# ----------------------------------------------------------------------------------------------------- mixed precision


def test_a_gradient_scaler_changes_nothing_but_what_overflows() -> None:
    plain, scaled = made(), made()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for k in range(6):
        scaled[1].zero_grad()
        torch.autograd.backward(scaler.scale(loss_of(scaled[0])))
        if k == 3:
            grad_of(scaled[0][0].weight)[0, 0] = float("inf")
        else:
            train(*plain, steps=1)
        scaler.unscale_(scaled[1])
        nn.utils.clip_grad_norm_(scaled[0].parameters(), 1e9)
        scaler.step(scaled[1])
        scaler.update()
    assert same(snapshot(plain[1]), snapshot(scaled[1]))  # scales are powers of two
    assert scaled[1].skipped_steps == 0  # the scaler did not call
    assert scaled[1].state[scaled[0][0].weight]["step"] == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = net()
    optimizer = NFNOptimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    first = loss_of(model).item()
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model)
        torch.autograd.backward(scaler.scale(loss))
        with torch.autocast("cpu", dtype=dtype):  # some loops forget to leave it
            scaler.step(optimizer)
        scaler.update()
    assert loss_of(model).item() < first
    assert all(value.dtype == torch.float32 for state in optimizer.state.values() for value in state.values())


def test_another_default_dtype() -> None:
    plain, other = made(), made()
    train(*plain)
    torch.set_default_dtype(torch.float64)
    try:
        train(*other)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(snapshot(plain[1]), snapshot(other[1]))
