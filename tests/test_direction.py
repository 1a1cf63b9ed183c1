"""Base directions: each keeps the contract of `Direction`; a new one needs a class and a line in the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from rule_forms import SYMMETRY, draw
from rules import random_rule
from torch import Tensor

from nfn_optim import Symmetry, UpdateRule
from nfn_optim.engine.blocks import Vectors
from nfn_optim.engine.executor import Execution, Executor, LowRank, Mixture
from nfn_optim.engine.moments import SQRT_EPS, State
from nfn_optim.engine.sharding import Shards
from nfn_optim.rule import config as configuration
from nfn_optim.rule.direction import Direction, StepDirection, mixed
from nfn_optim.rule.pooled import Pooled
from nfn_optim.rule.step import Step


class RowNormalized(Direction):
    """Rows of matrices of equal length: X / rms of the row of X, which needs the sums over rows at every step."""

    terms: ClassVar[int] = 2

    def terms_of(self, coefficient: Tensor, enabled: Tensor) -> list[Tensor]:
        return [coefficient * (1 - enabled), coefficient * enabled]

    def rms_bound(self, rms: Tensor, is_matrix: Tensor) -> Tensor:
        return rms.clamp(min=1.0)

    def prepare(
        self,
        executor: Executor,
        step: Step,
        shards: Shards | None,
        pooled: Pooled | None,
        mixture: Mixture,
    ) -> StepDirection:
        inverse_rms = {}
        for index, block in enumerate(executor.blocks):
            if not isinstance(block.layout, Vectors):
                by_row = executor.sums(index)[0][..., :1]  # of squares of X
                inverse_rms[index] = (by_row / block.arrays[0].shape[-1] + SQRT_EPS).rsqrt()
        return RowNormalizedStep(inverse_rms)


@dataclass(frozen=True)
class RowNormalizedStep(StepDirection):
    inverse_rms: dict[int, Tensor]  # `(*batch, rows, 1)` by index of the block

    def combine(self, index: int, coefficients: Tensor) -> tuple[Tensor, LowRank | None]:
        x, normalized, others = coefficients[..., :1], coefficients[..., 1:2], coefficients[..., 2:]
        x = x + normalized * self.inverse_rms.get(index, 1.0)
        return mixed(torch.cat([x, others], -1)), None


@pytest.fixture(params=["adam", "orthogonal", "row normalized"])
def direction(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(configuration.DIRECTIONS, "row normalized", lambda _: RowNormalized())
    yield str(request.param)


def rule_with(direction: str) -> UpdateRule:
    return random_rule(0.1, direction=direction, rank=2, hidden=4, refresh_every=2).double().requires_grad_(False)


def trained(
    rule: UpdateRule, params: dict[str, Tensor], symmetry: Symmetry, execution: Execution | None = None
) -> State:
    """Parameters and state after five steps, pure or in place."""
    params = {n: p.clone() for n, p in params.items()}
    state = rule.init(params)
    for step in range(5):
        grads = {n: p.sin() + 0.1 for n, p in params.items()}
        if execution is not None:
            rule.step_(params, grads, state, symmetry, lr=0.01, refresh=rule.refreshes(step), execution=execution)
        else:
            update, state = rule(params, grads, state, symmetry, lr=0.01, refresh=rule.refreshes(step))
            params = {n: p + update[n] for n, p in params.items()}
    return {n: {"param": p, **state[n]} for n, p in params.items()}


@pytest.mark.parametrize("execution", [Execution(), Execution(tile=1)], ids=["cached", "in tiles"])
def test_in_place_is_pure(direction: str, execution: Execution) -> None:
    rule, params = rule_with(direction), draw(0)
    expected, found = trained(rule, params, SYMMETRY), trained(rule, params, SYMMETRY, execution)
    for n, entries in expected.items():
        for key, value in entries.items():
            torch.testing.assert_close(found[n][key], value, rtol=1e-7, atol=1e-9)


def test_training_is_equivariant(direction: str) -> None:
    rule, params = rule_with(direction), draw(0)
    permutations = SYMMETRY.random_permutations(torch.Generator().manual_seed(1))
    moved = trained(rule, SYMMETRY.permute(params, permutations), SYMMETRY)
    expected = {n: entries["param"] for n, entries in trained(rule, params, SYMMETRY).items()}
    for n, p in SYMMETRY.permute(expected, permutations).items():
        torch.testing.assert_close(moved[n]["param"], p, rtol=1e-7, atol=1e-9)


def test_its_size_is_bounded(direction: str) -> None:
    """The root mean square of an update of the direction alone, row by row."""
    rule = UpdateRule(configuration.RuleConfig(direction=direction, rank=2, hidden=0, rounds=0)).double()
    params, grads = draw(0), draw(1)
    adamw = UpdateRule.adamw()
    adam, _ = adamw(params, grads, adamw.init(params), SYMMETRY, lr=1.0)
    update, _ = rule(params, grads, rule.init(params), SYMMETRY, lr=1.0)
    for n, u in update.items():
        rows = (u.reshape(len(u) if u.dim() else 1, -1), adam[n].reshape(len(u) if u.dim() else 1, -1))
        found, adam_rms = (x.square().mean(1).sqrt() for x in rows)
        assert (found <= rule.direction.rms_bound(adam_rms, torch.tensor(float(u.dim() > 1))) * (1 + 1e-6)).all(), n


def test_out_of_range_it_becomes_adams(direction: str) -> None:
    rule, params, grads = rule_with(direction), draw(0), draw(1)
    rule.network.message_passing.tensor_bias[0] = 1e6
    adamw = UpdateRule.adamw()
    expected, _ = adamw(params, grads, adamw.init(params), SYMMETRY, lr=0.01)
    update, _ = rule(params, grads, rule.init(params), SYMMETRY, lr=0.01)
    for n, u in update.items():
        torch.testing.assert_close(u, expected[n])


def test_unknown_directions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one of \['adam', 'orthogonal'\], found 'steepest'"):
        configuration.RuleConfig(direction="steepest")
