"""What has to be so before any test is imported, and what tests of several modules need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torchvision_ops

from nfn_optim.engine import inductor

torchvision_ops.declare()


@pytest.fixture
def afresh() -> Iterator[None]:
    """Nothing is compiled yet, and what is compiled will be forgotten."""
    inductor.forget()
    yield
    inductor.forget()
