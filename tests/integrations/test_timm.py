"""timm: its registry and factory of optimizers, its groups and its scheduler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from digits import axes_of, batches, falls
from torch import nn
from torch.nn import functional as F

from nfn_optim import NFNOptimizer

pytestmark = pytest.mark.slow

EPOCHS, UPDATES = 4, 7


def from_factory(model: nn.Module, **options: Any) -> Any:
    """What timm's factory makes of a registered name."""
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    default_registry.register(OptimInfo("nfn", NFNOptimizer, has_eps=False))
    return create_optimizer_v2(model, "nfn", lr=3e-3, **options)


def from_groups(model: nn.Module) -> NFNOptimizer:
    """Made from timm's groups."""
    from timm.optim import param_groups_weight_decay

    return NFNOptimizer(param_groups_weight_decay(model, 0.05), lr=3e-3)


GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "factory": partial(from_factory, weight_decay=0.05),
    "factory, decay by layer": partial(from_factory, layer_decay=0.9),
    "groups": from_groups,
}


def mixer() -> nn.Module:
    """A classifier of 8x8 images."""
    from timm.models.mlp_mixer import MlpMixer

    torch.manual_seed(0)
    return MlpMixer(10, 8, in_chans=1, patch_size=2, num_blocks=1, embed_dim=24)


@pytest.mark.parametrize("given", GIVEN)
def test_trains(given: str) -> None:
    from timm.scheduler import create_scheduler_v2

    model = mixer()
    optimizer = GIVEN[given](model)
    assert isinstance(optimizer, NFNOptimizer)
    assert len(optimizer.param_groups) > 1
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=EPOCHS, updates_per_epoch=UPDATES, step_on_epochs=False)
    losses = []
    for update, (images, classes) in enumerate(batches(EPOCHS * UPDATES), 1):
        loss = F.cross_entropy(model(images.reshape(-1, 1, 8, 8)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(update)
        losses.append(loss.item())
    assert falls(losses)
    assert optimizer.param_groups[0]["lr"] < 1e-4  # the scheduler's doing
    axes = axes_of(optimizer)
    assert sorted(axes) == sorted(name for name, _ in model.named_parameters())
    assert axes["blocks.0.mlp_channels.fc1.weight"][0] == axes["blocks.0.mlp_channels.fc2.weight"][1]
