"""Settings that precede the import of any test, and fixtures of several test files."""

from __future__ import annotations

import gc
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torchvision_ops
import zoo

from nfn_optim.engine import inductor
from nfn_optim.optimizer.call_observer import OBSERVER

torchvision_ops.declare()
# They have no doctests, and looking for some would import all of them.
collect_ignore = [p.name for p in Path(__file__).parent.glob("*.py") if not p.name.startswith("test_")]


SAMPLE = 5
"""Of the cases over which a slow test is repeated `make test` runs one in so many, and `make test-all` all."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--sample`, for `make test`."""
    text = f"of the cases of a slow test one in {SAMPLE}; no exhaustive test"
    parser.addoption("--sample", action="store_true", help=text)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is repeated over the zoo is slow, except for a few of its networks; take a sample of what is slow."""
    slow = {f"{name}{more}" for name in zoo.BY_NAME.keys() - zoo.FEW for more in ("", ", NP")}
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if slow & {name for value in given if isinstance(name := getattr(value, "name", value), str)}:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("exhaustive"):
            item.add_marker(pytest.mark.slow)
        elif hasattr(item, "callspec") and item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0]].append(item)
    if config.getoption("--sample"):
        left_out = {item for test, of_test in cases.items() for item in set(of_test) - set(sampled(test, of_test))}
        left_out |= {item for item in items if item.get_closest_marker("exhaustive")}
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def sampled(test: str, cases: list[pytest.Item]) -> list[pytest.Item]:
    """The cases of a test that are in the sample; tests begin with different ones, so that it has every network."""
    return cases[zlib.crc32(test.encode()) % min(SAMPLE, len(cases)) :: SAMPLE]


@pytest.fixture
def empty_cache() -> Iterator[None]:
    """No graph is compiled before the test, and those of the test are dropped."""
    inductor.clear()
    yield
    inductor.clear()


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """`gc.collect` does not look at what there was before the tests of the file, which takes seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def short_pretraining(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks that benchmarks train further have only taken two steps."""
    from meta_train.evaluation import pretraining

    kept = (pretraining.trained_on_clothes, pretraining.trained_gpt)
    for trained in kept:
        trained.cache_clear()
    monkeypatch.setattr(pretraining, "CLOTHES_STEPS", 2)
    monkeypatch.setattr(pretraining, "GPT_STEPS", 2)
    yield
    for trained in kept:
        trained.cache_clear()


@pytest.fixture(autouse=True)
def _no_observer_of_another_test() -> Iterator[None]:
    """An optimizer that a failed test keeps alive no longer waits for a forward pass."""
    yield
    for listener in list(OBSERVER._listeners):
        OBSERVER.discard(listener)
