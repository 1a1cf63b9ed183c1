"""Settings that precede the import of any test, and fixtures of several test files."""

from __future__ import annotations

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is repeated over the zoo is slow, except for a few of its networks."""
    slow = {f"{name}{more}" for name in zoo.BY_NAME.keys() - zoo.FEW for more in ("", ", NP")}
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if slow & {name for value in given if isinstance(name := getattr(value, "name", value), str)}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def empty_cache() -> Iterator[None]:
    """No graph is compiled before the test, and those of the test are dropped."""
    inductor.clear()
    yield
    inductor.clear()


@pytest.fixture(autouse=True)
def _no_observer_of_another_test() -> Iterator[None]:
    """An optimizer that a failed test keeps alive no longer waits for a forward pass."""
    yield
    for listener in list(OBSERVER._listeners):
        OBSERVER.discard(listener)
