"""An optimizer like any other: how it is made, what a step does, and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trained_net import RULE, X, backward, net, same, snapshot, symmetry_of_net, train

from nfn_optim import pretrained
from nfn_optim.optimizer import NFNOptimizer
from nfn_optim.rule.step import incidence_of
from nfn_optim.symmetry import Symmetry

# ------------------------------------------------------------------------------------------------------- construction

BAD_ARGUMENTS: dict[str, tuple[Callable[[], NFNOptimizer], type[Exception], str]] = {
    "no parameters": (lambda: NFNOptimizer([], rule=RULE), ValueError, "empty parameter list"),
    "module without parameters": (lambda: NFNOptimizer(nn.ReLU(), rule=RULE), ValueError, "empty parameter list"),
    "exhausted iterator": (lambda: NFNOptimizer(iter(()), rule=RULE), ValueError, "read only once"),
    "a tensor": (lambda: NFNOptimizer(torch.ones(2), rule=RULE), TypeError, "iterable"),
    "negative lr": (lambda: NFNOptimizer(net(), lr=-1.0, rule=RULE), ValueError, "expected lr >= 0 .* found -1"),
    "nan lr": (lambda: NFNOptimizer(net(), lr=float("nan"), rule=RULE), ValueError, "expected lr >= 0"),
    "vector lr": (lambda: NFNOptimizer(net(), lr=torch.ones(2), rule=RULE), ValueError, "1-element"),
    "negative decay": (lambda: NFNOptimizer(net(), weight_decay=-1, rule=RULE), ValueError, "weight_decay >= 0"),
    "no horizon": (lambda: NFNOptimizer(net(), total_steps=0, rule=RULE), ValueError, "total_steps"),
    "half a step": (lambda: NFNOptimizer(net(), total_steps=1.5, rule=RULE), ValueError, "total_steps"),  # type: ignore[arg-type]
    "betas": (
        lambda: NFNOptimizer([{"params": [*net().parameters()], "betas": (0.8, 0.99)}], rule=RULE),
        ValueError,
        "part of the rule",
    ),
    "lr of a wrong type": (lambda: NFNOptimizer(net(), lr="1e-3", rule=RULE), TypeError, "lr as a number"),  # type: ignore[arg-type]
    "rule of a wrong type": (lambda: NFNOptimizer(net(), rule=nn.Linear(1, 1)), TypeError, "UpdateRule"),  # type: ignore[arg-type]
    "unknown rule": (lambda: NFNOptimizer(net(), rule="no such rule"), FileNotFoundError, "adamw"),
    "model of a wrong type": (lambda: NFNOptimizer(net().parameters(), model="m", rule=RULE), TypeError, "model="),  # type: ignore[arg-type]
    "symmetry of a wrong type": (lambda: NFNOptimizer(net(), symmetry={}, rule=RULE), TypeError, "symmetry="),  # type: ignore[arg-type]
    "symmetry of another shape": (
        lambda: NFNOptimizer(net(), symmetry=symmetry_of_net(5), rule=RULE),
        ValueError,
        r"expected '0.weight' of shape \(5, 4\)",
    ),
    "symmetry of other names": (
        lambda: NFNOptimizer(net(), symmetry=symmetry_of_net().rename({"0.bias": "b"}), rule=RULE),
        ValueError,
        "name every parameter, .'0.bias'. are not",
    ),
    "symmetry of another number": (
        lambda: NFNOptimizer(net()[0].parameters(), symmetry=symmetry_of_net(), rule=RULE),
        ValueError,
        "symmetry of 2 tensors",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case: str) -> None:
    construct, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        construct()


@pytest.mark.parametrize("how", ["module", "named", "bare", "groups"])
def test_symmetry_given_by_hand(how: str) -> None:
    model = net()
    params: dict[str, Any] = {
        "module": model,
        "named": model.named_parameters(),
        "bare": model.parameters(),
        "groups": [{"params": model[2].parameters()}, {"params": model[0].parameters()}],
    }
    given = {"groups": model}.get(how)
    optimizer = NFNOptimizer(params[how], rule=RULE, symmetry=symmetry_of_net(), model=given)
    train(model, optimizer)
    assert optimizer.symmetry is not None
    assert optimizer.symmetry.dims == symmetry_of_net().dims
    assert set(optimizer.names) == set(symmetry_of_net().dims)


def test_rule_from_a_file_and_by_reference(tmp_path: Path) -> None:
    pretrained.save(RULE, tmp_path / "mine.safetensors")
    first, second = net(), net()
    by_path = NFNOptimizer(first, rule=tmp_path / "mine.safetensors")
    by_reference = NFNOptimizer(second, rule=RULE)
    train(first, by_path)
    train(second, by_reference)
    assert by_reference.rule is RULE
    assert same(snapshot(by_path), snapshot(by_reference))
    assert "mine.safetensors" in repr(by_path)
    assert "weight_decay: 0.0" in repr(by_path)
    assert "UpdateRule" in repr(by_reference)


# ------------------------------------------------------------------------------------------------------ what steps do


def test_parameters_without_gradient_scalar_and_empty_ones() -> None:
    shapes: dict[str, tuple[int, ...]] = {"used": (3, 2), "scalar": (), "empty": (0, 2), "unused": (2,)}
    params = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = NFNOptimizer(params.items(), rule=RULE, symmetry=Symmetry.separate(shapes))
    for k in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(params["used"].sum() * params["scalar"] + params["empty"].sum())
        if k == 1:
            params["scalar"].grad = None
        optimizer.step()
    assert torch.equal(params["unused"], torch.ones(2))
    assert params["unused"] not in optimizer.state
    assert [optimizer.state[params[name]]["step"].item() for name in ("used", "scalar")] == [3, 2]
    assert all(p.isfinite().all() for p in params.values())
    assert not torch.equal(params["used"], torch.ones(3, 2))
    assert not torch.equal(params["scalar"], torch.tensor(1.0))


def test_closure_is_called_once_with_gradients() -> None:
    model = net()
    calls: list[bool] = []
    optimizer = NFNOptimizer(model, rule=RULE)

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        backward(model, optimizer)
        return 0.5

    with torch.no_grad():
        assert optimizer.step(closure) == 0.5
    assert calls == [True]
    assert len(optimizer.state) == len(list(model.parameters()))


def test_maximize_mirrors_the_gradient() -> None:
    up, down = net(), net()
    ascent, descent = NFNOptimizer(up, rule=RULE, maximize=True), NFNOptimizer(down, rule=RULE)
    for _ in range(3):
        for model, optimizer, sign in ((up, ascent, -1), (down, descent, 1)):
            optimizer.zero_grad()
            torch.autograd.backward(sign * model(X).square().mean())
            optimizer.step()
    assert same(snapshot(ascent), snapshot(descent))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_state_of_other_dtypes(dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = NFNOptimizer(model, lr=1e-2, rule=RULE)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer)
    wide = torch.promote_types(dtype, torch.float32)
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())
    assert all(value.dtype == wide for state in optimizer.state.values() for value in state.values())
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_mixed_dtypes_share_one_step() -> None:
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    optimizer = NFNOptimizer(params, rule=RULE, symmetry=Symmetry.separate(dict.fromkeys("abc", (3,))))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.float32, torch.float32, torch.float64]
    assert all((p != 1).all() for p in params[1:])


def test_groups_have_their_own_hyperparameters() -> None:
    ours, theirs = net(), net()

    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        return [
            {"params": model[0].parameters(), "lr": 1e-2, "weight_decay": 0.3},
            {"params": model[2].parameters(), "lr": torch.tensor(1e-3)},
        ]

    train(ours, NFNOptimizer(groups(ours), rule="adamw"))
    train(theirs, torch.optim.AdamW(groups(theirs), weight_decay=0.0, foreach=False))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_each_group_may_ascend() -> None:
    ours, theirs = net(), net()

    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        return [{"params": model[0].parameters(), "maximize": True}, {"params": model[2].parameters()}]

    train(ours, NFNOptimizer(groups(ours), rule="adamw"))
    train(theirs, torch.optim.AdamW(groups(theirs), weight_decay=0.0, foreach=False))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_one_optimizer_for_each_parameter_inside_backward() -> None:
    """As is done where gradients must not all be there at once."""
    model = net()
    optimizers = {p: NFNOptimizer([p], rule=RULE) for p in model.parameters()}
    handles = [p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step()) for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        model.zero_grad()
        torch.autograd.backward(model(X).square().mean())
    for handle in handles:
        handle.remove()
    assert [int(o.state[p]["step"]) for p, o in optimizers.items()] == [3, 3, 3, 3]
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(optimizers, before, strict=True))
    symmetry = optimizers[model[2].weight].symmetry
    assert symmetry is not None
    assert [symmetry.sizes[axis] for axis in symmetry.free] == [6]


def test_optimizers_of_single_parameters_share_what_is_cached_by_symmetry() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(40)))
    optimizers = [NFNOptimizer([p], rule=RULE) for p in model.parameters()]
    incidence_of.cache_clear()
    for _ in range(2):
        model(torch.ones(2, 3)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert incidence_of.cache_info().misses == 5  # weights of the first, the last and other layers; two kinds of bias
    assert [optimizer.names for optimizer in optimizers] == [(name,) for name, _ in model.named_parameters()]


def test_add_param_group_traces_again() -> None:
    model = net()
    optimizer = NFNOptimizer(model[0].parameters(), rule=RULE)
    train(model, optimizer)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.1})
    train(model, optimizer)
    assert optimizer.symmetry is not None
    assert optimizer.symmetry.canonical() == symmetry_of_net().canonical()
    steps = [optimizer.state[p]["step"].item() for p in model.parameters()]
    assert steps == [6, 6, 3, 3]
    with pytest.raises(ValueError, match="lr >= 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1.0})
    assert len(optimizer.param_groups) == 2


def test_parameters_may_be_exchanged_behind_the_back() -> None:
    first, second = net(), net()
    plain, exchanged = NFNOptimizer(first, rule=RULE), NFNOptimizer(second, rule=RULE)
    train(first, plain)
    train(second, exchanged)
    for layer in (second[0], second[2]):
        for name in ("weight", "bias"):
            old, new = getattr(layer, name), nn.Parameter(getattr(layer, name).detach().clone())
            setattr(layer, name, new)
            for group in exchanged.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            exchanged.state[new] = exchanged.state.pop(old)
    train(first, plain)
    train(second, exchanged)
    assert same(snapshot(plain), snapshot(exchanged))


def test_hooks_fire_once() -> None:
    model = net()
    fired: list[str] = []
    optimizer = NFNOptimizer(model, rule=RULE)
    optimizer.register_step_pre_hook(lambda *_: fired.append("before"))
    optimizer.register_step_post_hook(lambda *_: fired.append("after"))
    train(model, optimizer, 1)
    assert fired == ["before", "after"]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)  # replaces step on the instance, as accelerate does
    inner = optimizer.step

    def outer(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    optimizer.step = outer  # type: ignore[method-assign]
    train(model, optimizer, 1)
    assert fired == ["before", "after"] * 2
    twin, copied = copy.deepcopy((model, optimizer))
    train(twin, copied, 1)
    assert fired == ["before", "after"] * 2
    assert copied.state[twin[0].weight]["step"] == 3
