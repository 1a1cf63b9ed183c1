"""How long a step takes, side by side: optimizers take turns on the same task, so that the machine's moods cancel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from meta_train.evaluation.optimizers import Setting
from meta_train.evaluation.task import Task

ROUNDS, STEPS = 5, 8  # whole turns of a rule whose neurons talk at every second, fourth or eighth step


def step_times(task: Task, settings: Sequence[Setting], data: Path) -> list[float]:
    """Seconds per training step, forward and backward included: of each setting the median over its turns.

    Args:
        task: What is trained.
        settings: With what.
        data: The data folder.
    """
    loops = []
    for setting in settings:
        torch.manual_seed(0)
        training = task.begin(data)
        loops.append((training, setting.optimizers(training.model, task.steps), torch.Generator().manual_seed(1)))
    seconds: list[list[float]] = [[] for _ in settings]
    for turn in range(ROUNDS + 1):  # the first one is not counted: symmetries are traced, kernels compiled
        for (training, optimizers, batches), found in zip(loops, seconds, strict=True):
            begun = time.perf_counter()
            for _ in range(STEPS):
                loss = training.loss(batches)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                for optimizer in optimizers:
                    optimizer.step()
            if turn > 0:
                found.append((time.perf_counter() - begun) / STEPS)
    return [statistics.median(found) for found in seconds]
