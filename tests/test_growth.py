"""The growth of steps: with what agrees, against what oscillates, and no further than it may."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from nfn_optim import NFNOptimizer, RuleConfig, Symmetry, UpdateRule
from nfn_optim.engine.moments import BETA_SLOW, CLIP
from nfn_optim.rule.step_size import GROWTH_AGE, MOST_GROWTH, OTHERS, agreement, grown

SYMMETRY = Symmetry.separate({"w": (30, 20), "b": (5,)})


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(SYMMETRY.shape_of(n), generator=generator, dtype=torch.float64) for n in SYMMETRY.dims}


def growing(growth: float = 4.0, waning: float = 0.0) -> UpdateRule:
    """A rule that does nothing but grow."""
    return UpdateRule(RuleConfig(hidden=1, rounds=0, growth=growth, waning=waning)).double()


def grow(rule: UpdateRule, gradients: list[dict[str, Tensor]]) -> dict[str, float]:
    """The growth of every tensor after these gradients."""
    params = draw(0)
    state = rule.init(params)
    with torch.no_grad():
        for grads in gradients:
            _, state = rule(params, grads, state, SYMMETRY, lr=0.01)
    return {n: s["growth"].item() for n, s in state.items()}


def test_the_agreement_is_the_cosine_between_a_gradient_and_those_before_it() -> None:
    """Found again from the gradients themselves; small tensors hear of large ones."""
    torch.manual_seed(0)
    drift = draw(1)
    gradients = [{n: drift[n] + g for n, g in draw(step + 2).items()} for step in range(12)]
    slow = {n: torch.zeros_like(g) for n, g in drift.items()}
    second = {n: torch.zeros_like(g) for n, g in drift.items()}
    growth = dict.fromkeys(drift, 0.0)
    for step, grads in enumerate(gradients, 1):
        own = {}
        for n, g in grads.items():
            second[n] = 0.999 * second[n] + 0.001 * g * g
            root = (second[n] / (1 - 0.999**step)).sqrt()
            old, new = slow[n] / root, (g / root).clamp(-CLIP, CLIP)
            own[n] = ((old * new).sum() / (old.norm() * new.norm() + 1e-30)).item()
            slow[n] = BETA_SLOW * slow[n] + (1 - BETA_SLOW) * g
        trust = {n: g.numel() / (g.numel() + OTHERS) for n, g in grads.items()}
        common = sum(trust[n] * own[n] for n in own) / sum(trust.values())
        for n in growth:
            agreed = trust[n] * own[n] + (1 - trust[n]) * common
            growth[n] += math.log(1 + 1 / (step - 1 + GROWTH_AGE)) * (4.0 * agreed - 0.4)
        if step in {2, 12}:
            assert grow(growing(waning=0.4), gradients[:step]) == pytest.approx(growth, rel=1e-6)
    assert growth["w"] > 0.1


def test_steps_grow_where_gradients_agree_and_shrink_where_they_turn_round() -> None:
    one, noise = draw(1), [draw(step) for step in range(60)]
    along, to_and_fro = [one] * 60, [{n: (-1) ** k * g for n, g in one.items()} for k in range(60)]
    assert all(value > 1 for value in grow(growing(), along).values())
    assert all(value < -0.5 for value in grow(growing(), to_and_fro).values())
    assert all(abs(value) < 0.3 for value in grow(growing(), noise).values())
    assert all(value < 0 for value in grow(growing(waning=0.8), noise).values())


def test_updates_are_multiplied_by_it() -> None:
    """With a growth of g the steps of AdamW are exp(g) times as long."""
    rule, params, grads = growing(), draw(0), draw(1)
    state = rule.init(params)
    plain, _ = rule(params, grads, state, SYMMETRY, lr=0.01)
    state["w"]["growth"] += 0.7
    longer, after = rule(params, grads, state, SYMMETRY, lr=0.01)
    torch.testing.assert_close(longer["w"], math.exp(0.7) * plain["w"])
    torch.testing.assert_close(longer["b"], plain["b"])
    assert after["w"]["growth"].item() == pytest.approx(0.7)  # nothing is known at the first step


def test_it_ends_somewhere() -> None:
    assert all(value == MOST_GROWTH for value in grow(growing(1e3), [draw(1)] * 20).values())
    zeros = {n: torch.zeros_like(g) for n, g in draw(1).items()}
    assert all(value == 0 for value in grow(growing(), [zeros] * 20).values())
    broken = {n: torch.full_like(g, torch.inf) for n, g in draw(1).items()}
    assert all(math.isfinite(value) for value in grow(growing(), [draw(1), broken, draw(2)]).values())


def test_it_adds_up_over_the_logarithm_of_time_however_rarely_neurons_talk() -> None:
    often = rarely = torch.zeros(1)
    power = torch.tensor([0.5])
    for taken in range(400):
        steps = torch.tensor([taken + 1.0])
        often = grown(often, power, steps, 1)
        if taken < 4 or taken % 4 == 0:
            rarely = grown(rarely, power, steps, 4)
    assert rarely.item() == pytest.approx(often.item(), rel=0.01)
    assert often.item() == pytest.approx(0.5 * math.log((400 + GROWTH_AGE) / GROWTH_AGE), rel=0.01)


def test_nothing_agrees_with_nothing() -> None:
    whole = torch.full((3, 6), torch.nan)
    assert agreement(whole, torch.full((3,), 5.0), torch.tensor([4.0, 0.0, 1.0])).tolist() == [0, 0, 0]


def test_without_it_nothing_is_kept() -> None:
    """And with the learned part at zero it has no effect."""
    assert "growth" not in UpdateRule().init(draw(0))["w"]
    with pytest.raises(ValueError, match="growth"):
        RuleConfig(growth=-1.0)
    with pytest.raises(ValueError, match="growth"):
        RuleConfig(hidden=0, growth=1.0)
    with pytest.raises(ValueError, match="waning"):
        RuleConfig(waning=1.0)
    assert set(grow(growing().zero_(), [draw(1)] * 5).values()) == {0.0}


def test_it_is_saved_with_the_state() -> None:
    model = torch.nn.Linear(20, 10)

    def train(optimizer: NFNOptimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(model(torch.ones(4, 20)).square().mean())
            optimizer.step()

    optimizer = NFNOptimizer(model, rule=growing().float())
    train(optimizer, 10)
    start = {n: p.clone() for n, p in model.state_dict().items()}
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["growth"].item() != 0
    train(optimizer, 5)
    ended = {n: p.clone() for n, p in model.state_dict().items()}
    model.load_state_dict(start)
    again = NFNOptimizer(model, rule=growing().float())
    again.load_state_dict(saved)
    train(again, 5)
    assert all(torch.equal(p, ended[n]) for n, p in model.state_dict().items())
