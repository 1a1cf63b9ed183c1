"""The submission to AlgoPerf trains, as its runner would call it.

The stand-in calls the functions as the runner of AlgoPerf 0.6 does: the same arguments in the same order or by the
same names, a read-only training state, checkpoints by `state_dict`. The workload is shaped like its MNIST, with the
digits of scikit-learn.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import digits
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
BORDER = 1500
TARGET = 0.9  # accuracy


class ForwardPassMode(Enum):
    TRAIN = 0
    EVAL = 1


class Workload:
    """The part of AlgoPerf's workload that submissions may use."""

    step_hint = 200
    loss_type = "softmax cross-entropy"
    model_params_types: Any = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.Sigmoid(), nn.Linear(128, 10))
        images, classes = digits.digits()
        self.images, self.classes = images.view(-1, 1, 8, 8), classes

    def queue(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            rows = torch.randint(BORDER, (batch_size,), generator=generator)
            weights = torch.rand(batch_size, generator=generator) < 0.9
            yield {"inputs": self.images[rows], "targets": self.classes[rows], "weights": weights}

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: dict[str, Tensor],
        model_state: Any,
        mode: ForwardPassMode,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float = 0.0,
    ) -> tuple[Tensor, Any]:
        assert params.training == (mode == ForwardPassMode.TRAIN)
        return params(augmented_and_preprocessed_input_batch["inputs"]), model_state

    def loss_fn(
        self, label_batch: Tensor, logits_batch: Tensor, mask_batch: Tensor | None = None, label_smoothing: float = 0.0
    ) -> dict[str, Tensor]:
        each = F.cross_entropy(logits_batch, label_batch, reduction="none", label_smoothing=label_smoothing)
        mask = torch.ones_like(each) if mask_batch is None else mask_batch
        return {"summed": (each * mask).sum(), "n_valid_examples": mask.sum(), "per_example": each * mask}

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        model.eval()
        right = model(self.images[BORDER:]).argmax(-1) == self.classes[BORDER:]
        return right.float().mean().item()


@pytest.fixture
def submission(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With as much of the package `algoperf` as it uses."""
    package, spec = ModuleType("algoperf"), ModuleType("algoperf.spec")
    spec.ForwardPassMode = ForwardPassMode  # type: ignore[attr-defined]
    package.spec = spec  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "algoperf", package)
    place = importlib.util.spec_from_file_location("submission", ROOT / "examples" / "algoperf" / "submission.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


def step(submission: ModuleType, workload: Workload, batch: Any, optimizer_state: Any, number: int) -> tuple[Any, ...]:
    """`update_params` as the runner calls it under the rules for self-tuning algorithms."""
    state: tuple[Any, ...] = submission.update_params(
        workload=workload,
        current_param_container=workload.model,
        current_params_types=workload.model_params_types,
        model_state=None,
        hyperparameters=None,
        batch=batch,
        loss_type=workload.loss_type,
        optimizer_state=optimizer_state,
        eval_results=[],
        global_step=number,
        rng=None,
        train_state=MappingProxyType({"accumulated_submission_time": 0.0}),
    )
    return state


def test_it_reaches_the_target_and_resumes_from_a_checkpoint(submission: ModuleType) -> None:
    workload = Workload()
    model, model_state, queue = workload.model, None, workload.queue(submission.get_batch_size("mnist"))
    state = submission.init_optimizer_state(workload, model, model_state, None, None)
    for number in range(workload.step_hint):
        batch = submission.data_selection(workload, queue, state, model, model_state, None, number, None)
        state, model, model_state = step(submission, workload, batch, state, number)
        if number == workload.step_hint // 2:
            file = io.BytesIO()
            torch.save({key: value.state_dict() for key, value in state.items()}, file)
            file.seek(0)
            saved = torch.load(file)
            state = submission.init_optimizer_state(workload, model, model_state, None, None)
            for key, value in state.items():
                value.load_state_dict(saved[key])
    state, model, _ = submission.prepare_for_eval(
        workload=workload,
        current_param_container=model,
        current_params_types=workload.model_params_types,
        model_state=model_state,
        hyperparameters=None,
        loss_type=workload.loss_type,
        optimizer_state=state,
        eval_results=[],
        global_step=workload.step_hint,
        rng=None,
    )
    assert workload.accuracy(model) > TARGET
    (group,) = state["optimizer"].param_groups
    assert group["total_steps"] == workload.step_hint
    assert state["optimizer"].symmetry.free, "the network is found, whoever calls it"


def test_several_processes_take_the_gradient_of_all_their_examples(
    submission: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over processes of their gradients, as DistributedDataParallel computes it."""
    workload = Workload()
    batch = next(workload.queue(16))
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(5), slice(5, 16))]
    state = submission.init_optimizer_state(workload, workload.model, None, None, None)
    state["optimizer"].param_groups[0]["lr"] = 0.0

    def gradients(of: Any) -> list[Tensor]:
        step(submission, workload, of, state, 0)
        return [p.grad.clone() for p in workload.model.parameters() if p.grad is not None]

    whole = gradients(batch)
    total = batch["weights"].sum()

    def all_reduce(count: Tensor) -> None:
        count.copy_(total)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for expected, *parts in zip(whole, *map(gradients, halves), strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(0), expected)


def test_batch_sizes_are_of_workloads_and_unknown_names_raise(submission: ModuleType) -> None:
    assert submission.get_batch_size("wmt") == 128
    with pytest.raises(ValueError, match="found 'wmt_post_ln'"):
        submission.get_batch_size("wmt_post_ln")
