"""Moments in bfloat16 are right on average, and the noise that makes them so belongs to the weight, not to the run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from arrays import SYMMETRY, draw
from compiler import compiler
from digits import batches, network
from torch import Tensor
from torch.nn import functional as F

from nfn_optim.engine import inductor
from nfn_optim.engine.executor import Execution
from nfn_optim.engine.moments import moment_constants, update_moments
from nfn_optim.engine.passes import moments_and_features, store_
from nfn_optim.engine.stochastic_rounding import HASH_D, round_moments
from nfn_optim.rule import RuleConfig, UpdateRule
from nfn_optim.symmetry import Symmetry

WEIGHTS, STEPS = 5000, 2000
NAMES = ("m", "v", "M")
SHORT = torch.bfloat16


def constants(step: int) -> Tensor:
    """Moment constants after some steps."""
    return moment_constants(torch.tensor([float(step)]))


def take_in(moments: list[Tensor], g: Tensor, step: int) -> None:
    """Update moments in place, as a step does."""
    new = moments_and_features(torch.zeros_like(g), g, moments, constants(step))[0]
    store_(torch.zeros_like(g), g, moments, constants(step), None, new)


def take_in_nearest(moments: list[Tensor], g: Tensor, step: int) -> None:
    """The same with rounding to nearest."""
    for old, value in zip(moments, update_moments(g, [x.float() for x in moments], constants(step)), strict=True):
        old.copy_(value)


def noisy(step: int) -> Tensor:
    """Gradients of many sizes, all of one sign in the mean."""
    generator = torch.Generator().manual_seed(step)
    sizes = torch.logspace(-6, 0, WEIGHTS)
    return (sizes * (torch.randn(WEIGHTS, generator=generator) + 0.3)).unsqueeze(-1)


GRADIENTS: dict[str, Callable[[int], Tensor]] = {
    "of many sizes": noisy,
    "in bfloat16": lambda step: noisy(step).to(SHORT).float(),
    "rarely": lambda step: noisy(step) * (torch.arange(WEIGHTS).unsqueeze(-1) % 20 == step % 20),
    "only at first": lambda step: noisy(step) * (step <= STEPS // 4),
}


def trajectory(kind: str, how: Callable[[list[Tensor], Tensor, int], None], dtype: torch.dtype) -> list[Tensor]:
    """Moments after all steps, `(WEIGHTS, 1)` each."""
    moments = [torch.zeros(WEIGHTS, 1, dtype=dtype) for _ in NAMES]
    for step in range(1, STEPS + 1):
        how(moments, GRADIENTS[kind](step), step)
    return [x.float() for x in moments]


@pytest.mark.slow
@pytest.mark.parametrize("kind", GRADIENTS)
def test_moments_follow_those_in_full_precision(kind: str) -> None:
    """On average, after 2,000 steps, to a few thousandths; v rounded to nearest is far off."""
    exact, kept = (trajectory(kind, take_in, dtype) for dtype in (torch.float32, SHORT))
    _, nearest, _ = trajectory(kind, take_in_nearest, SHORT)
    _, v, _ = exact
    alive = v > 1e-30  # of the others there is nothing left
    apart = (kept[1] / v - 1)[alive].mean().abs()
    assert apart < 0.003
    assert (nearest / v - 1)[alive].mean().abs() > 20 * apart
    for x, y in ((exact[0], kept[0]), (exact[2], kept[2])):
        scale = v.sqrt()  # which is what a moment is divided by
        assert ((y - x) / scale)[alive].mean().abs() < 0.001


@pytest.mark.parametrize("place", range(3), ids=NAMES)
def test_the_mean_of_what_is_kept_is_what_there_is(place: int) -> None:
    """One number between two neighbours, rounded at many steps and with many gradients, is so to four digits of 1."""
    g = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    old = [torch.full((1000, 1), 0.5, dtype=SHORT) for _ in NAMES]
    for fraction in (0.0, 0.01, 0.3, 0.5, 0.9):
        x = 1 + fraction / 128  # bfloat16 has 1 and 1 + 1 / 128
        up = 0.0
        for step in range(200):
            new = [torch.full((1000, 1), -x if k == place else 2.0) for k in range(3)]
            found = -round_moments(new, old, g, torch.tensor([float(step)]))[place]
            assert torch.equal(found, found.to(SHORT).float())
            up += ((found - 1) * 128).mean().item() / 200
        deviation = (fraction * (1 - fraction) / 200_000) ** 0.5
        assert abs(up - fraction) <= 4 * deviation + 1e-5


def test_what_bfloat16_has_stays_as_it_is() -> None:
    """Zeros of both signs, the smallest and the largest numbers, infinity and NaN included."""
    special = torch.tensor([0.0, -0.0, 2.0**-133, -1e-38, 1.0, -3.3895e38, torch.inf, -torch.inf, torch.nan])
    values = special.to(SHORT).float().unsqueeze(-1)
    old = [values.to(SHORT)] * 3
    for step in range(100):
        for found in round_moments([values.clone() for _ in old], old, values + 1, torch.tensor([float(step)])):
            assert torch.equal(found.view(torch.int32), values.view(torch.int32))


def test_noise_differs_from_moment_to_moment_and_from_step_to_step() -> None:
    """Correlation of what is rounded up, over weights whose gradient does not change at all, is that of chance."""
    g = torch.randn(WEIGHTS, 1, generator=torch.Generator().manual_seed(0))
    old = [g.square().to(SHORT)] * 3
    seen = [
        x.flatten()
        for step in range(4)
        for x in round_moments([torch.full_like(g, 1 + 1 / 256) for _ in HASH_D], old, g, torch.tensor([float(step)]))
    ]
    related = torch.corrcoef(torch.stack(seen)) - torch.eye(len(seen))
    assert related.abs().max() < 5 / WEIGHTS**0.5


# ------------------------------------------------------------------------------------------------- however it is run


def run(
    how: Execution,
    params: dict[str, Tensor],
    permute: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    steps: int = 5,
) -> dict[str, Tensor]:
    """Moments after some steps on given gradients; these are moved along with the parameters by `permute`."""
    torch.manual_seed(0)
    rule = UpdateRule(RuleConfig(direction="orthogonal", rank=3, adapt_rate=4.0, refresh_every=2)).requires_grad_(False)
    now = {n: p.clone() for n, p in permute(params).items()}
    state = rule.init(now, state_dtype=SHORT)
    for step in range(steps):
        grads = permute(draw(step + 10))
        rule.step_(now, grads, state, SYMMETRY, lr=0.01, refresh=rule.refreshes(step), execution=how)
    return {f"{n} {key}": x for n, s in state.items() for key, x in s.items() if key.startswith("exp_avg")}


EXECUTIONS = {
    "tiles of two rows": Execution(tile=1),
    "one by one": Execution(compile_from=0),
    "nothing cached": Execution(tile=0),
}


@pytest.mark.parametrize("how", EXECUTIONS)
def test_noise_is_the_same_however_weights_are_taken(how: str) -> None:
    expected = run(Execution(), draw(0))
    found = run(EXECUTIONS[how], draw(0))
    assert all(x.dtype == SHORT for x in found.values())
    assert all(torch.equal(found[n], x) for n, x in expected.items())
    assert any(x.any() for x in found.values())


def test_renamed_neurons_take_their_noise_along() -> None:
    """To the last bit: that of a weight follows from its own numbers, wherever it stands."""
    loose = Symmetry(SYMMETRY.dims, SYMMETRY.sizes)  # every axis free
    torch.manual_seed(1)
    permutations = {axis: torch.randperm(n) for axis, n in SYMMETRY.sizes.items()}

    def permute(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return loose.permute(values, permutations)

    straight, moved = run(Execution(), draw(0)), run(Execution(), draw(0), permute)
    for key in ("exp_avg", "exp_avg_sq", "exp_avg_slow"):
        expected = permute({n: straight[f"{n} {key}"] for n in SYMMETRY.dims})
        assert all(torch.equal(moved[f"{n} {key}"], x) for n, x in expected.items())


@pytest.mark.exhaustive
@compiler
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("empty_cache")
def test_compiled_noise_is_uncompiled_noise() -> None:
    """On the same gradients; a moment whose last bit differs is rounded otherwise once in thousands of times."""
    generator = torch.Generator().manual_seed(0)
    symmetry = Symmetry.separate({"w": (300, 100), "b": (20_000,)})
    params = {n: torch.randn(symmetry.shape_of(n), generator=generator) for n in symmetry.dims}
    torch.manual_seed(0)
    rule = UpdateRule().requires_grad_(False)
    found = []
    for how in (Execution(), Execution(compiled=True)):
        generator = torch.Generator().manual_seed(1)
        now, state = {n: p.clone() for n, p in params.items()}, rule.init(params, state_dtype=SHORT)
        for _ in range(4):
            grads = {n: torch.randn(p.shape, generator=generator) for n, p in params.items()}
            rule.step_(now, grads, state, symmetry, lr=0.01, execution=how)
        found.append(state)
    assert inductor.graph_count() > 0
    assert not inductor.has_failed()
    for n in params:
        for key in ("exp_avg", "exp_avg_sq", "exp_avg_slow"):
            plain, compiled = (state[n][key] for state in found)
            assert (plain != compiled).float().mean() < 1e-3, (n, key)


@pytest.mark.slow
def test_training_on_digits_is_as_good() -> None:
    """Whole trainings, from several starts: the ratio of losses is 1 within their scatter."""
    from nfn_optim import NFNOptimizer

    ratios = []
    for seed in range(3):
        losses = []
        for dtype in (None, SHORT):
            model = network()
            torch.manual_seed(seed)
            for p in model.parameters():
                p.data += 0.02 * torch.randn_like(p)
            optimizer = NFNOptimizer(model, state_dtype=dtype)
            for images, classes in batches(28):
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(model(images), classes))
                optimizer.step()
            losses.append(sum(F.cross_entropy(model(x), y).item() for x, y in batches(28)))
        ratios.append(losses[1] / losses[0])
    assert torch.tensor(ratios).log().mean().abs() < 0.1
    assert all(ratio != 1 for ratio in ratios)
