"""Models from timm, transformers and torch: traced without warnings, certified, and trained with NFNOptimizer."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from real_model import RealModel
from real_models import REAL_MODELS, UNTRACED

from nfn_optim import NFNOptimizer
from nfn_optim.symmetry import Symmetry, certify, symmetry_of

STEPS = 10


def each(models: tuple[RealModel, ...]) -> Any:
    """Every model; those of one package by one process, which imports it and keeps what was traced."""

    def marks(package: str) -> list[pytest.MarkDecorator]:
        return [pytest.mark.xdist_group(package), *([] if package == "torch" else [pytest.mark.slow])]

    packages = [(model, model.name.partition(".")[0]) for model in models]
    params = [pytest.param(model, id=model.name, marks=marks(package)) for model, package in packages]
    return pytest.mark.parametrize("model", params)


@cache
def traced(model: RealModel) -> tuple[Symmetry, tuple[str, ...]]:
    """The symmetry of a model on its batch, and the warnings of tracing."""
    args, kwargs = model.batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        symmetry = symmetry_of(model.module(), *args, **kwargs)
    return symmetry, tuple(str(warning.message) for warning in caught)


def losses_of(model: RealModel) -> list[float]:
    """The losses on one batch before every step and after the last."""
    module, (args, kwargs) = model.module(), model.batch()
    optimizer = NFNOptimizer(module)
    losses = []
    for _ in range(STEPS + 1):
        torch.manual_seed(2)  # the same dropout mask at every step, so that losses are comparable
        loss = model.loss(module(*args, **kwargs))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not optimizer.skipped_steps
    return losses


@each(REAL_MODELS)
def test_traces_without_warnings(model: RealModel) -> None:
    symmetry, messages = traced(model)
    assert not messages
    assert symmetry.free, str(symmetry)


@each(REAL_MODELS)
def test_every_axis_is_certified(model: RealModel) -> None:
    args, kwargs = model.batch()
    symmetry, _ = traced(model)
    certificate = certify(model.module(), symmetry, *args, **kwargs)
    assert certificate.ok, f"{certificate}\n{symmetry}"
    assert certificate.errors


@each(REAL_MODELS)
def test_trains(model: RealModel) -> None:
    losses = losses_of(model)
    assert losses[-1] < losses[0], losses


@each(UNTRACED)
def test_models_that_fake_tensors_cannot_follow_train(model: RealModel) -> None:
    losses = losses_of(model)  # a warning would be an error
    assert losses[-1] < losses[0], losses
