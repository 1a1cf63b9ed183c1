"""The optimizer is AdamW when nothing is learned, the rule and nothing else, and the same for renamed neurons."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from rules import random_rule
from torch import Tensor, nn

from nfn_optim.optimizer import NFNOptimizer
from nfn_optim.rule import RuleConfig, UpdateRule
from nfn_optim.symmetry import Symmetry, symmetry_of

Batches = list[tuple[Tensor, Tensor]]


def mlp() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))


def cnn() -> nn.Module:
    """Convolutions, batch normalisation, flatten, linear."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 4),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {"mlp": (mlp, (6,)), "cnn": (cnn, (2, 4, 4))}


def batches(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float32) -> Batches:
    """Random inputs with random labels of 4 classes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(16, *shape, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(4, (16,), generator=generator),
        )
        for _ in range(steps)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Batches) -> list[dict[str, Tensor]]:
    """Train and return the gradients of every step by name."""
    grads = []
    for x, y in data:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return grads


def renamed(model: nn.Module, symmetry: Symmetry, permutations: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors with its neurons renamed; scalar buffers stay."""
    state = model.state_dict()
    return state | symmetry.permute({name: state[name] for name in symmetry.dims}, permutations)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rule", ["adamw", "zeroed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-12)])
def test_equals_adamw_without_a_learned_part(name: str, rule: str, dtype: torch.dtype, tolerance: float) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    ours, theirs = (model := make().to(dtype)), copy.deepcopy(model)
    given = rule if rule == "adamw" else UpdateRule().zero_()
    data = batches(shape, 50, dtype)
    train(ours, NFNOptimizer(ours, lr=3e-3, weight_decay=0.1, rule=given), data)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.1), data)
    for (where, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        relative = ((p - q).norm() / q.norm()).item()
        assert relative < tolerance, (where, relative)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("config", [{}, {"rank": 4, "refresh_every": 2}, {"rank": 32}], ids=str)
def test_renamed_neurons_are_trained_the_same(name: str, config: dict[str, Any]) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().double()
    data = batches(shape, 20, torch.float64)
    symmetry = symmetry_of(model, data[0][0])
    permutations = symmetry.random_permutations(torch.Generator().manual_seed(3))
    assert any(not torch.equal(index, torch.arange(len(index))) for index in permutations.values())
    twin = copy.deepcopy(model)
    twin.load_state_dict(renamed(model, symmetry, permutations))
    rule = UpdateRule(RuleConfig(**config))
    with torch.no_grad():
        for theta in rule.parameters():
            theta.add_(0.2 * torch.randn(theta.shape))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, NFNOptimizer(model, rule=rule, weight_decay=0.1, total_steps=20), data)
    train(twin, NFNOptimizer(twin.parameters(), rule=rule, weight_decay=0.1, total_steps=20), data)
    expected, found = renamed(model, symmetry, permutations), twin.state_dict()
    for where, value in expected.items():
        torch.testing.assert_close(found[where], value, rtol=1e-8, atol=1e-8)
    assert all((p - before[name]).abs().max() > 1e-4 for name, p in model.named_parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_the_rule_and_nothing_else(name: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, rule = make(), random_rule()
    data = batches(shape, 6)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    symmetry = symmetry_of(copy.deepcopy(model), data[0][0]).restrict(params)
    optimizer = NFNOptimizer(model, lr=2e-3, weight_decay=0.05, rule=rule, total_steps=6)
    state = rule.init(params)
    for grads in train(model, optimizer, data):
        with torch.no_grad():
            update, state = rule(params, grads, state, symmetry, lr=2e-3, weight_decay=0.05, total_steps=6)
        params = {where: value + update[where] for where, value in params.items()}
    for where, p in model.named_parameters():
        assert torch.equal(p, params[where])
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in state[where].items())


def test_names_and_order_do_not_matter() -> None:
    torch.manual_seed(0)
    first, rule = mlp().double(), random_rule()
    second = copy.deepcopy(first)
    data = batches((6,), 5, torch.float64)
    train(first, NFNOptimizer(first, rule=rule), data)
    shuffled = sorted(second.parameters(), key=lambda p: (p.dim(), -p.numel()))
    new = {name: f"renamed/{name}" for name, _ in first.named_parameters()}
    symmetry = symmetry_of(second, data[0][0]).rename(new)
    by_id = {id(p): name for name, p in second.named_parameters()}
    pairs = [(new[by_id[id(p)]], p) for p in shuffled]
    optimizer = NFNOptimizer(pairs, rule=rule, symmetry=symmetry)
    train(second, optimizer, data)
    assert optimizer.names == tuple(name for name, _ in pairs)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_the_symmetry_makes_a_difference() -> None:
    torch.manual_seed(0)
    first, rule = mlp(), random_rule()
    second = copy.deepcopy(first)
    data = batches((6,), 5)
    train(first, NFNOptimizer(first, rule=rule), data)
    separate = Symmetry.separate({name: p.shape for name, p in second.named_parameters()})
    train(second, NFNOptimizer(second, rule=rule, symmetry=separate), data)
    assert any((p - q).abs().max() > 1e-6 for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("network", zoo.ZOO, ids=lambda network: network.name)
def test_renamed_neurons_of_any_network_train_alike(network: zoo.Network) -> None:
    """Heads, groups, gates and streams included, each head and each group renamed in its own way."""
    torch.manual_seed(0)
    model = network.module().double().eval()
    inputs = [x.double() if x.is_floating_point() else x for x in network.inputs()]
    symmetry = symmetry_of(model, *inputs)
    permutations = symmetry.random_permutations(torch.Generator().manual_seed(1))
    twin = copy.deepcopy(model)
    twin.load_state_dict(renamed(model, symmetry, permutations))
    target, rule = torch.randn_like(model(*inputs)), random_rule()
    for net in (model, twin):
        optimizer = NFNOptimizer(net, rule=rule)
        for _ in range(6):
            optimizer.zero_grad()
            torch.autograd.backward((net(*inputs) - target).square().mean())
            optimizer.step()
        assert not optimizer.skipped_steps
    expected = renamed(model, symmetry, permutations)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-8)
