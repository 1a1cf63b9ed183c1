"""`accelerate`: prepared, with gradients accumulated and clipped, saved and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from digits import SYMMETRY, axes_of, falls, loader, network
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR

from nfn_optim import NFNOptimizer

pytestmark = pytest.mark.slow

BATCHES, SAVED_AFTER = 36, 12


def train(save: Path | None = None, load: Path | None = None) -> tuple[nn.Module, NFNOptimizer, list[float]]:
    """Two batches make a step; returns the losses from where it starts."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = NFNOptimizer(model.parameters())
    scheduler = LinearLR(optimizer, total_iters=4)
    prepared = accelerator.prepare(model, optimizer, scheduler, loader(BATCHES))
    model, wrapped, scheduler, data = prepared
    if load is not None:
        accelerator.load_state(str(load))
        data = accelerator.skip_first_batches(data, SAVED_AFTER)
    losses = []
    for images, classes in data:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(images), classes)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
        losses.append(loss.item())
        if save is not None and len(losses) == SAVED_AFTER:
            accelerator.save_state(str(save))
    return model, optimizer, losses


def test_trains_and_resumes(tmp_path: Path) -> None:
    model, optimizer, losses = train(save=tmp_path)
    assert falls(losses)
    assert axes_of(optimizer) == SYMMETRY
    again, resumed, later = train(load=tmp_path)
    assert later == losses[SAVED_AFTER:]
    assert axes_of(resumed) == SYMMETRY
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
