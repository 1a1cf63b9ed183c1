"""Steps in place, in tiles or compiled, equal the pure rule: whole trajectories, whatever the shapes and layouts."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from arrays import SYMMETRY, draw
from compiler import compiler
from rule_forms import config_of
from rules import random_rule
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from zoo import BY_NAME

from nfn_optim import NFNOptimizer
from nfn_optim.engine import inductor
from nfn_optim.engine.blocks import blocks_of
from nfn_optim.engine.executor import Execution, InPlaceExecutor
from nfn_optim.engine.inductor import Call
from nfn_optim.engine.moments import moment_constants
from nfn_optim.engine.passes import ALL_TERMS, Terms
from nfn_optim.engine.weight_features import WeightFeatures
from nfn_optim.rule import RuleConfig, UpdateRule
from nfn_optim.symmetry import Symmetry


def trajectories(
    rule: UpdateRule, execution: Execution, params: dict[str, Tensor], steps: int
) -> list[dict[str, Tensor]]:
    """Parameters and state from the same start, of the pure rule and in place, independently of each other."""
    found = []
    for in_place in (False, True):
        now = {n: p.clone() for n, p in params.items()}
        state = rule.init(now)
        for step in range(steps):
            grads = {n: (now[n] - g).to(now[n].dtype) for n, g in draw(step + 10).items()}
            with torch.no_grad():
                hypers = {"lr": 0.01, "weight_decay": 0.1, "refresh": rule.refreshes(step)}
                if in_place:
                    rule.step_(now, grads, state, SYMMETRY, **hypers, execution=execution)
                else:
                    update, state = rule(now, grads, state, SYMMETRY, **hypers)
                    now = {n: p + update[n] for n, p in now.items()}
        found.append(now | {f"{n}.{key}": value for n, s in state.items() for key, value in s.items()})
    return found


CONFIGS = {
    "cached": RuleConfig(refresh_every=2),
    "orthogonal": RuleConfig(refresh_every=2, direction="orthogonal", rank=3, adapt_rate=4.0),
}


@pytest.mark.parametrize("form", ["adam", "cached", "orthogonal", "adamw"])
def test_in_place_is_pure(form: str) -> None:
    """To the last bit in one tile; in tiles of two rows, sums over columns are added up in another order."""
    rule = UpdateRule.adamw() if form == "adamw" else random_rule()
    if form in CONFIGS:
        rule = random_rule(0.1, config=CONFIGS[form])
    pure, in_place = trajectories(rule, Execution(), draw(0), 5)
    assert all(torch.equal(in_place[n], value) for n, value in pure.items())
    rule = rule.double()
    pure, tiled = trajectories(rule, Execution(tile=1), draw(0, torch.float64), 5)
    assert all(torch.allclose(tiled[n], value, rtol=1e-9, atol=1e-12) for n, value in pure.items())


HANDMADE = RuleConfig(
    direction="orthogonal",
    rank=3,
    exact=True,
    hidden=0,
    rounds=0,
    gain=3.0,
    power=0.5,
    mixes=True,
    gradient_part=0.2,
    whitening=0.5,
    minimax_roots=True,
    refresh_every=2,
)


@pytest.mark.parametrize(
    ("config", "bias", "terms"),
    [
        (HANDMADE, None, {"adam", "gradient"}),
        (HANDMADE, "slow", {"adam", "gradient", "slow"}),
        (HANDMADE, "momentum", {"adam", "gradient", "momentum"}),
        (replace(HANDMADE, mixes=False, gradient_part=0.0), "slow", {"adam", "slow"}),
        (replace(HANDMADE, hidden=4), None, ALL_TERMS),
    ],
)
def test_what_updates_are_not_made_of_makes_no_difference(config: RuleConfig, bias: str | None, terms: Terms) -> None:
    rule = UpdateRule(config).double()
    if bias is not None:
        with torch.no_grad():
            rule.network.message_passing.tensor_bias[WeightFeatures._fields.index(bias)] = 0.1
    assert rule.terms() == terms
    pure, in_place = trajectories(rule, Execution(tile=1, terms=rule.terms()), draw(1, torch.float64), 6)
    for name, value in pure.items():
        torch.testing.assert_close(in_place[name], value, msg=name)


def test_an_optimizer_notices_that_its_rule_has_changed() -> None:
    """Gains of columns are left out until one of them is not 1."""

    def train(model: nn.Linear, optimizer: NFNOptimizer, first: int) -> None:
        for step in range(first, first + 4):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    model, symmetry = nn.Linear(5, 4), Symmetry.separate({"weight": (4, 5), "bias": (4,)})
    optimizer = NFNOptimizer(model, lr=0.1, symmetry=symmetry, rule=UpdateRule(HANDMADE), compile=False)
    train(model, optimizer, 0)
    unchanged = deepcopy(model)
    kept = NFNOptimizer(unchanged, lr=0.1, symmetry=symmetry, rule=UpdateRule(HANDMADE), compile=False)
    kept.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        optimizer.rule.network.message_passing.row_skip["column"].weight.fill_(0.3)
    fresh = deepcopy(model)
    resumed = NFNOptimizer(fresh, lr=0.1, symmetry=symmetry, rule=deepcopy(optimizer.rule), compile=False)
    resumed.load_state_dict(optimizer.state_dict())
    for of_model, of_optimizer in ((model, optimizer), (fresh, resumed), (unchanged, kept)):
        train(of_model, of_optimizer, 4)
    assert torch.equal(model.weight, fresh.weight)
    assert not torch.equal(model.weight, unchanged.weight)


@pytest.mark.parametrize("form", ["adam", "orthogonal", "mixture"])
@pytest.mark.parametrize("memory", ["channels last", "transposed", "a view"])
def test_the_layout_in_memory_does_not_matter(memory: str, form: str) -> None:
    params = draw(0, torch.float64)
    if memory == "channels last":
        params["k"] = params["k"].to(memory_format=torch.channels_last)
    elif memory == "transposed":
        params["w"] = params["w"].T.contiguous().T
    else:
        params["w"] = torch.stack([params["w"], params["w"]], -1)[..., 0]
    rule = random_rule(0.1, config=config_of(form)).double()
    pure, in_place = trajectories(rule, Execution(tile=20), params, 4)
    expected, _ = trajectories(rule, Execution(), draw(0, torch.float64), 4)
    for n, value in expected.items():
        torch.testing.assert_close(pure[n], value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(in_place[n], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["orthogonal", "mixture"])
def test_what_is_compiled_gets_contiguous_tensors(form: str) -> None:
    """Others are not compiled."""
    found: list[bool] = []

    def run(function: Callable[..., Any], *args: Any, dynamic: bool = True) -> Any:
        found.append(Call(function, args, dynamic=dynamic).is_contiguous())
        return function(*args)

    rule = random_rule(0.1, config=config_of(form)).double()
    trajectories(rule, Execution(compiled=True, compile_from=1, tile=20, run=run), draw(0, torch.float64), 4)
    assert len(found) > 4
    assert all(found)


def test_memory_is_bounded_by_the_tile() -> None:
    """A step holds twenty numbers for each weight of a tile, not of the tensor."""
    model = nn.Linear(1000, 400)
    optimizer = NFNOptimizer(
        model, rule=random_rule(), symmetry=Symmetry.separate({"weight": (400, 1000), "bias": (400,)})
    )
    most = {}
    for tile in (2**14, 2**20):
        optimizer._execution = lambda *_, tile=tile: Execution(tile=tile)  # type: ignore[method-assign]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            optimizer.step()
        now = most[tile] = 0
        for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                now += event.nbytes()
                most[tile] = max(most[tile], now)
    assert most[2**14] < 4 * 25 * 2**14 + 2_000_000  # and what is held for neurons
    assert most[2**20] > 3 * most[2**14]


# ------------------------------------------------------------------------------------------------------------- compiled


def train(name: str, dtype: torch.dtype, rank: int, *, compiled: bool = False, disturbance: float = 0.0) -> Tensor:
    """The parameters of a network of the zoo after 200 steps, in one vector."""
    network = BY_NAME[name]
    model = network.module().to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in network.inputs()]
    optimizer = NFNOptimizer(model, rule=random_rule(0.1, rank=rank, seed=1))
    optimizer._execution = lambda *_: Execution(compiled=compiled, compile_from=30)  # type: ignore[method-assign]
    for _ in range(200):
        optimizer.zero_grad()
        torch.autograd.backward((model(*inputs).float() - 1).square().mean())
        for p in model.parameters():
            if p.grad is not None and disturbance:
                p.grad.mul_(1 + disturbance)
        optimizer.step()
    assert optimizer.fallbacks == optimizer.skipped_steps == 0
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


@pytest.mark.exhaustive
@compiler
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("empty_cache")
def test_compiled_training_is_uncompiled_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 steps of several networks, full precision and bfloat16, in a handful of graphs.

    Training amplifies rounding; so the two may part as far as two uncompiled runs do of which one has gradients that
    differ in the last digits. In bfloat16 a last digit is 1 / 256.
    """
    monkeypatch.setattr(
        "nfn_optim.optimizer.optimizer.is_small", lambda _: False
    )  # of small networks whole steps are compiled
    cases = (
        ("residual_cnn", torch.float32, 3e-7, 0),
        ("attention", torch.float32, 3e-7, 4),
        ("bias_free_mlp_on_images", torch.bfloat16, 4e-3, 0),
    )
    for number, (name, dtype, digit, rank) in enumerate(cases, 1):
        plain = train(name, dtype, rank)
        apart = (train(name, dtype, rank, compiled=True) - plain).norm() / plain.norm()
        allowed = (train(name, dtype, rank, disturbance=digit) - plain).norm() / plain.norm()
        assert apart < max(3 * allowed, digit), name
        # whatever the shapes; and one more for message passing in each network
        passes = (5 if dtype == torch.float32 else 8) + 3 * (number > 1)  # orthogonal directions
        assert number < inductor.graph_count() <= passes + number, name


@compiler
@pytest.mark.usefixtures("empty_cache")
def test_failing_compilation_warns_once_and_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    params, grads, rule = draw(0), draw(1), random_rule()
    monkeypatch.setattr(inductor, "_failures", [])
    inductor.load()
    monkeypatch.setattr(torch._inductor, "compile", refuse)
    expected = {n: p.clone() for n, p in params.items()}
    rule = rule.requires_grad_(False)
    rule.step_(expected, grads, rule.init(params), SYMMETRY, lr=0.01)
    with pytest.warns(UserWarning, match="could not be compiled") as caught:
        execution = Execution(compiled=True, compile_from=0)
        rule.step_(params, grads, rule.init(params), SYMMETRY, lr=0.01, execution=execution)
    assert len(caught) == 1
    assert all(torch.allclose(p, expected[n], rtol=1e-5) for n, p in params.items())


CPU = torch.device("cpu")


def test_compilation_waits_until_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never waits where it is asked for."""
    model = nn.Linear(3, 2)
    monkeypatch.setattr("nfn_optim.optimizer.optimizer.COMPILE_AFTER", 25)
    monkeypatch.setattr("nfn_optim.optimizer.optimizer.MIN_WORK", 6)
    monkeypatch.setattr("nfn_optim.optimizer.optimizer.can_compile", lambda: True)
    patient, eager, never = (NFNOptimizer(model, rule="adamw", compile=how) for how in (None, True, False))
    assert [patient._execution(8, CPU).compiled for _ in range(5)] == [False, False, False, True, True]
    small = NFNOptimizer(model, rule="adamw")
    assert [small._execution(2, CPU).compiled for _ in range(6)] == [False, False, False, False, True, True]
    assert eager._execution(8, CPU).compiled
    assert not any(never._execution(8, CPU).compiled for _ in range(5))
    monkeypatch.setattr("nfn_optim.optimizer.optimizer.can_compile", lambda: False)
    assert not patient._execution(8, CPU).compiled


def refuse(*_: object, **__: object) -> None:
    """A compiler that fails."""
    raise RuntimeError("no")


STACKED = Symmetry(
    {
        "a": ("h0", "in"),
        "b": ("h1", "h0"),
        "c": ("h2", "h1"),
        "d": ("h3", "h2"),
        "bias": ("h1",),
        "k": ("o", "h3", "t"),
        "l": ("p", "h2", "u"),
    },
    {"h0": 6, "h1": 6, "h2": 6, "h3": 6, "in": 6, "o": 5, "p": 5, "t": 3, "u": 3},
)


@pytest.mark.parametrize("rank", [0, 4, 32])
def test_small_matrices_of_one_shape_are_stacked(rank: int) -> None:
    """Five and two in a stack, one of them in another layout, two that do not move: the same as one by one."""
    torch.manual_seed(1)  # with 0 the signs of b's first gradient have rank 5, so that a basis is left to rounding
    params = {n: torch.randn(STACKED.shape_of(n), dtype=torch.float64) for n in STACKED.dims}
    params["d"] = params["d"].T.contiguous().T
    rule = random_rule(rank=rank).double().requires_grad_(False)
    found = []
    for how in (Execution(), Execution(compile_from=0)):
        now = {n: p.clone() for n, p in params.items()}
        state = rule.init(now)
        for _ in range(5):
            grads = {n: p.sin() + 0.1 for n, p in now.items()}
            rates = {n: 0.0 if n in ("b", "l") else 0.01 for n in now}
            rule.step_(now, grads, state, STACKED, lr=rates, weight_decay=0.1, execution=how)
        found.append(now | {f"{n}.{key}": value for n, s in state.items() for key, value in s.items()})
    for n, value in found[0].items():
        torch.testing.assert_close(found[1][n], value, rtol=1e-7, atol=1e-9)
    assert torch.equal(found[0]["b"], params["b"])
    assert not torch.equal(found[0]["a"], params["a"])


def test_features_of_small_blocks_are_cached_up_to_a_tile() -> None:
    params = [torch.zeros(4, 4), torch.zeros(2, 3), torch.zeros(10, 10)]
    blocks = blocks_of([[p] * 5 for p in params], moment_constants(torch.ones(3)), 0)

    def cached(execution: Execution) -> list[int]:
        return sorted(InPlaceExecutor(blocks, execution)._cache)

    assert cached(Execution(tile=30)) == [0, 1]
    assert cached(Execution(tile=5)) == []
    assert cached(Execution(compiled=True, compile_from=10)) == [1]
