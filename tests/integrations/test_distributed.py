"""Two gloo ranks: they stay together, and do what one process does with the whole batch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import parallel_training
import pytest
import torch
from digits import SYMMETRY, axes_of, batches, falls, network, train
from ranks import WORLD, Ranks
from rules import random_rule
from torch import Tensor

from nfn_optim import NFNOptimizer
from nfn_optim.engine.executor import Execution
from nfn_optim.pretrained import load
from nfn_optim.rule import UpdateRule
from nfn_optim.rule.features import ROW_CHANNELS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two processes."""
    started = Ranks()
    yield started
    started.close()


def alone(hidden: int = 24, rule: UpdateRule | str = "default") -> list[Tensor]:
    """The parameters after the same training in one process."""
    model = network(hidden)
    train(model, NFNOptimizer(model, rule=rule), batches(parallel_training.STEPS))
    return [p.detach() for p in model.parameters()]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    """Bit-equal."""
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def check(outcomes: list[Any], expected: list[Tensor], digits: float = 1e-3) -> None:
    """Ranks are bit-equal, and equal to one process but for rounding, which training amplifies."""
    first, second = outcomes
    assert first["losses"] == second["losses"]
    assert equal(first["params"], second["params"])
    assert first["axes"] == second["axes"]
    for found, p in zip(first["params"], expected, strict=True):
        torch.testing.assert_close(found, p, rtol=digits, atol=digits / 50)


def test_data_parallel(ranks: Ranks) -> None:
    outcomes = ranks.run(parallel_training.data_parallel)
    check(outcomes, alone())
    assert falls(outcomes[0]["losses"])
    assert outcomes[0]["axes"] == SYMMETRY


@pytest.mark.parametrize("hidden", [16, 7])
def test_fully_sharded(ranks: Ranks, hidden: int) -> None:
    outcomes = ranks.run(parallel_training.fully_sharded, hidden)
    check(outcomes, alone(hidden))
    rows = (hidden + 64) + hidden + (10 + hidden) + 10
    sent = [
        1,  # whether all gradients are finite
        ROW_CHANNELS * (rows + 4),  # sums over rows and tensors
        hidden * (2 * 64 + 1) + 10 * (2 * hidden + 1),  # Z and N of at most 128 columns, and energies of rows
    ]
    for outcome in outcomes:
        assert outcome["sent"] == sent
        assert falls(outcome["losses"])
        assert outcome["axes"] == SYMMETRY


@pytest.mark.parametrize("sizes", [(160, 20000, 10), (1000, 4000, 10)])
def test_counts_from_shapes_are_what_is_sent_and_held(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    """Of `benchmarks/scaling.py`, at the first step, one with a refresh and one without.

    The projections of the first network are larger than its matrices.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent / "benchmarks"))
    scaling = importlib.import_module("scaling")
    rule = load()
    shapes = [shape for given, made in pairwise(sizes) for shape in ((made, given), (made,))]
    counts, every = scaling.Counts(shapes, rule), rule.config.refresh_every
    tile = scaling.BYTES * scaling.TILE_NUMBERS * Execution().tile
    steps = {0: {"refresh": True, "first": True}, every: {"refresh": True}, every + 1: {"refresh": False}}
    for rank, outcome in enumerate(ranks.run(parallel_training.sent_and_held, sizes, list(steps))):
        assert outcome["sent"] == [counts.sent(**step) for step in steps.values()]
        assert rank or outcome["state"] == counts.state(WORLD)
        made = scaling.BYTES * outcome["state"]  # at the first step
        for held, first in zip(outcome["held"], (True, False), strict=False):
            expected = scaling.BYTES * counts.transient(WORLD, first=first)
            assert expected == pytest.approx(held - first * made, abs=tile / 2)


@pytest.mark.parametrize(
    "config",
    [
        {"rounds": 2},
        {"power": 0.5},
        {"refresh_every": 2},
        {"rank": 4, "adapt_rate": 0.0},
        {"rank": 8, "adapt_rate": 0.0, "exact": True, "whitening": 0.5},
    ],
)
def test_fully_sharded_with_a_rule_of_which_nothing_is_zero(ranks: Ranks, config: dict[str, Any]) -> None:
    check(
        ranks.run(partial(parallel_training.fully_sharded, 7, **config)),
        alone(7, random_rule(0.1, **config)),
        digits=1e-2 if "rank" in config else 1e-3,
    )


def test_fully_sharded_with_a_tensor_that_holds_two(ranks: Ranks) -> None:
    """Each of which lies on one rank."""
    model = parallel_training.Gate(6)
    train(model, NFNOptimizer(model), batches(parallel_training.STEPS))
    outcomes = ranks.run(parallel_training.fused)
    check(outcomes, [p.detach() for p in model.parameters()])


def test_sharded_weights_that_were_trained_before_are_recognised(ranks: Ranks) -> None:
    expected = parallel_training.first_step_sizes(parallel_training.trained_gate())
    assert max(expected) < -1
    for found in ranks.run(parallel_training.fully_sharded_and_trained_before):
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_rank_without_any_part(ranks: Ranks) -> None:
    check(ranks.run(parallel_training.fully_sharded, 1), alone(1), digits=1e-2)


def test_fully_sharded_in_mixed_precision(ranks: Ranks) -> None:
    first, second = ranks.run(parallel_training.mixed_precision)
    assert falls(first["losses"])
    assert first["axes"] == SYMMETRY
    assert equal(first["params"], second["params"])
    assert all(p.dtype == torch.float32 for p in first["params"])


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flat_shards_are_trained_one_by_one_with_a_warning(ranks: Ranks, use_orig_params: bool) -> None:
    for outcome in ranks.run(parallel_training.flattened, use_orig_params):
        assert falls(outcome["losses"])
        assert outcome["axes"] == {}
        (message,) = (text for text in outcome["warnings"] if "deprecated" not in text)
        assert "FSDP1 flattens parameters" in message


def test_tensor_parallel(ranks: Ranks) -> None:
    outcomes = ranks.run(parallel_training.tensor_parallel)
    check(outcomes, alone(8), 2e-3)
    assert outcomes[0]["axes"] == SYMMETRY


@pytest.mark.parametrize("how", ["FSDP2", "DDP"])
def test_moments_in_bfloat16_are_rounded_alike_on_any_number_of_ranks(ranks: Ranks, how: str) -> None:
    expected = parallel_training.given_gradients("neither")
    for found in ranks.run(parallel_training.given_gradients, how):
        assert all(found[name].dtype == torch.bfloat16 for name in expected)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(ranks: Ranks) -> None:
    assert ranks.run(parallel_training.poisoned) == [{"skipped": 1, "kept": True}] * 2


def test_sharded_state_is_saved_whole_and_resumes(ranks: Ranks) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    first, second = ranks.run(parallel_training.sharded_checkpoint)
    for outcome in (first, second):
        assert outcome["losses"] == outcome["uninterrupted"]
    assert equal(first["params"], second["params"])
    model = network(7)
    model.load_state_dict(first["weights"])
    optimizer = NFNOptimizer(model)
    set_optimizer_state_dict(model, optimizer, first["saved"], options=StateDictOptions(full_state_dict=True))
    losses = train(model, optimizer, batches(parallel_training.STEPS)[parallel_training.STEPS // 2 :])
    assert axes_of(optimizer) == SYMMETRY
    torch.testing.assert_close(losses, first["losses"], rtol=1e-4, atol=0)


def test_zero_redundancy(ranks: Ranks) -> None:
    first, second = ranks.run(parallel_training.zero_redundancy)
    for outcome in (first, second):
        assert outcome["losses"] == outcome["uninterrupted"]
        assert falls([*outcome["first"], *outcome["losses"]])
    assert equal(first["params"], second["params"])
    parts = first["axes"], second["axes"]
    assert sorted([*parts[0], *parts[1]]) == sorted(SYMMETRY)
