"""NFNOptimizer inside `higher`: the same steps, the right derivatives, memory that does not grow."""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import higher
import pytest
import torch
from rules import random_rule
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from zoo import ZOO, Network

from nfn_optim import NFNOptimizer, UpdateRule, symmetry_of
from nfn_optim.optimizer.differentiable import register

register()

STEPS = 3
SMOOTH = (  # no gradient is zero but for rounding, as that of a bias before a norm is: Adam would divide it by itself
    Network(
        "dropout",
        lambda: nn.Sequential(
            nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2), nn.Dropout(0.3)
        ),
        lambda: (torch.randn(4, 3),),
        {},
        (),
    ),
    Network(
        "convolutions",
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.GELU(), nn.Conv2d(3, 2, 3), nn.Flatten()
        ),
        lambda: (torch.randn(3, 1, 6, 6),),
        {},
        (),
    ),
)
BY_NAME = {network.name: network for network in (*ZOO, *SMOOTH)}


@pytest.fixture(autouse=True)
def second_derivatives() -> Iterator[None]:
    """The fused kernels of attention have none."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


class Problem:
    """A network in float64, with other inputs at every step."""

    def __init__(self, network: Network) -> None:
        self.model = network.module().double()
        generator = torch.Generator().manual_seed(1)
        self.inputs = [
            [
                x + 0.1 * torch.randn(x.shape, generator=generator).double() if x.is_floating_point() else x
                for x in given
            ]
            for given in [network.inputs()] * (2 * STEPS + 1)
        ]

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """On the inputs of a step, with the dropout of that step."""
        torch.manual_seed(step)
        found = [leaf for leaf in tree_leaves(model(*self.inputs[step])) if leaf.is_floating_point()]
        return torch.stack([(leaf - 0.5).square().mean() for leaf in found]).sum()

    def train(self, optimizer: torch.optim.Optimizer, steps: range) -> None:
        """An ordinary loop."""
        for step in steps:
            optimizer.zero_grad()
            self.loss(self.model, step).backward()
            optimizer.step()

    def inner(self, optimizer: torch.optim.Optimizer, steps: range, **options: Any) -> Tensor:
        """A differentiable loop, written back; the loss behind it."""
        with higher.innerloop_ctx(self.model, optimizer, **options) as (fmodel, diffopt):
            for step in steps:
                diffopt.step(self.loss(fmodel, step))
            diffopt.write_back()
            return self.loss(fmodel, steps.stop)


def learned(form: str = "adam", **config: Any) -> UpdateRule:
    """A rule in float64 of which nothing is zero."""
    shape: dict[str, Any] = {"hidden": 4, "power": 0.5, "cooldown": 0.5, **config}
    if form == "skip only":
        shape |= {"hidden": 0, "rounds": 0}
    if form == "orthogonal":  # of so high a rank that no matrix needs a basis, which is not differentiated
        shape |= {"direction": "orthogonal", "rank": 1000}
    rule = random_rule(lambda name: 0.02 if "bypass" in name else 0.1, **shape)  # a bypass sees logarithms of several
    return rule.double().requires_grad_(False)  # units: large steps are chaotic


def optimizer_of(model: nn.Module, **options: Any) -> NFNOptimizer:
    """The optimizer from bare parameters, so that it has to find the module."""
    return NFNOptimizer(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1, "rule": learned(), **options})


def standing(model: nn.Module, optimizer: NFNOptimizer) -> Any:
    """Where training stands."""
    state = {name: dict(optimizer.state.get(p, {})) for name, p in model.named_parameters()}
    return model.state_dict(), state, torch.tensor(optimizer.skipped_steps)


def assert_close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- the same steps


@pytest.mark.parametrize("network", BY_NAME.values(), ids=lambda network: network.name)
def test_it_takes_the_steps_of_the_optimizer(network: Network) -> None:
    """From its state, and it can go on from where the inner loop ended: ordinary, differentiable, ordinary."""
    ours, theirs = Problem(network), Problem(network)
    optimizer, reference = (optimizer_of(problem.model, total_steps=8) for problem in (ours, theirs))
    for step, loop in enumerate((ours.train, ours.inner, ours.inner, ours.train)):
        loop(optimizer, range(step, step + 1))
        theirs.train(reference, range(step, step + 1))
        assert_close(standing(ours.model, optimizer), standing(theirs.model, reference))


def test_it_refreshes_where_the_optimizer_does() -> None:
    """At steps 0, 1, 2, 4 and 6; the inner loop ends between refreshes."""
    ours, theirs = Problem(BY_NAME["dropout"]), Problem(BY_NAME["dropout"])
    optimizer, reference = (optimizer_of(problem.model, rule=learned(refresh_every=2)) for problem in (ours, theirs))
    for loop, steps in ((ours.train, range(1)), (ours.inner, range(1, 4)), (ours.train, range(4, 7))):
        loop(optimizer, steps)
        theirs.train(reference, steps)
        assert_close(standing(ours.model, optimizer), standing(theirs.model, reference))


@pytest.mark.parametrize("name", ["cnn_batch_norm", "reused", "gru_both_ways", "fused_qkv"])
def test_the_symmetry_is_found_from_the_functional_module(name: str) -> None:
    problem = Problem(BY_NAME[name])
    optimizer = optimizer_of(problem.model)
    assert optimizer.symmetry is None
    problem.inner(optimizer, range(1))
    expected = symmetry_of(problem.model, *problem.inputs[0]).restrict(dict(problem.model.named_parameters()))
    assert optimizer.symmetry == expected


def test_parts_of_a_functional_module_may_be_called() -> None:
    class Pair(nn.Module):
        """Nobody calls it."""

        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), nn.Linear(2, 4)

    model = Pair()
    optimizer = NFNOptimizer(model.parameters())
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        diffopt.step((fmodel.decode(fmodel.encode(torch.ones(2, 4)))).square().mean())
    assert optimizer.symmetry is not None
    assert len(optimizer.symmetry.free) == 2  # the hidden axis, and the code that passes between the parts
    assert optimizer.names == ("0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias", "1.weight", "1.bias")


def test_without_a_functional_module_parameters_are_handed_over() -> None:
    one, other = Problem(BY_NAME["mlp"]), Problem(BY_NAME["mlp"])
    ours, theirs = optimizer_of(one.model), optimizer_of(other.model)
    diffopt = higher.get_diff_optim(ours, one.model.parameters())
    params = list(one.model.parameters())
    for step in range(STEPS):
        named = dict(zip(dict(one.model.named_parameters()), params, strict=True))
        loss = one.loss(lambda x, named=named: torch.func.functional_call(one.model, named, (x,)), step)  # type: ignore[arg-type]
        params = diffopt.step(loss, params=params)
    diffopt.write_back()
    other.train(theirs, range(STEPS))
    assert_close(standing(one.model, ours), standing(other.model, theirs))


@pytest.mark.parametrize("track", [True, False])
def test_what_is_frozen_stays(track: bool) -> None:
    """Without tracking `higher` lets everything require gradients from the second step on."""
    problem = Problem(BY_NAME["mlp"])
    first = next(problem.model.parameters()).requires_grad_(False)
    before = first.clone()
    optimizer = optimizer_of(problem.model)
    problem.inner(optimizer, range(STEPS), track_higher_grads=track)
    assert torch.equal(first, before)
    assert not optimizer.state[first]


def test_groups_maximize_and_half_precision() -> None:
    def made() -> tuple[nn.Module, NFNOptimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).bfloat16()
        groups = [{"params": model[0].parameters(), "lr": 1e-1}, {"params": model[2].parameters(), "maximize": True}]
        return model, NFNOptimizer(groups, weight_decay=0.1, model=model)

    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    model, optimizer = made()
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        for _ in range(STEPS):
            diffopt.step(fmodel(x).square().mean())
        diffopt.write_back()
    other, reference = made()
    for _ in range(STEPS):
        reference.zero_grad()
        other(x).square().mean().backward()
        reference.step()
    assert standing(model, optimizer)[1]["0.weight"]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(standing(model, optimizer), standing(other, reference), rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_is_skipped_and_counted() -> None:
    problem = Problem(BY_NAME["mlp"])
    optimizer = optimizer_of(problem.model)
    problem.train(optimizer, range(1))
    before = copy.deepcopy(standing(problem.model, optimizer))
    with higher.innerloop_ctx(problem.model, optimizer) as (fmodel, diffopt):
        diffopt.step(problem.loss(fmodel, 1) * torch.inf)
        assert optimizer.skipped_steps == 0
        diffopt.write_back()
    assert optimizer.skipped_steps == 1
    assert_close(standing(problem.model, optimizer)[:2], before[:2])


# ---------------------------------------------------------------------------------------------------------- derivatives


def outcome(network: Network, given: dict[str, Tensor], form: str, **options: Any) -> Tensor:
    """The loss behind a window that starts where ordinary training has come, as a function of what can be given.

    Args:
        network: What is trained.
        given: Learning rate `lr`, decay `weight_decay`, horizon `total_steps`, weight of the losses `loss`; tensors of
            the rule; and what is added to initial parameters, by name.
        form: Of the rule.
        **options: Of the inner loop.
    """
    problem, rule = Problem(network), learned(form)
    optimizer = optimizer_of(problem.model, rule=rule)
    problem.train(optimizer, range(2))
    theta = {name: given[name] for name, _ in rule.named_parameters()}
    override = {key: [given[key]] for key in ("lr", "weight_decay", "total_steps")} | {"theta": [theta]} | options
    with higher.innerloop_ctx(problem.model, optimizer, override=override) as (fmodel, diffopt):
        moved = [p + given[n] for (n, _), p in zip(problem.model.named_parameters(), fmodel.fast_params, strict=True)]
        fmodel.update_params(moved)
        for step in range(2, 2 + STEPS):
            diffopt.step(problem.loss(fmodel, step) * given["loss"])
        return problem.loss(fmodel, 2 + STEPS)


def arguments(network: Network, form: str) -> dict[str, Tensor]:
    numbers = {"lr": 1e-2, "weight_decay": 0.1, "total_steps": 9.0, "loss": 1.5}
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
    given |= {n: p.detach().clone() for n, p in learned(form).named_parameters()}
    torch.manual_seed(1)  # away from zero, where the scale of a tensor has no second derivative
    return given | {n: 0.1 * torch.randn_like(p).double() for n, p in network.module().named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("dropout", "adam"),
        ("dropout", "skip only"),
        ("dropout", "orthogonal"),
        ("convolutions", "adam"),
        ("reused", "adam"),
        ("fused_qkv", "adam"),
        ("gru_both_ways", "adam"),
        ("gru_both_ways", "orthogonal"),
    ],
)
def test_meta_gradients_equal_finite_differences(name: str, form: str) -> None:
    """With respect to theta, initial parameters, hyperparameters and the weight of data, one by one."""
    network = BY_NAME[name]
    given = {key: value.requires_grad_() for key, value in arguments(network, form).items()}
    grads = torch.autograd.grad(outcome(network, given, form), list(given.values()), materialize_grads=True)
    generator, epsilon = torch.Generator().manual_seed(2), 1e-5
    initial = dict(network.module().named_parameters())
    theta = dict(learned(form).named_parameters())
    for part in (theta, initial, {"lr"}, {"weight_decay"}, {"total_steps"}, {"loss"}):
        direction = {k: torch.randn(given[k].shape, generator=generator, dtype=torch.float64) for k in part}
        analytic = sum((g * direction[k]).sum().item() for k, g in zip(given, grads, strict=True) if k in direction)
        above, below = (
            outcome(network, {k: v.detach() + sign * direction.get(k, 0) for k, v in given.items()}, form).item()
            for sign in (epsilon, -epsilon)
        )
        assert analytic != 0
        # fused_qkv: the gradient of the key bias is rounding noise, which Adam's unit makes large
        tolerance = {"rel": 1e-3, "abs": 2e-5} if name == "fused_qkv" else {"rel": 1e-4, "abs": 2e-6}
        assert analytic == pytest.approx((above - below) / (2 * epsilon), **tolerance), part


def test_first_order_gradients_take_inner_gradients_as_constants() -> None:
    """The same loss; exact for one step, where no gradient depends on theta; otherwise different."""
    network = BY_NAME["dropout"]
    found = {}
    for second in (True, False):
        given = {key: value.requires_grad_() for key, value in arguments(network, "adam").items()}
        loss = outcome(network, given, "adam", second_order=[second])
        found[second] = loss, torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    assert torch.equal(found[True][0], found[False][0])
    number = list(given).index("loss")
    assert found[False][1][number] is None, "the weight of the loss acts through gradients only"
    assert not torch.allclose(found[True][1][0], found[False][1][0], rtol=1e-3)


def test_first_order_gradients_need_no_second_derivative() -> None:
    problem = Problem(BY_NAME["fused_qkv"])
    optimizer = optimizer_of(problem.model)
    optimizer.rule.requires_grad_()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with pytest.raises(RuntimeError, match="not implemented"):
            problem.inner(optimizer, range(STEPS)).backward()
        problem.inner(optimizer, range(STEPS), override={"second_order": [False]}).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in optimizer.rule.parameters())


def test_gradients_reach_the_rule_itself_and_the_module() -> None:
    problem = Problem(BY_NAME["mlp"])
    optimizer = optimizer_of(problem.model)
    optimizer.rule.requires_grad_()
    problem.inner(optimizer, range(STEPS), copy_initial_weights=False).backward()
    for module in (optimizer.rule.network.message_passing.tensor_head, problem.model):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_all_numbers_of_the_groups_can_be_made_trainable_and_set() -> None:
    """As `higher` proposes it; betas belong to the rule, so theirs get no gradient."""
    problem = Problem(BY_NAME["mlp"])
    optimizer = optimizer_of(problem.model)
    override = higher.optim.get_trainable_opt_params(optimizer)
    problem.inner(optimizer, range(STEPS), override=override).backward()
    (lr,) = override["lr"]
    assert lr.grad is not None
    assert override["betas"][0][0].grad is None
    lr.data.mul_(2)
    higher.optim.apply_trainable_opt_params(optimizer, override)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-2)


def test_unknown_names_in_theta_are_refused() -> None:
    problem = Problem(BY_NAME["mlp"])
    with pytest.raises(ValueError, match=r"found \['powre'\]"):
        problem.inner(optimizer_of(problem.model), range(1), override={"theta": [{"powre": torch.zeros(())}]})


# --------------------------------------------------------------------------------------------------------------- memory


def tensors_alive() -> tuple[int, int]:
    """How many, and their bytes."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    return len(tensors), sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"track_higher_grads": False}], ids=["differentiable", "not tracked"])
def test_memory_does_not_grow_over_windows(options: dict[str, bool]) -> None:
    """Neither tensors alive nor their bytes, from the fourth window to the twelfth; a window holds far more."""
    problem = Problem(BY_NAME["dropout"])
    optimizer = optimizer_of(problem.model)
    optimizer.rule.requires_grad_()
    alive = []
    for window in range(12):
        last = problem.inner(optimizer, range(STEPS), **options)
        if last.requires_grad and not options:
            last.backward()
        del last
        if window % 4 == 3:
            alive.append(tensors_alive())
    assert alive[0] == alive[1] == alive[2]


def test_the_page_is_true() -> None:
    """Its code runs, one block after the other."""
    page = (Path(__file__).parent.parent / "docs" / "differentiable.md").read_text()
    told_before: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, told_before)
    assert all(p.grad is not None for p in told_before["initial"].values())


@pytest.mark.slow
def test_nothing_is_registered_unless_asked() -> None:
    script = """
import higher, torch, nfn_optim, nfn_optim.optimizer.differentiable
model = torch.nn.Linear(2, 2)
optimizer = nfn_optim.NFNOptimizer(model)
try:
    higher.get_diff_optim(optimizer, model.parameters())
except ValueError:
    nfn_optim.optimizer.differentiable.register()
higher.get_diff_optim(optimizer, model.parameters())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
