"""Entries of others in the state, such as Lookahead's, are kept, saved and loaded, as with torch's optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rules import random_rule
from torch import Tensor, nn
from trained_net import backward, net, same, snapshot, through_file, train

from nfn_optim import NFNOptimizer

Make = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters()),
    "ours": lambda m: NFNOptimizer(m, rule=random_rule(rank=2)),
    "ours, adamw": lambda m: NFNOptimizer(m, rule="adamw"),
    "ours, no names": lambda m: NFNOptimizer(m.parameters(), rule="adamw"),
}
FOREIGN: dict[str, Callable[[Tensor], Any]] = {
    "lookahead_slow_buff": lambda p: p.detach().clone(),
    "old_p": lambda p: p.detach().clone(),
    "e_w": lambda p: 0.05 * torch.ones_like(p),
    "momentum_buffer": torch.zeros_like,
    "of another shape": lambda p: torch.arange(3.0),
    "count": lambda p: 7,
    "fraction": lambda p: 0.25,
    "name": lambda p: "layer",
    "nothing": lambda p: None,
    "flag": lambda p: True,
    "nested": lambda p: {"mean": torch.ones(2), "of rows": [torch.zeros(3), 4, {"deep": torch.ones(())}]},
    "tuple": lambda p: (torch.ones(2), 1),
    "integers": lambda p: torch.tensor([1, 2, 2**40]),
    "mask": lambda p: torch.ones(p.shape, dtype=torch.bool),
}


def mark(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Add entries to the state of every parameter."""
    for p in model.parameters():
        optimizer.state[p].update({key: make(p) for key, make in FOREIGN.items()})


def foreign_of(states: Any) -> list[dict[str, Any]]:
    """The entries of others by parameter."""
    return [{key: state[key] for key in FOREIGN} for state in states]


def equal(one: Any, other: Any) -> bool:
    """Bit-equal nests."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(equal, one, other))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_they_are_saved_and_loaded(make: str) -> None:
    model, resumed = net(), net(seed=1)
    optimizer, other = OPTIMIZERS[make](model), OPTIMIZERS[make](resumed)
    train(model, optimizer)
    mark(model, optimizer)
    expected = copy.deepcopy(foreign_of(optimizer.state.values()))
    train(model, optimizer)
    assert equal(foreign_of(optimizer.state.values()), expected)  # a step leaves them alone
    saved = through_file(optimizer.state_dict())
    other.load_state_dict(saved)
    resumed.load_state_dict(model.state_dict())
    if make != "adamw":  # which casts them to the precision of the parameter
        assert equal(foreign_of(other.state.values()), expected)
    assert all(state.keys() == optimizer.state[p].keys() for p, state in zip(optimizer.state, other.state.values()))  # noqa: B905 - twins
    train(model, optimizer)
    train(resumed, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("make", [make for make in OPTIMIZERS if make != "adamw"])
def test_copies_have_them(make: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[make](model)
    train(model, optimizer)
    mark(model, optimizer)
    _, copied = copy.deepcopy((model, optimizer))
    assert equal(foreign_of(copied.state.values()), foreign_of(optimizer.state.values()))


def test_loading_copies_them() -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule="adamw")
    train(model, optimizer)
    mark(model, optimizer)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.state[model[0].weight]["old_p"].zero_()
    optimizer.state[model[0].weight]["nested"]["mean"].zero_()
    assert saved["state"][0]["old_p"].any()
    assert saved["state"][0]["nested"]["mean"].any()


def test_they_keep_their_precision() -> None:
    model = net(torch.bfloat16)
    optimizer = NFNOptimizer(model, rule="adamw")
    train(model, optimizer)
    optimizer.state[model[0].weight]["master"] = model[0].weight.detach().float() + 1e-6
    expected = optimizer.state[model[0].weight]["master"].clone()
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    assert equal(optimizer.state[model[0].weight]["master"], expected)


def test_entries_before_the_first_step() -> None:
    """Two-step optimizers keep the old parameter there before the one inside has taken a step."""
    model, plain = net(), net()
    optimizer, other = (NFNOptimizer(m, rule=random_rule()) for m in (model, plain))
    for p in model.parameters():
        optimizer.state[p]["old_p"] = p.detach().clone()
    train(model, optimizer)
    train(plain, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(optimizer.state[p]["old_p"], q) for p, q in zip(model.parameters(), net().parameters()))  # noqa: B905
    twin = NFNOptimizer(net(), rule=random_rule())
    twin.load_state_dict(through_file(optimizer.state_dict()))
    assert twin.state_dict()["state"][0].keys() == optimizer.state_dict()["state"][0].keys()


def test_a_state_of_another_optimizer_is_refused() -> None:
    model = net()
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, theirs)
    optimizer = NFNOptimizer(model.parameters(), rule="adamw")
    with pytest.raises(ValueError, match=r"AdamW, found only \['momentum_buffer'\]"):
        optimizer.load_state_dict(theirs.state_dict())
    assert not optimizer.state


def test_a_parameter_that_never_had_a_gradient_may_have_nothing_else() -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule="adamw")
    model[0].requires_grad_(False)
    train(model, optimizer)
    mark(model, optimizer)
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    assert torch.equal(optimizer.state[model[0].weight]["old_p"], model[0].weight)
    train(model, optimizer)


class SharpnessAware:
    """Sharpness-aware minimisation around another optimizer, with its entries in that one's state."""

    def __init__(self, inner: torch.optim.Optimizer, radius: float = 0.05) -> None:
        self.inner, self.radius = inner, radius

    @torch.no_grad()
    def ascend(self) -> None:
        params = [p for group in self.inner.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.inner.state[p]["e_w"] = p.grad * (self.radius / norm)
            p.add_(self.inner.state[p]["e_w"])

    @torch.no_grad()
    def descend(self) -> None:
        for group in self.inner.param_groups:
            for p in group["params"]:
                p.sub_(self.inner.state[p].pop("e_w"))
        self.inner.step()


def test_sharpness_aware_minimisation() -> None:
    found = []
    for resume in (False, True):
        model = net()
        optimizer = SharpnessAware(NFNOptimizer(model, rule=random_rule(rank=2)))
        for step in range(6):
            backward(model, optimizer.inner)
            optimizer.ascend()
            if resume and step == 3:
                saved = through_file((model.state_dict(), optimizer.inner.state_dict()))
                model, before = net(seed=3), optimizer.inner.symmetry
                optimizer = SharpnessAware(NFNOptimizer(model, rule=random_rule(rank=2), symmetry=before))
                model.load_state_dict(saved[0])
                optimizer.inner.load_state_dict(saved[1])
            backward(model, optimizer.inner)
            optimizer.descend()
        found.append(snapshot(optimizer.inner))
    assert same(*found)


@pytest.mark.slow
def test_lookahead_of_timm() -> None:
    from timm.optim import Lookahead

    found = []
    for resume in (False, True):
        model = net()
        optimizer = Lookahead(NFNOptimizer(model, rule=random_rule()), k=2)
        for step in range(6):
            if resume and step == 3:
                saved = through_file((model.state_dict(), optimizer.state_dict()))
                model = net(seed=1)
                optimizer = Lookahead(NFNOptimizer(model, rule=random_rule()), k=2)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            backward(model, optimizer._base_optimizer)
            optimizer.step()
        found.append(snapshot(optimizer._base_optimizer))
        assert optimizer.param_groups[0]["lookahead_step"] == 6
    assert same(*found)
