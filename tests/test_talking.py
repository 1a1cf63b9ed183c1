"""Neurons that do not talk at every step: in between, weights act on what was said last, wherever the rule is used."""

from __future__ import annotations

import io

import pytest
import torch
from test_rule import FORMS, SYMMETRY, config_of, draw
from torch import Tensor, nn

from meta_train.tasks import MLPDistribution
from meta_train.unroll import start, unroll
from nfn_optim import NFNOptimizer, RuleConfig, Symmetry, UpdateRule
from nfn_optim.engine.moments import MOMENTS, State

EVERY = 3


def sparse_rule(form: str = "linear") -> UpdateRule:
    """A rule of which nothing is zero, whose neurons talk at every third step."""
    torch.manual_seed(0)
    rule = UpdateRule(config_of(form, hidden=6, power=0.5, talk_every=EVERY)).double()
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return rule.requires_grad_(False)


def steps_of(
    rule: UpdateRule, params: dict[str, Tensor], symmetry: Symmetry = SYMMETRY, count: int = 8
) -> tuple[dict[str, Tensor], State]:
    """Some steps of the pure rule, on gradients that depend on the parameters."""
    state = rule.init(params)
    for step in range(count):
        grads = {n: params[n] - g for n, g in draw(step + 10).items()}
        update, state = rule(params, grads, state, symmetry, lr=0.01, talk=rule.talks(step))
        params = {n: params[n] + update[n] for n in params}
    return params, state


def test_neurons_talk_at_the_first_steps_and_then_regularly() -> None:
    assert [step for step in range(13) if sparse_rule().talks(step)] == [0, 1, 2, 3, 6, 9, 12]
    assert all(UpdateRule().talks(step) for step in range(5))
    assert not UpdateRule.nominal().talks(0)
    with pytest.raises(ValueError, match="talk_every"):
        RuleConfig(talk_every=0)


@pytest.mark.parametrize("form", FORMS)
def test_in_silence_weights_act_on_what_was_said_last(form: str) -> None:
    """On the same moments, a silent step makes of the same words what the step made that heard them said."""
    rule, params = sparse_rule(form), draw(0)
    _, before = steps_of(rule, params, count=2)
    grads = draw(1)
    spoken, after = rule(params, grads, before, SYMMETRY, lr=0.01, weight_decay=0.1)
    heard = {n: before[n] | {key: after[n][key] for key in ("words", "gains")} for n in params}
    silent, later = rule(params, grads, heard, SYMMETRY, lr=0.01, weight_decay=0.1, talk=False)
    stale, _ = rule(params, grads, before, SYMMETRY, lr=0.01, weight_decay=0.1, talk=False)
    for n in params:
        assert torch.equal(silent[n], spoken[n])
        assert not torch.allclose(stale[n], spoken[n], rtol=1e-6)
        assert all(torch.equal(later[n][key], after[n][key]) for key in MOMENTS)
        half = rule(params, grads, heard, SYMMETRY, lr=0.005, weight_decay=0.1, talk=False)[0][n]
        torch.testing.assert_close(half, silent[n] / 2)  # the learning rate is that of the step


@pytest.mark.parametrize("form", FORMS)
def test_before_anything_was_said_weights_act_as_adam_says(form: str) -> None:
    rule, params, grads = sparse_rule(form), draw(0), draw(1)
    update, _ = rule(params, grads, rule.init(params), SYMMETRY, lr=0.01, weight_decay=0.1, talk=False)
    nominal = UpdateRule.nominal()
    expected, _ = nominal(params, grads, nominal.init(params), SYMMETRY, lr=0.01, weight_decay=0.1)
    for n, u in update.items():
        torch.testing.assert_close(u, expected[n], rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_silence_is_equivariant(form: str) -> None:
    loose = Symmetry(SYMMETRY.dims, SYMMETRY.sizes)  # every axis free
    permutations = {axis: torch.randperm(n) for axis, n in SYMMETRY.sizes.items()}
    rule, params, grads = sparse_rule(form), draw(0), draw(1)
    _, state = steps_of(rule, params, count=1)
    update, _ = rule(params, grads, state, SYMMETRY, lr=0.01, talk=False)
    start = rule.init(loose.permute(params, permutations))
    _, moved = rule(
        loose.permute(params, permutations),
        loose.permute({n: params[n] - g for n, g in draw(10).items()}, permutations),
        start,
        SYMMETRY,
        lr=0.01,
    )
    found, _ = rule(
        loose.permute(params, permutations), loose.permute(grads, permutations), moved, SYMMETRY, lr=0.01, talk=False
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
    """In place, banded or not, with silence where the rule is silent."""
    rule, model = sparse_rule(), net()
    optimizer = NFNOptimizer(model, rule=rule, lr=0.01)
    said = []
    handle = rule.gains.register_forward_hook(lambda *_: said.append(optimizer.param_groups[0]["steps_taken"]))
    train(model, optimizer, range(8))
    handle.remove()
    assert said == [0, 1, 2, 3, 6]
    assert optimizer.symmetry is not None
    params = {n: p.detach() for n, p in net().named_parameters()}
    state = rule.init(params)
    for step in range(8):
        x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        torch.func.functional_call(net(), leaves, (x,)).square().mean().backward()
        grads = {n: p.grad for n, p in leaves.items() if p.grad is not None}
        update, state = rule(params, grads, state, optimizer.symmetry, lr=0.01, talk=rule.talks(step))
        params = {n: params[n] + update[n] for n in params}
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), params[n], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("taken", [1, 4, 5])
def test_a_run_resumes_in_the_middle_of_a_silence(taken: int) -> None:
    straight, resumed = net(), net()
    one = NFNOptimizer(straight, rule=sparse_rule(), lr=0.01)
    train(straight, one, range(taken))
    file = io.BytesIO()
    torch.save((straight.state_dict(), one.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    resumed.load_state_dict(weights)
    other = NFNOptimizer(resumed, rule=sparse_rule(), lr=0.5)
    other.load_state_dict(state)
    train(straight, one, range(taken, 10))
    train(resumed, other, range(taken, 10))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_parameter_that_comes_later_takes_steps_of_adam_until_the_neurons_talk() -> None:
    model = net()
    model[2].bias.requires_grad_(False)
    optimizer = NFNOptimizer(model, rule=sparse_rule(), lr=0.01)
    train(model, optimizer, range(4))
    before = model[2].bias.requires_grad_().detach().clone()
    train(model, optimizer, range(4, 5))
    torch.testing.assert_close((model[2].bias - before).abs(), torch.full_like(before, 0.01), rtol=1e-5, atol=0)


def test_meta_training_is_silent_where_the_optimizer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two windows, the second of which begins in a silence."""
    generator = torch.Generator().manual_seed(0)
    task, rule, talked = MLPDistribution().sample(generator), sparse_rule().float(), []
    forward = UpdateRule.forward
    monkeypatch.setattr(
        UpdateRule, "forward", lambda *args, **hypers: talked.append(hypers["talk"]) or forward(*args, **hypers)
    )
    carry = start(rule, task, 2, 20, generator)
    for _ in range(2):
        carry = unroll(rule, task, carry, 5, generator).carry
    assert talked == [rule.talks(step) for step in range(10)]
