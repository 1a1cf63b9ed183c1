"""Where training would go wrong or stop in silence, the optimizer says so, once and in words that help."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from recording import mlp
from rules import random_rule
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from trained_net import net, train

from nfn_optim import NFNOptimizer
from nfn_optim.engine import inductor
from nfn_optim.optimizer.skipped_steps import MAX_IN_A_ROW, SkippedSteps

# ---------------------------------------------------------------------------------------- gradients that are not finite


@contextmanager
def warnings_of() -> Iterator[list[warnings.WarningMessage]]:
    """All warnings, however often."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def take(optimizer: torch.optim.Optimizer, bad: dict[int, float] | None = None) -> None:
    """One step with gradients of ones, but for some entries: number of the parameter -> value."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in enumerate(params):
        p.grad = torch.ones_like(p)
        if index in (bad or {}):
            p.grad.view(-1)[-1] = bad[index]  # type: ignore[index]
    optimizer.step()


def made(named: bool = True, **more: Any) -> NFNOptimizer:
    model = net()
    model(torch.ones(1, 4))
    return NFNOptimizer(model.named_parameters() if named else list(model.parameters()), rule="adamw", **more)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("earlier", [0, 5])
def test_one_warning_names_the_parameter(value: float, earlier: int) -> None:
    optimizer = made()
    for _ in range(earlier):
        take(optimizer)
    with warnings_of() as caught:
        for step in range(1, 201):
            take(optimizer, {2: value})
            assert len(caught) == (step >= MAX_IN_A_ROW)
    text = str(caught[0].message)
    assert "['2.weight']" in text
    assert f"{MAX_IN_A_ROW} times in a row" in text
    assert ("NaN" in text) == math.isnan(value)
    assert "set_detect_anomaly" in text
    assert "requires_grad_(False)" in text
    assert caught[0].filename == __file__
    assert 20 < MAX_IN_A_ROW < 100


def test_it_names_all_of_them_and_only_them() -> None:
    for named, expected in ((True, "['0.bias', '2.bias']"), (False, "['0.1', '0.3']")):
        optimizer = made(named)
        with warnings_of() as caught:
            for _ in range(40):
                take(optimizer, {1: math.nan, 3: math.inf})
        assert [expected in str(w.message) for w in caught] == [True]


def test_what_happens_now_and_then_is_no_reason() -> None:
    optimizer = made()
    for step in range(400):
        take(optimizer, {0: math.nan} if step % 25 else {})


def test_every_run_of_skipped_steps_is_told_once() -> None:
    optimizer = made()
    with warnings_of() as caught:
        for name in (0, 3):
            for _ in range(50):
                take(optimizer, {name: math.inf})
            take(optimizer)
    assert ["0.weight" in str(w.message) for w in caught] == [True, False]


def test_many_optimizers_each_say_their_own() -> None:
    model = net()
    optimizers = [NFNOptimizer([pair], rule="adamw") for pair in model.named_parameters()]
    with warnings_of() as caught:
        for _ in range(40):
            for index, optimizer in enumerate(optimizers):
                take(optimizer, {0: math.nan} if index == 1 else {})
    assert ["'0.bias'" in str(w.message) for w in caught if "in a row" in str(w.message)] == [True]


@pytest.mark.parametrize("scale", [2.0**16, 2.0**300])
def test_a_gradient_scaler_may_skip(scale: float) -> None:
    """It halves its scale until gradients are finite: hundreds of steps, of which the optimizer hears nothing."""
    model = net()
    optimizer = NFNOptimizer(model, rule="adamw")
    scaler = torch.amp.GradScaler("cpu", init_scale=min(scale, 2.0**127), growth_interval=5)
    for step in range(150):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        loss = loss * math.inf if step < 60 or step % 7 == 0 else loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.skipped_steps == 0


def test_scaling_by_hand_may_skip() -> None:
    optimizer = made()
    for skipped in (3, 16, MAX_IN_A_ROW - 1):
        for _ in range(skipped):
            take(optimizer, {0: math.inf})
        take(optimizer)


def test_copies_go_on_counting_alone() -> None:
    optimizer = made()
    for _ in range(20):
        take(optimizer, {0: math.nan})
    copied = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
    for _ in range(20):
        take(copied, {0: math.nan})


def test_a_masked_square_root() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    model.scale = nn.Parameter(torch.zeros(()))
    optimizer = NFNOptimizer(model)
    with warnings_of() as caught:
        for _ in range(60):
            y = model(torch.randn(8, 4)) + torch.where(torch.tensor(False), model.scale.sqrt(), torch.zeros(()))
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
    assert [str(w.message).count("'scale'") for w in caught] == [1]


def test_on_a_device_the_count_is_looked_at_when_it_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: it is copied at some step, and read at a later one."""
    monkeypatch.setattr("nfn_optim.optimizer.skipped_steps.LOOK_EVERY", 10)
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), math.nan)
    skipped = SkippedSteps()
    asked: list[int] = []

    def begin(counts: Tensor) -> Any:
        copied, born = counts.clone(), len(asked)
        return lambda: asked.append(0) or (copied if len(asked) >= born + 3 else None)  # type: ignore[func-returns-value]

    monkeypatch.setattr("nfn_optim.optimizer.skipped_steps.copy_to_host", begin)
    with warnings_of() as caught:
        for _ in range(100):
            skipped.note_on_device(torch.tensor(False), lambda: {"p": p}, stacklevel=1)
        skipped.note_on_device(torch.tensor(True), lambda: {"p": p}, stacklevel=1)
        for _ in range(20):
            skipped.note_on_device(torch.tensor(False), lambda: {"p": p}, stacklevel=1)
    assert ["['p'] is NaN" in str(w.message) for w in caught] == [True]
    assert len(asked) > 20
    assert skipped.collect() == 120
    assert skipped.collect() == 0


# ------------------------------------------------------------------------------------ arguments of other optimizers

HARMLESS: list[dict[str, Any]] = [
    {"betas": (0.9, 0.999)},
    {"betas": [0.9, 0.999]},
    {"betas": (torch.tensor(0.9), 0.999)},
    {"eps": 1e-8},
    {"amsgrad": False},
    {"foreach": None},
    {"foreach": False},
    {"fused": None},
    {"fused": False},
    {"capturable": False},
    {"differentiable": False},
    {"decoupled_weight_decay": True},
    {"decoupled_weight_decay": True, "weight_decay": 0.1},
    {"decoupled_weight_decay": False},
    {"betas": (0.9, 0.999), "eps": 1e-08, "amsgrad": False, "foreach": None, "capturable": False, "fused": None},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"betas": (0.9, 0.95)}, r"betas as \(0.9, 0.999\), found \(0.9, 0.95\).*leave betas out"),
    ({"betas": 0.9}, "betas"),
    ({"betas": None}, "betas"),
    ({"betas": (0.9,)}, "betas"),
    ({"betas": (0.9, 0.999, 0.99)}, "betas"),
    ({"betas": "ab"}, "betas"),
    ({"eps": 1e-6}, "eps as 1e-08, found 1e-06.*leave eps out"),
    ({"eps": 0.0}, "eps"),
    ({"eps": None}, "eps"),
    ({"amsgrad": True}, "amsgrad as False, found True.*torch.optim.AdamW"),
    ({"foreach": True}, "foreach as None, found True.*leave foreach out"),
    ({"fused": True}, "fused as None, found True.*compile=True"),
    ({"capturable": True}, "capturable.*CUDA graph"),
    ({"differentiable": True}, "nfn_optim.optimizer.differentiable"),
    ({"decoupled_weight_decay": False, "weight_decay": 0.1}, "decoupled.*L2 penalty"),
]


@pytest.mark.parametrize("given", HARMLESS, ids=str)
def test_arguments_that_mean_nothing(given: dict[str, Any]) -> None:
    model, other = net(), net()
    optimizer, plain = NFNOptimizer(model, 1e-3, **given), NFNOptimizer(other, 1e-3)
    decay = given.get("weight_decay", 0.0)
    plain.param_groups[0]["weight_decay"] = decay
    assert optimizer.param_groups[0].keys() == plain.param_groups[0].keys()
    train(model, optimizer)
    train(other, plain)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **given})
    NFNOptimizer([{"params": list(net().parameters()), **given}])


@pytest.mark.parametrize(("given", "says"), REFUSED, ids=str)
def test_arguments_that_would_mean_something(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        NFNOptimizer(net(), **given)
    with pytest.raises(ValueError, match=says):
        NFNOptimizer([{"params": list(net().parameters()), **given}])
    optimizer = NFNOptimizer(net())
    with pytest.raises(ValueError, match=says):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **given})
    assert len(optimizer.param_groups) == 1


def test_arguments_that_do_not_exist() -> None:
    for given in ({"momentum": 0.9}, {"nesterov": True}, {"learning_rate": 1.0}, {"fused": None, "rho": 1}):
        with pytest.raises(TypeError, match=r"unexpected keyword argument '(momentum|nesterov|learning_rate|rho)'.*lr"):
            NFNOptimizer(net(), **given)  # type: ignore[arg-type]


def test_betas_by_position() -> None:
    with pytest.raises(TypeError, match=r"weight_decay as a number.*\(0.9, 0.999\).*betas"):
        NFNOptimizer(net(), 1e-3, (0.9, 0.999))  # type: ignore[arg-type]


def test_groups_of_adamw_may_be_handed_over() -> None:
    theirs = torch.optim.AdamW(net().parameters(), lr=3e-4, weight_decay=0.1)
    optimizer = NFNOptimizer([{**group} for group in theirs.param_groups])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (3e-4, 0.1)
    optimizer.load_state_dict(torch.optim.AdamW(net().parameters(), fused=True, betas=(0.8, 0.9)).state_dict())
    OneCycleLR(NFNOptimizer(net(), betas=(0.9, 0.999)), 1e-2, total_steps=9)


# ---------------------------------------------------------------------------------------------------------- compilation


@pytest.fixture
def unannounced() -> Iterator[None]:
    inductor.announce.cache_clear()
    yield
    inductor.announce.cache_clear()


@pytest.mark.parametrize("compile", [None, True])
def test_compilation_is_announced_once_before_it_starts(
    compile: bool | None, unannounced: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the foreground."""
    monkeypatch.setattr("nfn_optim.engine.background.is_possible", lambda device: False)
    said: list[int] = []

    def compiled(*_: Any, **__: Any) -> Any:
        said.append(len(caplog.records))
        raise RuntimeError("not in this test")

    monkeypatch.setattr(inductor, "_compile", compiled)
    monkeypatch.setattr(inductor, "fail", lambda error: None)
    monkeypatch.setattr("nfn_optim.optimizer.optimizer.COMPILE_AFTER", 45 * 10**4)
    with caplog.at_level(logging.WARNING):
        for earlier in range(2):
            model = mlp()
            optimizer = NFNOptimizer(model, rule=random_rule(), compile=compile)
            for step in range(8):
                model(torch.ones(2, 3)).sum().backward()
                optimizer.step()
                assert bool(said) == bool(compile or step >= 4 or earlier)
    assert set(said) == {1}
    (record,) = caplog.records
    assert record.name.startswith("nfn_optim")
    for word in ("compiling", "once", "compile=False"):
        assert word in record.message
