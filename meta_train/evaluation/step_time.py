"""Time per training step; optimizers take turns on a task, so that fluctuations of the machine's speed cancel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from meta_train.evaluation.loop import compute_gradients
from meta_train.evaluation.optimizers import Setting
from meta_train.evaluation.task import Task

ROUNDS, STEPS = 5, 8  # steps per turn: a multiple of the refresh interval, whether that is 2, 4 or 8


def step_times(task: Task, settings: Sequence[Setting], data: Path) -> list[float]:
    """Seconds per training step, forward and backward included: the median over turns per setting.

    Args:
        task: The task to train.
        settings: The optimizers.
        data: The data folder.
    """
    loops = []
    for setting in settings:
        torch.manual_seed(0)
        training = task.begin(data)
        optimizers = setting.optimizers(training.model, task.steps, task.weight_decay)
        loops.append((training, optimizers, torch.Generator().manual_seed(1)))
    seconds: list[list[float]] = [[] for _ in settings]
    for turn in range(ROUNDS + 1):  # the first is a warm-up: symmetries are traced, kernels compiled
        for (training, optimizers, batches), times in zip(loops, seconds, strict=True):
            started = time.perf_counter()
            for _ in range(STEPS):
                compute_gradients(training, optimizers, batches)
                for optimizer in optimizers:
                    optimizer.step()
            if turn > 0:
                times.append((time.perf_counter() - started) / STEPS)
    return [statistics.median(times) for times in seconds]
