"""An ordinary training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from meta_train.evaluation.accumulation import Accumulated
from meta_train.evaluation.cache import Run
from meta_train.evaluation.optimizers import Setting
from meta_train.evaluation.task import Scores, Task, Training
from nfn_optim import NFNOptimizer


def train(task: Task, setting: Setting, seed: int, data: Path) -> Run:
    """Train one network once.

    Args:
        task: The task to train.
        setting: The optimizer.
        seed: Of initial parameters and batches, which are the same for every setting.
        data: The data folder.
    """
    torch.manual_seed(seed)
    training = task.begin(data)
    optimizers = setting.optimizers(training.model, task.steps, task.weight_decay)
    schedules = [s for o in optimizers if (s := setting.schedule(o, task.steps)) is not None]
    batches = torch.Generator().manual_seed(seed + 1)
    torch.manual_seed(seed)  # so that dropout too is the same for every optimizer
    checks = {round(task.steps * (i + 1) / task.checks) for i in range(task.checks)}
    losses: list[float] = []
    held_out: list[tuple[int, Scores]] = []
    seconds = 0.0
    for step in range(1, task.steps + 1):
        started = time.perf_counter()
        losses.append(compute_gradients(training, optimizers, batches))
        if not math.isfinite(losses[-1]):
            break
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        seconds += time.perf_counter() - started
        if step in checks:
            held_out.append((step, scores_of(training, optimizers)))
    losses += [math.inf] * (task.steps - len(losses))
    learned = [o for o in optimizers if isinstance(o, NFNOptimizer)]
    return Run(losses, held_out, seconds, sum(o.skipped_steps for o in learned), sum(o.fallbacks for o in learned))


def compute_gradients(
    training: Training, optimizers: Sequence[torch.optim.Optimizer], batches: torch.Generator
) -> float:
    """The mean loss of the batches of a step, whose gradients are set; without some of them if it is not finite."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    total, count = 0.0, training.count if isinstance(training, Accumulated) else 1
    for _ in range(count):
        loss = training.loss(batches)
        total += loss.item() / count
        if not math.isfinite(total):
            break
        (loss / count if count > 1 else loss).backward()  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def scores_of(training: Training, optimizers: list[torch.optim.Optimizer]) -> Scores:
    """Held-out scores; with a schedule-free optimizer, at its averaged parameters."""
    averaging = [o for o in optimizers if hasattr(o, "eval") and hasattr(o, "train")]
    training.model.eval()
    for optimizer in averaging:
        optimizer.eval()
    scores = training.held_out()
    for optimizer in averaging:
        optimizer.train()
    training.model.train()
    return {name: score if math.isfinite(score) else math.inf for name, score in scores.items()}
