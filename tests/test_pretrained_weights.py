"""Matrices that were trained before are recognised by their spectrum, and start with short steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from nfn_optim import NFNOptimizer
from nfn_optim.rule.pretrained_weights import (
    PRETRAINED_STEP,
    R_RANDOM,
    R_TRAINED,
    initial_log_step_size,
    spectral_ratio,
)

INITIALISATIONS: dict[str, Callable[[Tensor], object]] = {
    "normal": lambda w: nn.init.normal_(w, std=0.02),
    "truncated": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "uniform": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "sparse": lambda w: nn.init.sparse_(w, 0.5),
    "orthogonal": nn.init.orthogonal_,
    "identity": nn.init.eye_,
    "of positive numbers": nn.init.uniform_,
    "constant": nn.init.ones_,
    "zero": nn.init.zeros_,
}


def trained(rows: int, rest: int) -> Tensor:
    """A random matrix with one direction that is twice as long as the others."""
    w = torch.randn(rows, rest)
    u, v = F.normalize(torch.randn(rows), dim=0), F.normalize(torch.randn(rest), dim=0)
    return w + 2.5 * (math.sqrt(rows) + math.sqrt(rest)) * torch.outer(u, v)


@pytest.mark.parametrize("shape", [(8, 8), (64, 27), (3, 200), (200, 3), (128, 96)], ids=str)
@pytest.mark.parametrize("name", INITIALISATIONS)
def test_no_initialisation_looks_trained(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w = torch.empty(shape)
    INITIALISATIONS[name](w)
    assert spectral_ratio(w) < R_RANDOM
    assert initial_log_step_size(w) == 0


def test_what_was_trained_does() -> None:
    torch.manual_seed(0)
    w = trained(40, 60)
    exact = torch.linalg.matrix_norm(w - w.mean(), 2) / (w.std() * (math.sqrt(40) + math.sqrt(60)))
    assert spectral_ratio(w) == pytest.approx(exact.item(), rel=0.02)
    assert spectral_ratio(w) > R_TRAINED
    assert initial_log_step_size(w) == pytest.approx(math.log(PRETRAINED_STEP))


def test_neither_order_nor_scale_nor_batch_matters() -> None:
    torch.manual_seed(0)
    w = torch.stack([trained(12, 20), torch.randn(12, 20)])
    found = spectral_ratio(w)
    torch.testing.assert_close(spectral_ratio(w[:, torch.randperm(12)][:, :, torch.randperm(20)]), found)
    torch.testing.assert_close(spectral_ratio(1e-6 * w), found)
    torch.testing.assert_close(torch.stack([spectral_ratio(x) for x in w]), found)
    assert initial_log_step_size(w[:, :, 0], batch_dims=1).tolist() == [0, 0]  # vectors
    assert initial_log_step_size(w.bfloat16(), batch_dims=1).dtype == torch.float32


def first_steps(model: nn.Module) -> dict[str, float]:
    """How far each parameter moves at the first step."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = NFNOptimizer(model)
    model(torch.randn(32, 64)).square().mean().backward()
    optimizer.step()
    return {name: (p - before[name]).norm().item() for name, p in model.named_parameters()}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def test_a_new_layer_beside_old_ones_starts_faster_than_they() -> None:
    new = first_steps(network())
    model = network()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            assert isinstance(layer, nn.Linear)
            w = trained(64, 64)
            layer.weight.copy_(w * layer.weight.norm() / w.norm())  # its scale stays the same, so that its unit does
    found = first_steps(model)
    share = {name: found[name] / new[name] for name in new}
    assert max(share["0.weight"], share["2.weight"]) < 0.25
    assert 0.4 < share["4.weight"] < 0.8  # its own spectrum counts two thirds
    assert share["0.bias"] < 0.25  # a vector follows the matrices


def test_a_trained_network_is_not_torn_apart() -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    held_out = x[1200:], y[1200:]

    def train(optimizer: torch.optim.Optimizer, first: int, last: int, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            batch = torch.randint(first, last, (32,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            losses.append(F.cross_entropy(model(held_out[0]), held_out[1]).item())
        return losses

    before = train(torch.optim.AdamW(model.parameters(), 3e-3), 0, 600, 300)[-1]
    assert max(train(NFNOptimizer(model), 600, 1200, 60)) < 1.2 * before
