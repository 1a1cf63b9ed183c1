"""Lightning, which calls forward and backward inside of `step`, or leaves all to the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digits import SYMMETRY, axes_of, falls, loader, network
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR

from nfn_optim import NFNOptimizer

pytestmark = pytest.mark.slow

BATCHES, EPOCHS = 10, 2


def classifier(automatic: bool) -> Any:
    """A module whose own forward is never called, only that of the network in it."""
    from lightning.pytorch import LightningModule  # seconds, so not before it is needed

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.losses = network(), list[float]()
            self.automatic_optimization = automatic

        def configure_optimizers(self) -> Any:
            optimizer = NFNOptimizer(self.parameters())
            return {"optimizer": optimizer, "lr_scheduler": LinearLR(optimizer, 0.5, total_iters=EPOCHS)}

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            images, classes = batch
            loss = F.cross_entropy(self.network(images), classes)
            self.losses.append(loss.item())
            if not automatic:
                optimizer: Any = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    return Classifier()


def fit(automatic: bool, epochs: int, checkpoint: str | None = None) -> tuple[Any, Any]:
    """Train, perhaps from a checkpoint on; returns the module and its trainer."""
    from lightning.pytorch import Trainer

    model = classifier(automatic)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader(BATCHES), ckpt_path=checkpoint)
    return model, trainer


@pytest.mark.parametrize("automatic", [True, False])
def test_trains_and_resumes(automatic: bool, tmp_path: Path) -> None:
    model, trainer = fit(automatic, EPOCHS)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, NFNOptimizer)
    assert axes_of(optimizer) == SYMMETRY
    assert falls(model.losses)

    _, half = fit(automatic, EPOCHS // 2)
    checkpoint = str(tmp_path / "half.ckpt")
    half.save_checkpoint(checkpoint)
    resumed, _ = fit(automatic, EPOCHS, checkpoint)
    assert resumed.losses == model.losses[BATCHES * EPOCHS // 2 :]
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
