"""Coefficients that are not refreshed at every step: in between, the cached ones are used, by all who use a rule."""

from __future__ import annotations

import io

import pytest
import rules
import torch
from rule_forms import FORMS, SYMMETRY, config_of, draw
from torch import Tensor, nn

from meta_train.tasks import MLPDistribution
from meta_train.unroll import start, unroll
from nfn_optim import NFNOptimizer, RuleConfig, Symmetry, UpdateRule
from nfn_optim.engine.moments import MOMENTS, State

EVERY = 3
COEFFICIENTS = ("row_coeffs", "gains")


def cached_rule(form: str = "adam") -> UpdateRule:
    """A rule of which nothing is zero, with a refresh at every third step."""
    config = config_of(form, hidden=6, power=0.5, refresh_every=EVERY)
    return rules.random_rule(0.1, config=config).double().requires_grad_(False)


def steps_of(
    rule: UpdateRule, params: dict[str, Tensor], symmetry: Symmetry = SYMMETRY, count: int = 8
) -> tuple[dict[str, Tensor], State]:
    """Some steps of the pure rule, on gradients that depend on the parameters."""
    state = rule.init(params)
    for step in range(count):
        grads = {n: params[n] - g for n, g in draw(step + 10).items()}
        update, state = rule(params, grads, state, symmetry, lr=0.01, refresh=rule.refreshes(step))
        params = {n: params[n] + update[n] for n in params}
    return params, state


def test_refreshes_are_at_the_first_steps_and_then_regular() -> None:
    assert [step for step in range(13) if cached_rule().refreshes(step)] == [0, 1, 2, 3, 6, 9, 12]
    assert all(UpdateRule().refreshes(step) for step in range(5))
    assert not UpdateRule.adamw().refreshes(0)
    with pytest.raises(ValueError, match="refresh_every"):
        RuleConfig(refresh_every=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_without_refresh_uses_the_cached_coefficients(form: str) -> None:
    """On the same moments, with the coefficients of a step with refresh, a step without makes the same update."""
    rule, params = cached_rule(form), draw(0)
    _, before = steps_of(rule, params, count=2)
    grads = draw(1)
    refreshed, after = rule(params, grads, before, SYMMETRY, lr=0.01, weight_decay=0.1)
    computed = {*COEFFICIENTS, "active_columns"}
    cached = {n: before[n] | {key: x for key, x in after[n].items() if key in computed} for n in params}
    reused, later = rule(params, grads, cached, SYMMETRY, lr=0.01, weight_decay=0.1, refresh=False)
    stale, _ = rule(params, grads, before, SYMMETRY, lr=0.01, weight_decay=0.1, refresh=False)
    for n in params:
        assert torch.equal(reused[n], refreshed[n])
        assert not torch.allclose(stale[n], refreshed[n], rtol=1e-6)
        assert all(torch.equal(later[n][key], after[n][key]) for key in MOMENTS)
        half = rule(params, grads, cached, SYMMETRY, lr=0.005, weight_decay=0.1, refresh=False)[0][n]
        torch.testing.assert_close(half, reused[n] / 2)  # the learning rate is that of the step


@pytest.mark.parametrize("form", FORMS)
def test_before_the_first_refresh_updates_are_adams(form: str) -> None:
    rule, params, grads = cached_rule(form), draw(0), draw(1)
    update, _ = rule(params, grads, rule.init(params), SYMMETRY, lr=0.01, weight_decay=0.1, refresh=False)
    adamw = UpdateRule.adamw()
    expected, _ = adamw(params, grads, adamw.init(params), SYMMETRY, lr=0.01, weight_decay=0.1)
    for n, u in update.items():
        torch.testing.assert_close(u, expected[n], rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_steps_without_refresh_are_equivariant(form: str) -> None:
    loose = Symmetry(SYMMETRY.dims, SYMMETRY.sizes)  # every axis free
    permutations = {axis: torch.randperm(n) for axis, n in SYMMETRY.sizes.items()}
    rule, params, grads = cached_rule(form), draw(0), draw(1)
    _, state = steps_of(rule, params, count=1)
    update, _ = rule(params, grads, state, SYMMETRY, lr=0.01, refresh=False)
    start = rule.init(loose.permute(params, permutations))
    _, moved = rule(
        loose.permute(params, permutations),
        loose.permute({n: params[n] - g for n, g in draw(10).items()}, permutations),
        start,
        SYMMETRY,
        lr=0.01,
    )
    found, _ = rule(
        loose.permute(params, permutations), loose.permute(grads, permutations), moved, SYMMETRY, lr=0.01, refresh=False
    )
    for n, expected in loose.permute(update, permutations).items():
        torch.testing.assert_close(found[n], expected, rtol=1e-9, atol=1e-12)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def train(model: nn.Module, optimizer: NFNOptimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_the_optimizer_takes_the_steps_of_the_rule() -> None:
    """In place, with refreshes at the same steps."""
    rule, model = cached_rule(), net()
    optimizer = NFNOptimizer(model, rule=rule, lr=0.01)
    refreshes = []
    handle = rule.network.register_forward_hook(lambda *_: refreshes.append(optimizer.param_groups[0]["steps_taken"]))
    train(model, optimizer, range(8))
    handle.remove()
    assert refreshes == [0, 1, 2, 3, 6]
    assert optimizer.symmetry is not None
    params = {n: p.detach() for n, p in net().named_parameters()}
    state = rule.init(params)
    for step in range(8):
        x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        torch.func.functional_call(net(), leaves, (x,)).square().mean().backward()
        grads = {n: p.grad for n, p in leaves.items() if p.grad is not None}
        update, state = rule(params, grads, state, optimizer.symmetry, lr=0.01, refresh=rule.refreshes(step))
        params = {n: params[n] + update[n] for n in params}
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), params[n], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("taken", [1, 4, 5])
def test_a_run_resumes_between_refreshes(taken: int) -> None:
    straight, resumed = net(), net()
    one = NFNOptimizer(straight, rule=cached_rule(), lr=0.01)
    train(straight, one, range(taken))
    file = io.BytesIO()
    torch.save((straight.state_dict(), one.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    resumed.load_state_dict(weights)
    other = NFNOptimizer(resumed, rule=cached_rule(), lr=0.5)
    other.load_state_dict(state)
    train(straight, one, range(taken, 10))
    train(resumed, other, range(taken, 10))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_parameter_that_comes_later_takes_steps_of_adam_until_the_next_refresh() -> None:
    model = net()
    model[2].bias.requires_grad_(False)
    optimizer = NFNOptimizer(model, rule=cached_rule(), lr=0.01)
    train(model, optimizer, range(4))
    before = model[2].bias.requires_grad_().detach().clone()
    train(model, optimizer, range(4, 5))
    torch.testing.assert_close((model[2].bias - before).abs(), torch.full_like(before, 0.01), rtol=1e-5, atol=0)


def test_meta_training_refreshes_where_the_optimizer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two windows, the second of which begins between refreshes."""
    generator = torch.Generator().manual_seed(0)
    task, rule, refreshed = MLPDistribution().sample(generator), cached_rule().float(), []
    forward = UpdateRule.forward
    monkeypatch.setattr(
        UpdateRule, "forward", lambda *args, **hypers: refreshed.append(hypers["refresh"]) or forward(*args, **hypers)
    )
    carry = start(rule, task, 2, 20, generator)
    for _ in range(2):
        carry = unroll(rule, task, carry, 5, generator).carry
    assert refreshed == [rule.refreshes(step) for step in range(10)]
