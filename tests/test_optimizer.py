"""Whatever works with AdamW works with NFNOptimizer: groups, schedulers, checkpoints, copies, and bad input."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from nfn_optim import pretrained
from nfn_optim.optimizer import NFNOptimizer
from nfn_optim.rule import UpdateRule
from nfn_optim.symmetry import Symmetry

Snapshot = tuple[list[Tensor], list[dict[str, Tensor]]]
X = torch.linspace(-1, 1, 20).reshape(5, 4)


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """One hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def random_rule() -> UpdateRule:
    """A rule of which nothing is zero."""
    generator, rule = torch.Generator().manual_seed(0), UpdateRule()
    with torch.no_grad():
        for value in rule.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return rule


RULE = random_rule()


def backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fresh gradients."""
    optimizer.zero_grad()
    model(X.to(next(model.parameters()).dtype)).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Some steps."""
    for _ in range(steps):
        backward(model, optimizer)
        optimizer.step()


def grad_of(p: Tensor) -> Tensor:
    """The gradient that is there."""
    assert p.grad is not None
    return p.grad


def snapshot(optimizer: torch.optim.Optimizer) -> Snapshot:
    """Copies of all parameters and of their state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [{key: value.clone() for key, value in optimizer.state.get(p, {}).items()} for p in params]
    return [p.detach().clone() for p in params], state


def same(one: Snapshot, other: Snapshot) -> bool:
    """Bit-equal, of the same dtypes."""
    pairs = [*zip(one[0], other[0], strict=True)]
    for a, b in zip(one[1], other[1], strict=True):
        if a.keys() != b.keys():
            return False
        pairs += [(a[key], b[key]) for key in a]
    return all(a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


# ------------------------------------------------------------------------------------------------------- construction

BAD_ARGUMENTS: dict[str, tuple[Callable[[], NFNOptimizer], type[Exception], str]] = {
    "no parameters": (lambda: NFNOptimizer([], rule=RULE), ValueError, "empty parameter list"),
    "module without parameters": (lambda: NFNOptimizer(nn.ReLU(), rule=RULE), ValueError, "empty parameter list"),
    "exhausted iterator": (lambda: NFNOptimizer(iter(()), rule=RULE), ValueError, "read only once"),
    "a tensor": (lambda: NFNOptimizer(torch.ones(2), rule=RULE), TypeError, "iterable"),
    "negative lr": (lambda: NFNOptimizer(net(), lr=-1.0, rule=RULE), ValueError, "expected lr >= 0 .* found -1"),
    "nan lr": (lambda: NFNOptimizer(net(), lr=float("nan"), rule=RULE), ValueError, "expected lr >= 0"),
    "vector lr": (lambda: NFNOptimizer(net(), lr=torch.ones(2), rule=RULE), ValueError, "one element"),
    "negative decay": (lambda: NFNOptimizer(net(), weight_decay=-1, rule=RULE), ValueError, "weight_decay >= 0"),
    "no horizon": (lambda: NFNOptimizer(net(), total_steps=0, rule=RULE), ValueError, "total_steps"),
    "half a step": (lambda: NFNOptimizer(net(), total_steps=1.5, rule=RULE), ValueError, "total_steps"),  # type: ignore[arg-type]
    "betas": (
        lambda: NFNOptimizer([{"params": [*net().parameters()], "betas": (0.8, 0.99)}], rule=RULE),
        ValueError,
        "part of the rule",
    ),
    "complex": (lambda: NFNOptimizer([torch.ones(2, dtype=torch.complex64)], rule=RULE), TypeError, "view_as_real"),
    "rule of a wrong type": (lambda: NFNOptimizer(net(), rule=nn.Linear(1, 1)), TypeError, "UpdateRule"),  # type: ignore[arg-type]
    "unknown rule": (lambda: NFNOptimizer(net(), rule="no such rule"), FileNotFoundError, "adamw"),
    "model of a wrong type": (lambda: NFNOptimizer(net().parameters(), model="m", rule=RULE), TypeError, "model="),  # type: ignore[arg-type]
    "symmetry of a wrong type": (lambda: NFNOptimizer(net(), symmetry={}, rule=RULE), TypeError, "symmetry="),  # type: ignore[arg-type]
    "symmetry of another shape": (
        lambda: NFNOptimizer(net(), symmetry=_symmetry(5), rule=RULE),
        ValueError,
        r"expected '0.weight' of shape \(5, 4\)",
    ),
    "symmetry of other names": (
        lambda: NFNOptimizer(net(), symmetry=_symmetry().rename({"0.bias": "b"}), rule=RULE),
        ValueError,
        "name every parameter, .'0.bias'. are not",
    ),
    "symmetry of another number": (
        lambda: NFNOptimizer(net()[0].parameters(), symmetry=_symmetry(), rule=RULE),
        ValueError,
        "symmetry of 2 tensors",
    ),
}


def _symmetry(hidden: int = 6) -> Symmetry:
    dims = {"0.weight": ("h", "in"), "0.bias": ("h",), "2.weight": ("out", "h"), "2.bias": ("out",)}
    return Symmetry(dims, {"h": hidden, "in": 4, "out": 3}, frozenset({"in", "out"}))


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
    optimizer = NFNOptimizer(params[how], rule=RULE, symmetry=_symmetry(), model=given)
    train(model, optimizer)
    assert optimizer.symmetry is not None
    assert optimizer.symmetry.dims == _symmetry().dims
    assert set(optimizer.names) == set(_symmetry().dims)


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


# ---------------------------------------------------------------------------------------------------------- bad input

POISON: dict[str, Callable[[Tensor], Tensor]] = {
    "one nan": lambda g: g.view(-1)[0].fill_(float("nan")),
    "one inf": lambda g: g.view(-1)[-1].fill_(float("inf")),
    "all -inf": lambda g: g.fill_(float("-inf")),
    "square overflows": lambda g: g.view(-1)[0].fill_(1e30),
}


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("earlier", [0, 2])
def test_a_bad_gradient_skips_the_step(poison: str, earlier: int) -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=RULE, weight_decay=0.1)
    train(model, optimizer, earlier)
    before = snapshot(optimizer)
    for count in (1, 2):
        backward(model, optimizer)
        POISON[poison](grad_of(list(model.parameters())[-1]))
        optimizer.step()
        assert optimizer.skipped_steps == count
    assert same(snapshot(optimizer), before)
    train(model, optimizer, 1)
    assert optimizer.skipped_steps == 2
    assert all(value.isfinite().all() for value in snapshot(optimizer)[0])
    assert not same(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"][0]["skipped_steps"] == 2


def test_large_gradients_are_not_skipped() -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=RULE)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e18)
    with pytest.warns(UserWarning, match="no forward"):
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = NFNOptimizer(model, rule=RULE)
    torch.autograd.backward(model(torch.tensor([1, 2])).sum())
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"sparse.*SparseAdam"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


def test_learning_rate_of_zero_changes_no_bit() -> None:
    model = net()
    with torch.no_grad():
        list(model.parameters())[1].fill_(-0.0)
    optimizer = NFNOptimizer(model, lr=0.0, weight_decay=0.1, rule=RULE)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # as a checkpoint does to make the state: before any forward, and not a warning
    assert same(([p.detach() for p in model.parameters()], []), (before, []))
    assert all(set(optimizer.state[p]) == set(RULE.init({"p": p})["p"]) for p in model.parameters())
    train(model, optimizer)
    assert same(([p.detach() for p in model.parameters()], []), (before, []))


def test_zero_gradients_do_nothing() -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=RULE, symmetry=_symmetry())
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


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
    assert all((p < 1).all() for p in params[1:])


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


def test_add_param_group_traces_again() -> None:
    model = net()
    optimizer = NFNOptimizer(model[0].parameters(), rule=RULE)
    train(model, optimizer)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.1})
    train(model, optimizer)
    assert optimizer.symmetry is not None
    assert optimizer.symmetry.canonical() == _symmetry().canonical()
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


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=6, cycle_momentum=False),
    "OneCycleLR with momentum": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=6),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers(scheduler: str, as_tensor: bool) -> None:
    ours, theirs = net(), net()

    def lr() -> Any:
        return torch.tensor(3e-3) if as_tensor else 3e-3

    rates: list[float] = []
    expected: list[float] = []
    one = NFNOptimizer(ours, lr=lr(), rule="adamw")
    other = torch.optim.AdamW(theirs.parameters(), lr=lr(), weight_decay=0.0, foreach=False)
    for model, optimizer, seen in ((ours, one, rates), (theirs, other, expected)):
        schedule = SCHEDULERS[scheduler](optimizer)
        for _ in range(5):
            train(model, optimizer, 1)
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            seen.append(float(optimizer.param_groups[0]["lr"]))
    assert rates == expected
    assert len(set(rates)) > 1
    if "momentum" not in scheduler:  # which AdamW would follow
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- saving and copying


def through_file(value: Any) -> Any:
    """Saved and loaded as a checkpoint is, without pickle."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_bit_exact(dtype: torch.dtype) -> None:
    straight, resumed = net(dtype), net(dtype, seed=1)
    one = NFNOptimizer(straight, rule=RULE, weight_decay=0.1, total_steps=7)
    train(straight, one, 3)
    backward(straight, one)
    grad_of(next(straight.parameters())).fill_(float("nan"))
    one.step()
    saved = through_file({"model": straight.state_dict(), "optimizer": one.state_dict()})
    other = NFNOptimizer(resumed.parameters(), lr=0.5, rule=RULE)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(state_dict=saved["optimizer"])
    assert same(snapshot(one), snapshot(other))
    assert (other.skipped_steps, other.param_groups[0]["total_steps"], other.param_groups[0]["lr"]) == (1, 7, 1e-3)
    train(straight, one, 4)
    train(resumed, other, 4)
    assert same(snapshot(one), snapshot(other))
    assert one.fallbacks == other.fallbacks


def test_loading_copies_and_runs_hooks_once() -> None:
    model = net()
    seen: list[int] = []
    optimizer = NFNOptimizer(model, rule=RULE)
    train(model, optimizer)
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(len(state["state"])))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    kept = saved["state"][0]["exp_avg"].clone()
    optimizer.load_state_dict(saved)
    train(model, optimizer)
    assert seen == [4, 4]
    assert torch.equal(saved["state"][0]["exp_avg"], kept)


def _other_width(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg"] = torch.zeros(7, 4)


def _other_rule(saved: dict[str, Any]) -> None:
    saved["state"][0]["momentum_buffer"] = torch.zeros(6, 4)


def _other_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})


def _other_number(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_width, "another model"),
        (_other_rule, "the rule that it was saved with"),
        (_other_groups, "different number of parameter groups"),
        (_other_number, "doesn't match the size"),
    ],
)
def test_another_state_is_refused(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=RULE)
    train(model, optimizer)
    saved = through_file(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.7
    spoil(saved)
    before, lr = snapshot(optimizer), optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert same(snapshot(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == lr
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_a_state_of_adamw_is_taken_over() -> None:
    ours, theirs = net(), net()
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    train(theirs, adamw)
    ours.load_state_dict(theirs.state_dict())
    optimizer = NFNOptimizer(ours, rule="adamw")
    optimizer.load_state_dict(adamw.state_dict())
    train(theirs, adamw)
    train(ours, optimizer)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_go_on_alike(how: str, steps: int) -> None:
    model = net()
    optimizer = NFNOptimizer(model, rule=RULE, total_steps=9)
    train(model, optimizer, steps)
    twin, copied = COPIES[how]((model, optimizer))
    assert copied.rule is not RULE
    assert repr(copied) == repr(optimizer)
    train(model, optimizer)
    train(twin, copied)
    assert same(snapshot(optimizer), snapshot(copied))
    assert copied.symmetry == optimizer.symmetry
    assert copied.names == optimizer.names
