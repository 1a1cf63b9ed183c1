"""`transformers.Trainer`, with an optimizer or with its class, and resumed from its own checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import axes_of, falls
from prose import Prose, language_model
from torch import nn

from nfn_optim import NFNOptimizer

pytestmark = pytest.mark.slow

STEPS = 24
GIVEN: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "optimizer": lambda model: {"optimizers": (NFNOptimizer(model, lr=3e-3), None)},
    "class": lambda _: {"optimizer_cls_and_kwargs": (NFNOptimizer, {"lr": 3e-3})},
    "class and model": lambda model: {"optimizer_cls_and_kwargs": (NFNOptimizer, {"lr": 3e-3, "model": model})},
}


def trainer(given: str, directory: Path) -> Any:
    """With linear decay, clipping and dropout, as it comes; saved after half of the steps."""
    from transformers import Trainer, TrainingArguments

    model = language_model()
    arguments = TrainingArguments(
        str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=16,
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model, arguments, train_dataset=Prose(), **GIVEN[given](model))


def losses_of(trained: Any) -> list[float]:
    """The loss of every step."""
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("given", GIVEN)
def test_trains_and_resumes(given: str, tmp_path: Path) -> None:
    trained = trainer(given, tmp_path)
    trained.train()
    optimizer = getattr(trained.optimizer, "optimizer", None)  # accelerate's wrapper is around it
    assert isinstance(optimizer, NFNOptimizer)
    axes = axes_of(optimizer)
    block = "transformer.h.0"
    assert axes[f"{block}.mlp.c_fc.weight"][1] == axes[f"{block}.mlp.c_fc.bias"][0]
    assert axes[f"{block}.mlp.c_fc.weight"][1] == axes[f"{block}.mlp.c_proj.weight"][0]
    assert len(axes) == len(list(trained.model.parameters()))
    assert falls(losses_of(trained))
    assert optimizer.param_groups[0]["lr"] == 0.0  # its scheduler is at its end

    resumed = trainer(given, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert losses_of(resumed) == losses_of(trained)
    for one, other in zip(resumed.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(one, other)
