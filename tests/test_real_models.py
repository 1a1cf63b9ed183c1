"""Models from timm, transformers and torch: nothing is unknown, every axis is certified, and they train."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from real_model import RealModel
from real_models import REAL_MODELS, UNTRACED

from nfn_optim import NFNOptimizer
from nfn_optim.symmetry import Symmetry, certify, symmetry_of

STEPS = 10


@cache
def traced(model: RealModel) -> tuple[Symmetry, tuple[str, ...]]:
    """The symmetry of a model on its batch, and what tracing warned about."""
    args, kwargs = model.batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        symmetry = symmetry_of(model.module(), *args, **kwargs)
    return symmetry, tuple(str(warning.message) for warning in caught)


def losses_of(model: RealModel) -> list[float]:
    """The loss on one batch before every step and after the last."""
    module, (args, kwargs) = model.module(), model.batch()
    optimizer = NFNOptimizer(module)
    losses = []
    for _ in range(STEPS + 1):
        torch.manual_seed(2)  # the same dropout at every step, so that losses can be compared
        loss = model.loss(module(*args, **kwargs))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not optimizer.skipped_steps
    return losses


@pytest.mark.parametrize("model", REAL_MODELS, ids=lambda model: model.name)
def test_nothing_is_unknown(model: RealModel) -> None:
    symmetry, warned = traced(model)
    assert not warned
    assert symmetry.free, str(symmetry)


@pytest.mark.parametrize("model", REAL_MODELS, ids=lambda model: model.name)
def test_every_axis_is_certified(model: RealModel) -> None:
    args, kwargs = model.batch()
    symmetry, _ = traced(model)
    certificate = certify(model.module(), symmetry, *args, **kwargs)
    assert certificate.ok, f"{certificate}\n{symmetry}"
    assert certificate.errors


@pytest.mark.parametrize("model", REAL_MODELS, ids=lambda model: model.name)
def test_trains(model: RealModel) -> None:
    losses = losses_of(model)
    assert losses[-1] < losses[0], losses


@pytest.mark.parametrize("model", UNTRACED, ids=lambda model: model.name)
def test_what_cannot_be_traced_trains_all_the_same(model: RealModel) -> None:
    with pytest.warns(UserWarning, match="could not be traced"):
        losses = losses_of(model)
    assert losses[-1] < losses[0], losses
