"""A submission to MLCommons AlgoPerf, in PyTorch, under the rules for self-tuning algorithms.

    python submission_runner.py --framework=pytorch --tuning_ruleset=self --workload=WORKLOAD
        --submission_path=examples/algoperf/submission.py --data_dir=DATA --experiment_dir=OUT --experiment_name=NAME

NFNOptimizer with its defaults and the workload's own number of steps. Nothing else depends on the workload, except for
the batch size, for which the benchmark asks by name. There are no hyperparameters.

**Not run by AlgoPerf's own runner yet**: the package `algoperf` could not be installed where this was written, and it
asks for PyTorch 2.5.1, older than what NFNOptimizer needs. Signatures are those of AlgoPerf 0.6. What has been run, by
`tests/test_algoperf.py`, is a stand-in for the runner with a small workload like its MNIST.

References:
    Benchmarking Neural Network Training Algorithms (Dahl et al., 2023), arXiv:2306.07179
    https://github.com/mlcommons/algorithmic-efficiency/blob/main/docs/DOCUMENTATION.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from algoperf import spec
from torch import Tensor, nn

from nfn_optim import NFNOptimizer

BATCH_SIZES = {
    "criteo1tb": 262_144,
    "fastmri": 32,
    "imagenet_resnet": 1024,
    "imagenet_vit": 1024,
    "librispeech_conformer": 256,
    "librispeech_deepspeech": 256,
    "mnist": 64,
    "ogbg": 512,
    "wmt": 128,
}
"""Those that the benchmark's numbers of steps go with. Variants of a workload have that of the workload."""

State = dict[str, Any]
Update = tuple[State, nn.Module, Any]
"""State of the optimizer, network, auxiliary state of the network."""


def get_batch_size(workload_name: str) -> int:
    """Examples in a step, on all devices.

    Raises:
        ValueError: The name is that of a variant, or unknown; the runner then asks again, with the workload's name.
    """
    if workload_name not in BATCH_SIZES:
        raise ValueError(f"expected a workload of {sorted(BATCH_SIZES)}, found {workload_name!r}")
    return BATCH_SIZES[workload_name]


def init_optimizer_state(
    workload: spec.Workload, model_params: nn.Module, model_state: Any, hyperparameters: Any, rng: Any
) -> State:
    """The optimizer."""
    return {"optimizer": NFNOptimizer(model_params, total_steps=workload.step_hint)}


def update_params(
    workload: spec.Workload,
    current_param_container: nn.Module,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: dict[str, Tensor],
    loss_type: spec.LossType,
    optimizer_state: State,
    eval_results: list[tuple[int, Any]],
    global_step: int,
    rng: Any,
    train_state: Mapping[str, Any] | None = None,
) -> Update:
    """One step on the mean loss of the batch, of all processes if there are several."""
    model, optimizer = current_param_container, optimizer_state["optimizer"]
    model.train()
    optimizer.zero_grad()
    outputs, model_state = workload.model_fn(
        params=model,
        augmented_and_preprocessed_input_batch=batch,
        model_state=model_state,
        mode=spec.ForwardPassMode.TRAIN,
        rng=rng,
        update_batch_norm=True,
    )
    losses = workload.loss_fn(label_batch=batch["targets"], logits_batch=outputs, mask_batch=batch.get("weights"))
    count, processes = losses["n_valid_examples"], 1
    if torch.distributed.is_initialized():  # DistributedDataParallel takes the mean over processes of the gradients
        count, processes = count.clone(), torch.distributed.get_world_size()
        torch.distributed.all_reduce(count)
    (processes * losses["summed"] / count).backward()
    optimizer.step()
    return optimizer_state, model, model_state


def prepare_for_eval(
    workload: spec.Workload,
    current_param_container: nn.Module,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    loss_type: spec.LossType,
    optimizer_state: State,
    eval_results: list[tuple[int, Any]],
    global_step: int,
    rng: Any,
) -> Update:
    """The weights are evaluated as they are."""
    return optimizer_state, current_param_container, model_state


def data_selection(
    workload: spec.Workload,
    input_queue: Iterator[dict[str, Tensor]],
    optimizer_state: State,
    current_param_container: nn.Module,
    model_state: Any,
    hyperparameters: Any,
    global_step: int,
    rng: Any,
) -> dict[str, Tensor]:
    """The next batch."""
    return next(input_queue)
