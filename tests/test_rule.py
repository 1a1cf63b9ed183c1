"""The update rule: AdamW where it has learned nothing, equivariant whatever it has learned, and pure."""

from __future__ import annotations

import pytest
import rules
import torch
from rule_forms import FORMS, SYMMETRY, config_of, draw
from torch import Tensor

from nfn_optim import RuleConfig, Symmetry, UpdateRule
from nfn_optim.rule.network import FALLBACK_RMS


def random_rule(form: str) -> UpdateRule:
    """One of `FORMS` of which nothing is zero, in float64."""
    return rules.random_rule(config=config_of(form, hidden=6, power=1.0)).double()


def train(rule: UpdateRule, params: dict[str, Tensor], steps: int = 4, **kwargs: object) -> dict[str, Tensor]:
    """Parameters after some steps on gradients that depend on them."""
    batch_dims = int(kwargs.get("batch_dims", 0))  # type: ignore[call-overload]
    state = rule.init(params, batch_dims)
    for step in range(steps):
        grads = {n: p - g for (n, p), g in zip(params.items(), draw(step + 10).values(), strict=True)}
        with torch.no_grad():
            update, state = rule(params, grads, state, SYMMETRY, **{"lr": 0.01, **kwargs})  # type: ignore[arg-type]
        params = {n: params[n] + update[n] for n in params}
    return params


@pytest.mark.parametrize(
    "rule",
    [
        UpdateRule.adamw(),
        UpdateRule(),
        UpdateRule(RuleConfig(hidden=0, rounds=0)),
        *(random_rule(form).zero_() for form in FORMS),
    ],
    ids=["adamw", "new", "new, skip only", *(f"zeroed, {form}" for form in FORMS)],
)
def test_what_has_learned_nothing_is_adamw(rule: UpdateRule) -> None:
    params = draw(0)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    betas = rule.config.beta1, rule.config.beta2
    optimizer = torch.optim.AdamW(leaves.values(), lr=0.01, betas=betas, weight_decay=0.1)
    for step in range(6):
        for (_, p), g in zip(leaves.items(), draw(step + 10).values(), strict=True):
            p.grad = p.detach() - g
        optimizer.step()
    for n, p in train(rule.double(), params, 6, weight_decay=0.1).items():
        torch.testing.assert_close(p, leaves[n].detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_training_is_equivariant(form: str) -> None:
    """Permuted parameters and gradients give the permuted result, under the free axes and under the fixed."""
    rule, params = random_rule(form), draw(0)
    loose = Symmetry(SYMMETRY.dims, SYMMETRY.sizes)  # every axis free
    permutations = {axis: torch.randperm(n) for axis, n in SYMMETRY.sizes.items()}
    state = rule.init(params)
    moved = loose.permute(params, permutations)
    moved_state = rule.init(moved)
    with torch.no_grad():
        for step in range(4):
            grads = draw(step + 10)
            update, state = rule(params, grads, state, SYMMETRY, lr=0.01)
            moved_grads = loose.permute(grads, permutations)
            moved_update, moved_state = rule(moved, moved_grads, moved_state, SYMMETRY, lr=0.01)
            params = {n: params[n] + update[n] for n in params}
            moved = {n: moved[n] + moved_update[n] for n in moved}
    digits = 1e-8 if form == "orthogonal" else 1e-10  # small singular values are enlarged, and rounding with them
    for n, p in loose.permute(params, permutations).items():
        torch.testing.assert_close(moved[n], p, rtol=digits, atol=digits / 100)


@pytest.mark.parametrize("form", ["adam", "orthogonal"])
def test_an_update_depends_on_other_tensors(form: str) -> None:
    """The zero map is equivariant too: permuting one tensor alone must not just permute its update."""
    rule, params, grads = random_rule(form), draw(0), draw(1)
    index = torch.tensor([1, 2, 3, 0])
    update, _ = rule(params, grads, rule.init(params), SYMMETRY, lr=0.01)
    alone = {**params, "w": params["w"][index]}
    other, _ = rule(alone, {**grads, "w": grads["w"][index]}, rule.init(params), SYMMETRY, lr=0.01)
    assert not torch.allclose(other["w"], update["w"][index], rtol=1e-6)
    assert not torch.allclose(other["b"], update["b"], rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_is_its_members(form: str) -> None:
    rule, params, grads = random_rule(form), draw(0, 3), draw(1, 3)
    total = torch.tensor([0.0, 10.0, 20.0])
    update, state = rule(params, grads, rule.init(params, 1), SYMMETRY, lr=0.01, total_steps=total, batch_dims=1)
    for i in range(3):
        one = {n: p[i] for n, p in params.items()}
        alone, alone_state = rule(
            one, {n: g[i] for n, g in grads.items()}, rule.init(one), SYMMETRY, lr=0.01, total_steps=float(total[i])
        )
        for n in params:
            torch.testing.assert_close(update[n][i], alone[n], rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(state[n]["exp_avg_slow"][i], alone_state[n]["exp_avg_slow"])


@pytest.mark.parametrize("form", FORMS)
def test_nothing_moves_without_learning_rate_or_gradient(form: str) -> None:
    rule, params = random_rule(form), draw(0)
    zero = {n: torch.zeros_like(p) for n, p in params.items()}
    update, _ = rule(params, draw(1), rule.init(params), SYMMETRY, lr=0.0, weight_decay=0.1)
    assert all(not u.any() for u in update.values())
    update, _ = rule(params, zero, rule.init(params), SYMMETRY, lr=0.1)
    assert all(u.abs().max() < 1e-12 for u in update.values())


def test_the_learning_rate_falls_at_the_end_of_a_known_horizon() -> None:
    """What remains without a learned part is AdamW with a schedule, and AdamW itself where the horizon is not known."""
    rule, adamw = UpdateRule(RuleConfig(cooldown=0.5)).zero_().double(), UpdateRule.adamw()
    params, grads = draw(0, 2), draw(1, 2)
    state, plain = rule.init(params, 1), adamw.init(params, 1)
    factors = [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.01, 0.01]
    for factor in factors:
        hypers = {"total_steps": torch.tensor([10.0, 0.0]), "lr": 0.01, "weight_decay": 0.1, "batch_dims": 1}
        update, state = rule(params, grads, state, SYMMETRY, **hypers)
        expected, plain = adamw(params, grads, plain, SYMMETRY, lr=0.01, weight_decay=0.1, batch_dims=1)
        for n in params:
            torch.testing.assert_close(update[n][0], factor * expected[n][0])
            torch.testing.assert_close(update[n][1], expected[n][1])


def test_the_learning_rate_falls_with_age_where_the_horizon_is_unknown() -> None:
    rule, adamw = UpdateRule(RuleConfig(inverse_time_power=0.5)).zero_().double(), UpdateRule.adamw()
    params, grads = draw(0, 2), draw(1, 2)
    state, plain = rule.init(params, 1), adamw.init(params, 1)
    for age in (0, 300):  # a step at this age
        for s in (*state.values(), *plain.values()):
            s["step"] = torch.full_like(s["step"], age)
        hypers = {"lr": 0.01, "batch_dims": 1}
        update, _ = rule(params, grads, state, SYMMETRY, total_steps=torch.tensor([900.0, 0.0]), **hypers)
        alone, _ = rule(params, grads, state, SYMMETRY, **hypers)
        expected, _ = adamw(params, grads, plain, SYMMETRY, **hypers)
        factors = torch.tensor([1.0, 1.0 if age == 0 else 0.5]).double()
        for n, u in update.items():
            torch.testing.assert_close(u, expected[n] * factors.reshape(2, *(1,) * (u.dim() - 1)))
            torch.testing.assert_close(alone[n], expected[n] * factors[1])


def test_steps_begin_as_large_as_the_configuration_says() -> None:
    """The gain multiplies: with four times the gain a step is four times as long."""
    params, grads = draw(0), draw(1)
    steps = []
    for gain in (1.0, 4.0):
        rule = UpdateRule(RuleConfig(gain=gain)).double()
        steps.append(rule(params, grads, rule.init(params), SYMMETRY, lr=0.01)[0])
    for name, update in steps[0].items():
        torch.testing.assert_close(steps[1][name], 4 * update, rtol=1e-6, atol=0)


def test_weights_shrink_in_noise_but_not_where_gradients_vanish_or_never_were() -> None:
    """And more slowly in the beginning."""
    rule = UpdateRule(RuleConfig(hidden=0, rounds=0, shrinkage=0.5)).requires_grad_(False)
    symmetry = Symmetry.separate({"w": (40, 40)})

    def share(first: int, last: int, size: float) -> float:
        """Of the weights that is left between two steps, if gradients are noise whose size changes by a factor."""
        torch.manual_seed(0)
        params = {"w": torch.ones(40, 40)}
        state, before = rule.init(params), 1.0
        for step in range(last):
            if step == first:
                before = float(params["w"][:20].mean())
            grad = size**step * torch.randn(40, 40)
            grad[20:] = 0
            update, state = rule(params, {"w": grad}, state, symmetry, lr=0.02)
            params = {"w": params["w"] + update["w"]}
        assert bool((params["w"][20:] == 1).all())
        return float(params["w"][:20].mean()) / before

    assert share(100, 200, 1.0) < 0.95
    assert share(100, 200, 1.0) < share(0, 100, 1.0) - 0.02
    assert share(100, 200, 0.9) > 0.99


def test_hyperparameters_by_name_by_member_and_as_tensors() -> None:
    rule, params, grads = random_rule("adam"), draw(0), draw(1)

    def step(lr: object, weight_decay: object = 0.0) -> dict[str, Tensor]:
        return rule(params, grads, rule.init(params), SYMMETRY, lr=lr, weight_decay=weight_decay)[0]  # type: ignore[arg-type]

    one, two = step(0.01), step(0.02)
    torch.testing.assert_close(step(torch.tensor(0.01)), one)
    torch.testing.assert_close(step(torch.tensor([0.01])), one)
    mixed = step({n: 0.02 if n == "w" else torch.tensor(0.01) for n in params})
    assert all(torch.allclose(mixed[n], (two if n == "w" else one)[n]) for n in params)
    decayed = step(0.01, {n: float(n == "b") for n in params})
    torch.testing.assert_close(decayed["b"], one["b"] - 0.01 * params["b"])
    assert torch.equal(decayed["w"], one["w"])


def test_the_order_of_names_does_not_matter_and_nothing_is_changed_in_place() -> None:
    rule, params, grads = random_rule("adam"), draw(0), draw(1)
    state = rule.init(params)
    update, _ = rule(params, grads, state, SYMMETRY, lr=0.01)
    backwards = dict(reversed(params.items()))
    again, _ = rule(backwards, dict(reversed(grads.items())), state, SYMMETRY, lr=0.01)
    assert all(torch.equal(again[n], update[n]) for n in params)
    untouched = rule.init(params)
    assert all(torch.equal(value, untouched[n][key]) for n, s in state.items() for key, value in s.items())
    assert all(torch.equal(p, q) for p, q in zip(params.values(), draw(0).values(), strict=True))


def test_a_direction_out_of_range_falls_back_to_adam_and_is_counted() -> None:
    rule, params, grads = random_rule("adam"), draw(0), draw(1)
    with torch.no_grad():
        rule.network.message_passing.tensor_bias[0] = 100 * FALLBACK_RMS  # the coefficient of the direction
    update, state = rule(params, grads, rule.init(params), SYMMETRY, lr=0.01)
    expected, _ = UpdateRule.adamw()(params, grads, UpdateRule.adamw().init(params), SYMMETRY, lr=0.01)
    for n in params:
        torch.testing.assert_close(update[n], expected[n])
        assert state[n]["fallbacks"].item() == 1


def test_a_broken_tensor_does_not_break_the_others() -> None:
    rule, params, grads = random_rule("adam"), draw(0), draw(1)
    grads["b"][0] = torch.nan
    update, state = rule(params, grads, rule.init(params), SYMMETRY, lr=0.01)
    assert all(torch.isfinite(update[n]).all() for n in params if n != "b")
    assert state["b"]["fallbacks"].item() == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"hidden": -1},
        {"rounds": -1},
        {"direction": "cubic"},
        {"rank": 0},
        {"rounds": 1, "hidden": 0},
        {"cooldown": 2.0},
        {"gain": 0.0},
        {"inverse_time_power": -0.1},
        {"shrinkage": -0.1},
    ],
)
def test_impossible_rules_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad)))):
        RuleConfig(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_theta_is_small(form: str) -> None:
    assert sum(p.numel() for p in UpdateRule(config_of(form)).parameters()) < 5000
