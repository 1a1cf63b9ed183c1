"""Meta-gradients: backpropagation is exact, persistent evolution strategies unbiased, members are independent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from rules import random_rule
from torch import Tensor, nn

from meta_train.imitation import Expert, disagreement, orthogonal
from meta_train.meta_gradient import Estimate, Estimation, combine
from meta_train.objective import Objective
from meta_train.tasks import MLPTask, Params, Task, Tensors, digits
from meta_train.tasks.mlp import Augment, MLPShape
from meta_train.theta_vector import flatten, train_only, unflatten
from meta_train.unroll import LR, Carry, Unrolling, start, unroll
from nfn_optim import UpdateRule
from nfn_optim.engine.moments import State
from nfn_optim.symmetry import Symmetry

SHAPE = MLPShape(zoom=1, widths=(5, 4), activation="gelu", layer_norm=True, zero_bias=False, batch_size=6)


class DoubleTask(MLPTask):
    """The same task in float64."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensors, Tensors]:
        params, member = super().draw(count, generator)
        return {n: p.double() for n, p in params.items()}, {n: _double(v) for n, v in member.items()}

    def batch(self, count: int, generator: torch.Generator, *, held_out: bool = False) -> Tensors:
        return {n: _double(v) for n, v in super().batch(count, generator, held_out=held_out).items()}


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def task() -> DoubleTask:
    return DoubleTask(SHAPE, digits(), Augment())


def rule(direction: str = "adam") -> UpdateRule:
    return random_rule(0.1, hidden=4, direction=direction, power=1.0).double()


def aged_carry(members: int = 2) -> Carry:
    """An inner run three steps old."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return unroll(rule(), task(), start(rule(), task(), members, 40, generator), 3, generator).carry


CASES = {
    "log": Estimation(window=3),
    "orthogonal": Estimation(window=3),
    "mean": Estimation(window=3, objective=Objective("mean")),
    "last": Estimation(window=3, objective=Objective("last")),
    "averaged": Estimation(window=3, objective=Objective(averaged_fraction=0.5)),
    "held out": Estimation(window=3, objective=Objective(averaged_fraction=0.5, held_out=True)),
    "segments": Estimation(window=3, unrolling=Unrolling(segment=2)),
    "tail": Estimation(window=3, objective=Objective(tail_fraction=0.5)),
    "imitation": Estimation(window=1, unrolling=Unrolling(expert=Expert("muon")), imitation=0.7),
}


@pytest.mark.parametrize("name", CASES)
def test_backprop_equals_finite_differences(name: str) -> None:
    learned, carry = rule("orthogonal" if name == "orthogonal" else "adam"), aged_carry()

    def estimate() -> Estimate:
        return CASES[name](learned, task(), carry, torch.Generator().manual_seed(2))

    exact = estimate().samples  # (members, size)
    center = flatten(learned)
    torch.manual_seed(3)
    for _ in range(2):
        direction = torch.randn_like(center)
        values = []
        for sign in (1, -1):
            set_theta(learned, center + sign * 1e-5 * direction)
            values.append(estimate().objective)
        set_theta(learned, center)
        torch.testing.assert_close(exact @ direction, (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def set_theta(learned: nn.Module, flat: Tensor) -> None:
    with torch.no_grad():
        for name, value in unflatten(learned, flat).items():
            learned.get_parameter(name).copy_(value)


def test_flatten_and_unflatten_are_inverse() -> None:
    learned = rule()
    found = unflatten(learned, torch.stack([flatten(learned), 2 * flatten(learned)]))
    for name, p in learned.named_parameters():
        assert torch.equal(found[name], torch.stack([p, 2 * p]))


PARTS = ("network.power", "network.message_passing.tensor_bias")


@pytest.mark.parametrize("estimator", ["backprop", "es"])
def test_only_trainable_parameters_have_a_gradient(estimator: str) -> None:
    learned = rule()
    train_only(learned, PARTS)
    estimation = Estimation(estimator, window=2)  # type: ignore[arg-type]
    carry = start(learned, task(), 4, 40, torch.Generator().manual_seed(0), copies=estimation.antithetic_copies)
    found = unflatten(learned, estimation(learned, task(), carry, torch.Generator()).samples[0])
    for name, gradient in found.items():
        assert bool(gradient.any()) == name.startswith(PARTS), name


def test_unknown_prefixes_and_frozen_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="expected prefixes"):
        train_only(rule(), ("power", "stak"))
    with pytest.raises(ValueError, match="with trainable parameters"):
        Estimation()(rule().requires_grad_(False), task(), aged_carry(), torch.Generator())


def test_the_tail_fraction_selects_the_last_steps() -> None:
    losses = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    assert Objective("mean", tail_fraction=0.5)(losses, torch.tensor([1.0])).item() == pytest.approx(1.5, rel=1e-2)
    assert Objective("mean", tail_fraction=0.01)(losses, torch.tensor([1.0])).item() == pytest.approx(1.0, rel=1e-2)
    with pytest.raises(ValueError, match="tail_fraction"):
        Objective(tail_fraction=0.0)


def test_segments_do_not_change_the_result() -> None:
    found = [
        Estimation(window=5, unrolling=Unrolling(segment=s), objective=Objective(averaged_fraction=0.3))(
            rule(), task(), aged_carry(), torch.Generator().manual_seed(2)
        )
        for s in (0, 2)
    ]
    assert torch.equal(found[1].losses, found[0].losses)
    torch.testing.assert_close(found[1].samples, found[0].samples, rtol=1e-10, atol=1e-14)


def test_segments_save_memory() -> None:
    """Bytes saved for backpropagation, counted by a hook on saved tensors."""

    def saved_bytes(segment: int) -> int:
        storages: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        theta = {n: p.detach().clone().requires_grad_() for n, p in rule().named_parameters()}
        carry, unrolling = aged_carry(), Unrolling(segment=segment)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            unroll(rule(), task(), carry, 8, torch.Generator().manual_seed(2), theta=theta, unrolling=unrolling)
        return sum(storages.values())

    assert saved_bytes(2) < 0.7 * saved_bytes(0)


def test_first_order_gradients_differ_and_the_unroll_does_not() -> None:
    found = {
        second: Estimation(window=4, unrolling=Unrolling(second_order=second))(
            rule(), task(), aged_carry(), torch.Generator().manual_seed(2)
        )
        for second in (True, False)
    }
    assert torch.equal(found[True].losses, found[False].losses)
    assert not torch.allclose(found[True].samples, found[False].samples, rtol=1e-3)


class Fixed(DoubleTask):
    """Draws the batches of three members and returns those of some of them."""

    only = slice(0, 3)

    def batch(self, count: int, generator: torch.Generator, *, held_out: bool = False) -> Tensors:
        return {n: v[self.only] for n, v in super().batch(3, generator, held_out=held_out).items()}


def part_of(carry: Carry, part: slice) -> Carry:
    return replace(
        carry,
        params={n: p[part] for n, p in carry.params.items()},
        state={n: {k: v[part] for k, v in s.items()} for n, s in carry.state.items()},
        member={n: v[part] for n, v in carry.member.items()},
        **{key: getattr(carry, key)[part] for key in ("total_steps", "first_loss", "alive")},
    )


def test_members_are_independent() -> None:
    """Losses, parameters and meta-gradients of a member are those of an unroll of it alone, on the same batches."""
    estimation, carry = Estimation(window=4), aged_carry(3)
    batched = estimation(rule(), Fixed(SHAPE, digits(), Augment()), carry, torch.Generator().manual_seed(5))
    for only in range(3):
        one = Fixed(SHAPE, digits(), Augment())
        one.only = part = slice(only, only + 1)
        single = estimation(rule(), one, part_of(carry, part), torch.Generator().manual_seed(5))
        torch.testing.assert_close(single.losses, batched.losses[:, part], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(single.samples, batched.samples[part], rtol=1e-9, atol=1e-12)
        for name, p in single.carry.params.items():
            torch.testing.assert_close(p, batched.carry.params[name][part], rtol=1e-10, atol=1e-12)


def test_members_may_have_a_theta_each() -> None:
    carry, learned = aged_carry(3), rule("orthogonal")
    rows = flatten(learned) + 0.05 * torch.randn(3, len(flatten(learned)), dtype=torch.float64)
    with torch.no_grad():
        batched = unroll(
            learned, Fixed(SHAPE, digits(), Augment()), carry, 4, torch.Generator(), theta=unflatten(learned, rows)
        )
        for only in range(3):
            one = Fixed(SHAPE, digits(), Augment())
            one.only = part = slice(only, only + 1)
            theta = unflatten(learned, rows[only])
            single = unroll(learned, one, part_of(carry, part), 4, torch.Generator(), theta=theta)
            torch.testing.assert_close(single.losses, batched.losses[:, part], rtol=1e-9, atol=1e-12)


def test_a_diverged_member_is_excluded_from_then_on() -> None:
    carry = aged_carry(3)
    broken = {n: torch.cat([p[:1] * torch.nan, p[1:]]) for n, p in carry.params.items()}
    found = Estimation(window=3)(rule(), task(), replace(carry, params=broken), torch.Generator().manual_seed(0))
    assert found.carry.alive.tolist() == [False, True, True]
    again = Estimation(window=3)(rule(), task(), found.carry, torch.Generator().manual_seed(0))
    assert torch.isfinite(again.samples).all(1).tolist() == [False, True, True]
    assert combine(again.samples, 1.0).dropped == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------ evolution strategies


class Toy(nn.Module):
    """The interface of a rule for an estimator: theta, `init`, and an update of parameters `p` `(members, size)`."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def refreshes(self, taken: int) -> bool:
        return True

    def init(self, params: Params, batch_dims: int = 0, **_: object) -> State:
        return {"p": {}}

    def forward(
        self, params: Params, grads: Params, state: State, symmetry: Symmetry, **hypers: Any
    ) -> tuple[Params, State]:
        return {"p": self.change(params["p"], grads["p"], self.theta.reshape(-1, 1))}, state

    def change(self, p: Tensor, g: Tensor, theta: Tensor) -> Tensor:
        raise AssertionError


class Descent(Toy):
    """Gradient descent whose learning rate is exp(theta)."""

    def change(self, p: Tensor, g: Tensor, theta: Tensor) -> Tensor:
        return -theta.exp() * g


class Influence(Toy):
    """Influence balancing (Tallec and Ollivier, 2017; Vicol et al., 2021, Sec. 5.1): p <- A p + theta s.

    Theta pushes the first ten entries up and the other thirteen down, and each entry propagates to the one before it:
    in the short run theta raises the first entry, in the long run it lowers it.
    """

    def change(self, p: Tensor, g: Tensor, theta: Tensor) -> Tensor:
        signs = torch.cat([torch.ones(10), -torch.ones(13)]).double()
        neighbours = torch.cat([p[:, 1:], torch.zeros_like(p[:, :1])], 1)
        return 0.5 * p + 0.5 * neighbours + theta * signs - p


@dataclass(frozen=True)
class Scaled(Objective):
    """The mean loss times a factor."""

    factor: float = 1.0

    def __call__(self, losses: Tensor, first_loss: Tensor) -> Tensor:
        return self.factor * losses.mean(0)


class ToyTask(Task):
    """A function of one vector, without data."""

    name = "toy"

    def __init__(self, loss: Callable[[Tensor], Tensor], size: int, initial: float) -> None:
        self.symmetry = Symmetry.separate({"p": (size,)})
        self._loss, self._size, self._initial = loss, size, initial

    def draw(self, count: int, generator: torch.Generator) -> tuple[Params, Tensors]:
        return {"p": torch.full((count, self._size), self._initial, dtype=torch.float64)}, {}

    def batch(self, count: int, generator: torch.Generator, *, held_out: bool = False) -> Tensors:
        return {}

    def loss(self, params: Params, member: Tensors, batch: Tensors) -> Tensor:
        return self._loss(params["p"])


QUADRATIC = ToyTask(lambda p: 0.5 * p.square().sum(), 1, 1.0)
BALANCED = ToyTask(lambda p: 0.5 * (p[0] - 1).square(), 23, 0.0)


def run_estimate(learned: Toy, one: ToyTask, estimation: Estimation, horizon: int, members: int) -> tuple[float, float]:
    """Mean over the windows of an inner run of the estimate, and its standard error."""
    generator = torch.Generator().manual_seed(0)
    carry = start(learned, one, members, horizon, generator, copies=estimation.antithetic_copies)  # type: ignore[arg-type]
    samples = []
    for _ in range(horizon // estimation.window):
        found = estimation(learned, one, carry, generator)  # type: ignore[arg-type]
        samples.append(found.samples)
        carry = found.carry
    means = torch.stack(samples).mean(0)
    return means.mean().item(), (means.std() / len(means) ** 0.5).item()


MEAN = Estimation(objective=Objective("mean"))


@pytest.mark.parametrize("estimator", ["es", "pes"])
def test_evolution_is_unbiased_on_a_quadratic(estimator: str) -> None:
    """p_k = (1 - lr)^k, so that d/dtheta of the mean of p_k^2 / 2 over p_0^2 / 2 is known."""
    lr, horizon = 0.2, 8
    k = torch.arange(1, horizon + 1)
    known = (0.5 * -2 * k * (1 - lr) ** (2 * k - 1) * lr / (0.5 + 1e-3)).mean().item()
    estimation = replace(MEAN, window=horizon, estimator=estimator)  # type: ignore[arg-type]
    learned = Descent(torch.tensor(lr).log().item())
    mean, error = run_estimate(learned, QUADRATIC, estimation, horizon, 2 * 4000)
    assert error < 0.03 * abs(known)
    assert abs(mean - known) < 4 * error
    exact = replace(MEAN, window=horizon)
    assert run_estimate(Descent(torch.tensor(lr).log().item()), QUADRATIC, exact, horizon, 2)[0] == pytest.approx(
        known, rel=1e-5
    )


def test_pes_removes_the_truncation_bias() -> None:
    """On influence balancing truncated backprop and es estimate the wrong sign, and pes the right one."""
    horizon, learned = 60, Influence(0.1)
    whole, _ = run_estimate(learned, BALANCED, replace(MEAN, window=horizon), horizon, 2)
    truncated, _ = run_estimate(learned, BALANCED, replace(MEAN, window=1), horizon, 2)
    es, es_error = run_estimate(learned, BALANCED, replace(MEAN, window=1, estimator="es"), horizon, 2 * 2000)
    pes, pes_error = run_estimate(learned, BALANCED, replace(MEAN, window=1, estimator="pes"), horizon, 2 * 20000)
    assert whole * truncated < 0
    assert abs(es - truncated) < 5 * es_error + 0.02 * abs(truncated)
    assert pes_error < 0.1 * abs(whole)
    assert abs(pes - whole) < 4 * pes_error


def test_standardised_differences_do_not_depend_on_the_scale_of_the_loss() -> None:
    """A task with ten times the objective gives the same estimates."""

    def samples(factor: float) -> Tensor:
        one = ToyTask(lambda p: 0.5 * p.square().sum(), 1, 1.0)
        estimation = Estimation("es", window=4, objective=Scaled(factor=factor), standardised=True)
        carry = start(Descent(-1.0), one, 6, 4, torch.Generator().manual_seed(0), copies=2)  # type: ignore[arg-type]
        return estimation(Descent(-1.0), one, carry, torch.Generator().manual_seed(0)).samples  # type: ignore[arg-type]

    assert samples(1.0).abs().max() > 0
    torch.testing.assert_close(samples(10.0), samples(1.0))


def test_a_window_of_zero_is_the_whole_run() -> None:
    found = Estimation(window=0)(rule(), task(), aged_carry(), torch.Generator().manual_seed(0))
    assert len(found.losses) == 40 - 3
    assert found.carry.steps == found.carry.horizon == 40


def test_antithetic_copies_differ_in_theta_only() -> None:
    estimation = Estimation(estimator="pes", window=4, sigma=1e-9)
    carry = start(rule(), task(), 6, 40, torch.Generator().manual_seed(0), copies=2)
    found = estimation(rule(), task(), carry, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.losses[:, :3], found.losses[:, 3:], rtol=1e-6, atol=1e-8)
    assert not torch.allclose(found.losses[:, 0], found.losses[:, 1])


def test_a_carry_of_another_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="start it with start"):
        Estimation(estimator="pes")(rule(), task(), aged_carry(), torch.Generator())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Estimation(estimator="adjoint"),  # type: ignore[arg-type]
        lambda: Estimation(window=-1),
        lambda: Estimation(sigma=0.0),
        lambda: Objective("median"),  # type: ignore[arg-type]
        lambda: Objective(averaged_fraction=1.5),
        lambda: Expert("sgd"),  # type: ignore[arg-type]
        lambda: start(rule(), task(), 3, 10, torch.Generator(), copies=2),
    ],
)
def test_invalid_configurations_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"expected .*, found"):
        make()


# --------------------------------------------------------------------------------------------- combination, imitation


def test_estimates_are_clipped_rejected_and_averaged() -> None:
    samples = torch.tensor([[3.0, 4.0], [0.0, 0.5], [torch.nan, 0.0], [300.0, 0.0]])
    found = combine(samples, 10.0, clip_each=1.0, reject=100.0)
    torch.testing.assert_close(found.gradient, (torch.tensor([0.6, 0.8]) + torch.tensor([0.0, 0.5])) / 2)
    assert found.dropped == 0.5
    assert found.norm == pytest.approx(torch.tensor([1.5, 2.25]).norm().item())
    assert combine(samples, 0.1).gradient.norm().item() == pytest.approx(0.1)
    rejected = combine(samples * torch.nan, 1.0)
    assert not rejected.is_valid
    assert torch.equal(rejected.gradient, torch.zeros(2))


def test_signal_to_noise_is_estimated() -> None:
    torch.manual_seed(0)
    samples = torch.tensor([3.0, 0.0, 0.0]) + torch.randn(1000, 3)
    assert combine(samples, 1e9).signal_to_noise == pytest.approx(9 / (3 / 1000), rel=0.15)


def test_the_expert_is_torch_adamw_and_agrees_with_itself() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3))
    learned, adamw = UpdateRule.adamw(), torch.optim.AdamW([p], lr=2 * LR, weight_decay=0.0)
    params = {"p": p.detach().clone().unsqueeze(0)}
    state = learned.init(params, batch_dims=1)
    symmetry = Symmetry.separate({"p": (4, 3)})
    for _ in range(3):
        p.grad = torch.randn_like(p)
        update, state = learned(params, {"p": p.grad.unsqueeze(0)}, state, symmetry, lr=LR, batch_dims=1)
        before = p.detach().clone()
        adamw.step()
        target = Expert("adamw", boost=2.0).update(state, LR)
        torch.testing.assert_close(target["p"][0], p.detach() - before, rtol=1e-4, atol=1e-7)
    assert disagreement(Expert("adamw", boost=1.0), update, state, LR).item() == pytest.approx(0.0, abs=1e-5)
    assert disagreement(Expert("adamw", boost=torch.e), update, state, LR).item() == pytest.approx(0.3, abs=1e-4)


@pytest.mark.parametrize("shape", [(2, 8, 5), (2, 5, 8)])
def test_muon_orthogonalises(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    m = torch.randn(shape)
    found = torch.linalg.svdvals(orthogonal(m) / max(1.0, shape[1] / shape[2]) ** 0.5)
    assert (found > 0.6).all()
    assert (found < 1.3).all()
