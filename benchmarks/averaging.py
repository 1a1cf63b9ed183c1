"""Averages of the last weights, for reading out a run whose length is not known.

    python benchmarks/averaging.py --data FOLDER

NFNOptimizer trains networks of development tasks without `total_steps`, beside moving averages of their weights by
`torch.optim.swa_utils.AveragedModel`. After 1/8, 1/4, 1/2 and all of the steps the loss with averaged weights over that
with the weights themselves is measured, on training batches and held out; geometric means over tasks and seeds. *Told*:
a run of just that length with `total_steps`. Writes `averaging.json` and `averaging.md` to `benchmarks/results`.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from result import setting, write
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from meta_train.evaluation.anytime import PARTS, lengths_of
from meta_train.evaluation.development import TASKS
from meta_train.evaluation.task import Task, Training
from nfn_optim import NFNOptimizer

NAMES = (
    "fashion 8x8, MLP 64-32-10",
    "CIFAR 8x8, MLP 192-64-64-10",
    "fashion 28x28, CNN BatchNorm",
    "text, transformer",
    "text, GRU",
    "fashion 28x28, autoencoder",
    "portrait, SIREN",
    "CIFAR 8x8, VAE",
)
DECAYS = (0.9, 0.97, 0.99)
BATCHES = 16  # over which the training loss is measured

Losses = tuple[float, float]
"""On training batches and held out."""


@torch.no_grad()
def losses_with(training: Training, state: dict[str, Tensor], task: Task) -> Losses:
    """Losses of a network with other weights and buffers; nothing changes."""
    kept = copy.deepcopy(training.model.state_dict())
    training.model.load_state_dict(state)
    training.model.eval()
    batches = torch.Generator().manual_seed(task.steps)
    losses = statistics.fmean(training.loss(batches).item() for _ in range(BATCHES)), training.held_out()["loss"]
    training.model.train()
    training.model.load_state_dict(kept)
    return losses


def steps_of(
    task: Task, seed: int, data: Path, total_steps: int | None, averages: Sequence[float]
) -> list[list[Losses]]:
    """Train, and measure the losses with the weights and their averages.

    Args:
        task: The task.
        seed: Of initial weights and batches.
        data: The data folder.
        total_steps: Where to stop; None for the task's steps, with an unknown horizon.
        averages: Decays of the averages.

    Returns:
        For each length that is read out, the losses with the weights and with each average.
    """
    torch.manual_seed(seed)
    training = task.begin(data)
    model: nn.Module = training.model
    optimizer = NFNOptimizer(model, total_steps=total_steps)
    averaged = [
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]
        for decay in averages
    ]
    batches = torch.Generator().manual_seed(seed + 1)
    read_at = lengths_of(task) if total_steps is None else [total_steps]
    found = []
    for step in range(1, read_at[-1] + 1):
        loss = training.loss(batches)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for average in averaged:
            average.update_parameters(model)
        if step in read_at:
            states = [model.state_dict(), *(average.module.state_dict() for average in averaged)]
            found.append([losses_with(training, state, task) for state in states])
    return found


def main(
    data: Path,
    out: Path = Path(__file__).parent / "results",
    seeds: Annotated[int, tyro.conf.arg(help="initial weights and orders of batches")] = 2,
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(help="names of development tasks")] = NAMES,
) -> None:
    """Measure averages of the last weights on development tasks.

    Args:
        data: Folder with `fashion_mnist.npz` and `cifar10.npz`.
        out: Output folder.
        seeds: See above.
        tasks: See above.
    """
    torch.set_num_threads(1)
    rows = []
    pairs = [(task, seed) for task in TASKS if task.name in tasks for seed in range(seeds)]
    for task, seed in tqdm(pairs, unit="run"):
        untold = steps_of(task, seed, data, None, DECAYS)
        for part, losses, length in zip(PARTS, untold, lengths_of(task), strict=True):
            [[told]] = steps_of(task, seed, data, length, ())
            for label, (train, held) in zip((*DECAYS, "told"), (*losses[1:], told), strict=True):
                ratios = {"train": train / losses[0][0], "held_out": held / losses[0][1]}
                rows.append({"task": task.name, "seed": seed, "part": part, "weights": label, **ratios})
    header = ["weights", *(f"1/{part}" if part > 1 else "all" for part in PARTS)]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for label in (*DECAYS, "told"):
        cells = []
        for part in PARTS:
            chosen = [row for row in rows if row["weights"] == label and row["part"] == part]
            means = (statistics.geometric_mean([row[key] for row in chosen]) for key in ("train", "held_out"))
            cells.append(", ".join(f"{mean:.3f}" for mean in means))
        name = "*told*, no average" if label == "told" else f"average, decay {label}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    count = len({row["task"] for row in rows})
    head = (
        f"{setting('torch')}. {count} development tasks, {seeds} seeds. Loss over that of the weights themselves after"
    )
    text = f"{head} a part of the steps: training, held-out.\n\n" + "\n".join(lines)
    write(out, "averaging", text, {"setting": setting("torch"), "seeds": seeds, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main)
