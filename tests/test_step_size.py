"""Step-size adaptation: up where gradients agree, down where they oscillate, within bounds."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from nfn_optim import NFNOptimizer, RuleConfig, Symmetry, UpdateRule
from nfn_optim.engine.moments import BETA_SLOW
from nfn_optim.engine.weight_features import CLIP, STATISTICS, Statistics
from nfn_optim.rule.step_size import ADAPT_AGE, MAX_LOG_STEP_SIZE, PRIOR_ENTRIES, adapt, gradient_cosine, shared_start

SYMMETRY = Symmetry.separate({"w": (30, 20), "b": (5,)})


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(SYMMETRY.shape_of(n), generator=generator, dtype=torch.float64) for n in SYMMETRY.dims}


def adapting(rate: float = 4.0, decay: float = 0.0) -> UpdateRule:
    """A rule with step-size adaptation and nothing else."""
    return UpdateRule(RuleConfig(hidden=0, rounds=0, adapt_rate=rate, adapt_decay=decay)).double()


def log_step_sizes(rule: UpdateRule, gradients: list[dict[str, Tensor]]) -> dict[str, float]:
    """The logarithm of every tensor's step size after these gradients."""
    params = draw(0)
    state = rule.init(params)
    with torch.no_grad():
        for grads in gradients:
            _, state = rule(params, grads, state, SYMMETRY, lr=0.01)
    return {n: s["log_step_size"].item() for n, s in state.items()}


def test_it_follows_the_cosine_between_a_gradient_and_those_before_it() -> None:
    """Computed again from the gradients themselves; small tensors are drawn towards large ones."""
    torch.manual_seed(0)
    drift = draw(1)
    gradients = [{n: drift[n] + g for n, g in draw(step + 2).items()} for step in range(12)]
    slow = {n: torch.zeros_like(g) for n, g in drift.items()}
    second = {n: torch.zeros_like(g) for n, g in drift.items()}
    logs = dict.fromkeys(drift, 0.0)
    for step, grads in enumerate(gradients, 1):
        own = {}
        for n, g in grads.items():
            second[n] = 0.999 * second[n] + 0.001 * g * g
            root = (second[n] / (1 - 0.999**step)).sqrt()
            old, new = slow[n] / root, (g / root).clamp(-CLIP, CLIP)
            own[n] = ((old * new).sum() / (old.norm() * new.norm() + 1e-30)).item()
            slow[n] = BETA_SLOW * slow[n] + (1 - BETA_SLOW) * g
        trust = {n: g.numel() / (g.numel() + PRIOR_ENTRIES) for n, g in grads.items()}
        common = sum(trust[n] * own[n] for n in own) / sum(trust.values())
        for n in logs:
            cosine = trust[n] * own[n] + (1 - trust[n]) * common
            logs[n] += math.log(1 + 1 / (step - 1 + ADAPT_AGE)) * (4.0 * cosine - 0.4)
        if step in {2, 12}:
            assert log_step_sizes(adapting(decay=0.4), gradients[:step]) == pytest.approx(logs, rel=1e-6)
    assert logs["w"] > 0.1


def test_steps_grow_where_gradients_agree_and_shrink_where_they_oscillate() -> None:
    one, noise = draw(1), [draw(step) for step in range(60)]
    along, to_and_fro = [one] * 60, [{n: (-1) ** k * g for n, g in one.items()} for k in range(60)]
    assert all(value > 1 for value in log_step_sizes(adapting(), along).values())
    assert all(value < -0.5 for value in log_step_sizes(adapting(), to_and_fro).values())
    assert all(abs(value) < 0.3 for value in log_step_sizes(adapting(), noise).values())
    assert all(value < 0 for value in log_step_sizes(adapting(decay=0.8), noise).values())


def test_updates_are_multiplied_by_it() -> None:
    """With a logarithm of g the steps of AdamW are exp(g) times as long."""
    rule, params, grads = adapting(), draw(0), draw(1)
    _, state = rule(params, grads, rule.init(params), SYMMETRY, lr=0.01)
    plain, before = rule(params, grads, state, SYMMETRY, lr=0.01)
    state["w"]["log_step_size"] += 0.7
    longer, after = rule(params, grads, state, SYMMETRY, lr=0.01)
    torch.testing.assert_close(longer["w"], math.exp(0.7) * plain["w"])
    torch.testing.assert_close(longer["b"], plain["b"])
    assert after["w"]["log_step_size"].item() == pytest.approx(before["w"]["log_step_size"].item() + 0.7)


def test_at_the_first_step_vectors_and_narrow_matrices_follow_the_others() -> None:
    steps, sides = torch.tensor([1.0, 1.0, 1.0, 7.0]), torch.tensor([96.0, 32.0, 0.0, 96.0])
    shared = shared_start(torch.tensor([-2.0, 0.0, 0.0, 1.0]), steps, sides)
    common = -2 * 0.75 / (0.75 + 0.5)  # what takes its seventh step does not count
    torch.testing.assert_close(shared, torch.tensor([-1.5 + 0.25 * common, 0.5 * common, common, 1.0]))
    assert shared_start(torch.zeros(1), torch.ones(1), torch.zeros(1)) == 0


def test_it_is_bounded() -> None:
    assert all(value == MAX_LOG_STEP_SIZE for value in log_step_sizes(adapting(1e3), [draw(1)] * 20).values())
    zeros = {n: torch.zeros_like(g) for n, g in draw(1).items()}
    assert all(value == 0 for value in log_step_sizes(adapting(), [zeros] * 20).values())
    broken = {n: torch.full_like(g, torch.inf) for n, g in draw(1).items()}
    assert all(math.isfinite(value) for value in log_step_sizes(adapting(), [draw(1), broken, draw(2)]).values())


def test_it_adds_up_over_the_logarithm_of_time_however_rare_refreshes_are() -> None:
    often = rarely = torch.zeros(1)
    power = torch.tensor([0.5])
    for taken in range(400):
        steps = torch.tensor([taken + 1.0])
        often = adapt(often, power, steps, 1)
        if taken < 4 or taken % 4 == 0:
            rarely = adapt(rarely, power, steps, 4)
    assert rarely.item() == pytest.approx(often.item(), rel=0.01)
    assert often.item() == pytest.approx(0.5 * math.log((400 + ADAPT_AGE) / ADAPT_AGE), rel=0.01)


def test_the_cosine_of_nothing_is_zero() -> None:
    means = Statistics.unpack(torch.full((3, STATISTICS), torch.nan))
    assert gradient_cosine(means, torch.full((3,), 5.0), torch.tensor([4.0, 0.0, 1.0])).tolist() == [0, 0, 0]


def test_it_is_optional() -> None:
    """And with the learned part at zero it has no effect."""
    assert "log_step_size" not in UpdateRule().init(draw(0))["w"]
    with pytest.raises(ValueError, match="adapt_rate"):
        RuleConfig(adapt_rate=-1.0)
    with pytest.raises(ValueError, match="adapt_decay"):
        RuleConfig(adapt_decay=1.0)
    assert set(log_step_sizes(adapting().zero_(), [draw(1)] * 5).values()) == {0.0}


def test_it_is_saved_with_the_state() -> None:
    model = torch.nn.Linear(20, 10)

    def train(optimizer: NFNOptimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(model(torch.ones(4, 20)).square().mean())
            optimizer.step()

    optimizer = NFNOptimizer(model, rule=adapting().float())
    train(optimizer, 10)
    start = {n: p.clone() for n, p in model.state_dict().items()}
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["log_step_size"].item() != 0
    train(optimizer, 5)
    ended = {n: p.clone() for n, p in model.state_dict().items()}
    model.load_state_dict(start)
    again = NFNOptimizer(model, rule=adapting().float())
    again.load_state_dict(saved)
    train(again, 5)
    assert all(torch.equal(p, ended[n]) for n, p in model.state_dict().items())
