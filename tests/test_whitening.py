"""Whitening: what is mixed into a direction has columns that are independent of each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rule_forms import SYMMETRY, config_of, draw
from rules import random_rule
from torch import Tensor

from nfn_optim import RuleConfig, UpdateRule
from nfn_optim.rule.whitening import DAMPING, GRAM, WHITENER, next_whiteners, whiten

ROWS, COLUMNS = 40, 6
COUNT = torch.tensor(float(COLUMNS))


def correlated(steps: int, seed: int = 0) -> list[Tensor]:
    """Momenta of which one column is nearly the sum of the others, and some are much longer."""
    torch.manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, dtype=torch.float64) * torch.tensor([5.0, 2, 1, 1, 1, 0.5])
    return [torch.randn(ROWS, COLUMNS, dtype=torch.float64) @ mix for _ in range(steps)]


def learn(momenta: list[Tensor]) -> tuple[Tensor, Tensor]:
    """C and W after some steps in the whole space."""
    gram = torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64)
    for momentum in momenta:
        [(gram, whitener)] = next_whiteners([gram], [momentum], [COUNT], [None], 0)
    return gram, whitener


def spread(x: Tensor) -> float:
    """Largest over smallest singular value."""
    values = torch.linalg.svdvals(x)
    return (values[0] / values[-1]).item()


def test_whitened_columns_are_independent() -> None:
    momenta = correlated(60)
    gram, whitener = learn(momenta[:-1])
    expected = sum(m.mT @ m / m.square().sum() * 0.04 * 0.96**age for age, m in enumerate(momenta[-2::-1]))
    torch.testing.assert_close(gram, expected)
    damped = gram + DAMPING * gram.trace() / COLUMNS * torch.eye(COLUMNS, dtype=torch.float64)
    values = torch.linalg.eigvalsh(whitener @ damped @ whitener).sqrt()
    assert values.min() > 0.6 and values.max() < 1.25  # the polynomial's
    z = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    whitened = whiten(z, momenta[-1], whitener, torch.tensor(1.0, dtype=torch.float64))
    assert spread(whitened) < 0.4 * spread(momenta[-1])
    torch.testing.assert_close(whitened.norm(), z.norm())  # in units of what it replaces


def test_a_part_of_it_is_mixed_in() -> None:
    *momenta, last = correlated(8)
    _, whitener = learn(momenta)
    z, part = torch.randn(ROWS, COLUMNS, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    whole = whiten(z, last, whitener, torch.ones_like(part))
    torch.testing.assert_close(whiten(z, last, whitener, part), 0.7 * z + 0.3 * whole)


def test_it_commutes_with_permutations_and_with_turns_of_the_basis() -> None:
    *momenta, last = correlated(8)
    z, part = torch.randn(ROWS, COLUMNS, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    result = whiten(z, last, learn(momenta)[1], part)
    rows, turn = torch.randperm(ROWS), torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, dtype=torch.float64))[0]
    gram = torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64)
    for step, momentum in enumerate(momenta):  # the basis changes after the first step
        turned = momentum[rows] @ turn if step else momentum[rows]
        [(gram, whitener)] = next_whiteners([gram], [turned], [COUNT], [None if step else turn], 0)
    torch.testing.assert_close(whiten(z[rows] @ turn, last[rows] @ turn, whitener, part), result[rows] @ turn)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e15])
def test_gradients_of_any_size_leave_it_finite(size: float) -> None:
    momentum = (size * correlated(1)[0]).float()
    gram = torch.zeros(COLUMNS, COLUMNS)
    for _ in range(3):
        [(gram, whitener)] = next_whiteners([gram], [momentum], [COUNT], [None], 0)
    result = whiten(torch.ones(ROWS, COLUMNS), momentum, whitener, torch.tensor(0.5))
    assert all(x.isfinite().all() for x in (gram, whitener, result))


def test_a_rule_is_invariant_to_the_scale_of_the_loss() -> None:
    rule = UpdateRule(replace(config_of("mixture"), refresh_every=2)).double()
    updates = []
    for scale in (1.0, 1e4):
        params = draw(0)
        state = rule.init(params)
        for step in range(5):
            grads = {name: scale * g for name, g in draw(step + 1).items()}
            refresh = rule.refreshes(step)
            update, state = rule(params, grads, state, SYMMETRY, lr=1e-2, refresh=refresh)
        updates.append(update["w"])
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-5, atol=1e-9)


def test_without_it_the_state_has_no_gram_matrix() -> None:
    params = {"w": torch.ones(3, 2)}
    with_it, without = (random_rule(rank=2, mixes=True, whitening=part).init(params)["w"] for part in (0.5, 0.0))
    assert with_it.keys() - without.keys() == {GRAM, WHITENER}


def test_a_whitening_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="whitening of 0 to 1"):
        RuleConfig(whitening=1.5, direction="orthogonal")
    with pytest.raises(ValueError, match="orthogonal directions"):
        RuleConfig(whitening=0.5)
