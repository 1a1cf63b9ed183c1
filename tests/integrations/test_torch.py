"""What torch itself does around an optimizer: compiled models, and optimizers that step during the backward pass."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from digits import SYMMETRY, axes_of, batches, falls, network, train
from torch import Tensor, nn
from torch.nn import functional as F

from nfn_optim import NFNOptimizer

STEPS = 24


@pytest.mark.slow
@pytest.mark.parametrize("given", ["model", "parameters"])
def test_compiled_model(given: str) -> None:
    plain, compiled = network(), torch.compile(network(), backend="aot_eager", fullgraph=True)
    assert isinstance(compiled, nn.Module)
    losses = []
    for model in (plain, compiled):
        optimizer = NFNOptimizer(model if given == "model" else model.parameters())
        losses.append(train(model, optimizer, batches(STEPS)))
        assert axes_of(optimizer) == SYMMETRY
        assert optimizer.names == tuple(SYMMETRY)
    assert falls(losses[1])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


def test_compiled_function_around_a_model() -> None:
    model = network()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss_of(images: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(model(images), classes)

    optimizer = NFNOptimizer(model)
    losses = []
    for number, (images, classes) in enumerate(batches(STEPS)):
        loss = loss_of(images, classes)
        optimizer.zero_grad()
        loss.backward()
        with pytest.warns(UserWarning, match="no forward pass") if number == 0 else contextlib.nullcontext():
            optimizer.step()
        losses.append(loss.item())
    assert falls(losses)
    assert axes_of(optimizer) == {}
    model(images)  # as for an evaluation
    optimizer.step()
    assert axes_of(optimizer) == SYMMETRY


def in_backward_by_hand(model: nn.Module) -> list[NFNOptimizer]:
    """One optimizer for each parameter, which steps as soon as there is a gradient."""
    optimizers = {p: NFNOptimizer([p]) for p in model.parameters()}

    def update(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    return list(optimizers.values())


def in_backward_by_torch(model: nn.Module) -> list[NFNOptimizer]:
    """The same by a function of torch."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(NFNOptimizer, model.parameters(), {"lr": 1e-3})
    found: list[Any] = [optimizer for p in model.parameters() for optimizer in p._in_backward_optimizers]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("how", [in_backward_by_hand, in_backward_by_torch])
def test_optimizer_in_backward(how: Any) -> None:
    model = network()
    optimizers = how(model)
    losses = []
    for images, classes in batches(STEPS):
        loss = F.cross_entropy(model(images), classes)
        loss.backward()
        losses.append(loss.item())
    assert all(p.grad is None for p in model.parameters())
    assert falls(losses)
    assert [optimizer.names for optimizer in optimizers] == [(name,) for name in SYMMETRY]
    assert [len(axes_of(optimizer)) for optimizer in optimizers] == [1, 1, 1, 0]  # the last bias has no hidden neurons
