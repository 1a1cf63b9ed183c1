"""Sensitivity: NFNOptimizer beside AdamW at other learning rates, batch sizes and seeds.

    python benchmarks/sensitivity.py --data FOLDER

On development tasks. At factor 1 AdamW has the learning rate and the schedule that were tuned for the task, and
NFNOptimizer its defaults and `total_steps`. Rates are multiplied by factors from 1/4 to 4; batches are a quarter to
sixteen times as large, 16 to 1,024 images, with the same rate and number of steps. Losses over that of AdamW with
all factors 1, held out and on training batches (a running mean); geometric means over tasks and seeds. *Seeds*:
deviation of the logarithm of a loss over seeds, root mean square over tasks, with all factors 1. Writes
`sensitivity.json` and `sensitivity.md` to `benchmarks/results`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from result import setting, write
from tqdm import tqdm

from meta_train.evaluation import losses
from meta_train.evaluation.curve import running_mean
from meta_train.evaluation.datasets import CHARACTERS, characters, images
from meta_train.evaluation.development import FASHION, TASKS
from meta_train.evaluation.loop import train
from meta_train.evaluation.networks import CharacterTransformer, cnn, mlp
from meta_train.evaluation.optimizers import TUNED, Learned, Setting
from meta_train.evaluation.previous_report import PreviousReport
from meta_train.evaluation.study import final_held_out_loss
from meta_train.evaluation.task import Training

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
BATCHES = (0.25, 1.0, 4.0, 16.0)
RESULTS = Path(__file__).parent / "results"
NAMES = (TUNED.name, "NFNOptimizer")


def perceptron(data: Path, batches: float) -> Training:
    """Images of 8x8 pixels."""
    return losses.classification(mlp(64, 32, 10), images(data, FASHION, 8), round(64 * batches))


def convolutions(data: Path, batches: float) -> Training:
    """Images of 28x28 pixels, BatchNorm."""
    return losses.classification(cnn(8, norm=True), images(data, FASHION, 28), round(64 * batches))


def transformer(_data: Path, batches: float) -> Training:
    """Characters."""
    return losses.language(CharacterTransformer(CHARACTERS, 48, 32, 2), characters("scipy"), 48, round(8 * batches))


BEGIN: dict[str, Callable[[Path, float], Training]] = {
    "fashion 8x8, MLP 64-32-10": perceptron,
    "fashion 28x28, CNN BatchNorm": convolutions,
    "text, transformer": transformer,
}
"""Development task -> the same with batches of another size, in terms of its own."""

Row = dict[str, Any]


def mean_ratio(rows: Sequence[Row], point: tuple[str, float, float], key: str) -> float:
    """Geometric mean of some losses over those of AdamW with all factors 1 on the same task and seed.

    Args:
        rows: All losses.
        point: Optimizer, factors of rate and batches.
        key: "train" or "held_out".
    """
    runs = {(row["task"], row["seed"], row["optimizer"], row["rate"], row["batches"]): row[key] for row in rows}
    chosen = {name: loss for name, loss in runs.items() if name[2:] == point}
    return statistics.geometric_mean(loss / runs[*name[:2], TUNED.name, 1.0, 1.0] for name, loss in chosen.items())


def deviation_of(rows: Sequence[Row], optimizer: str, key: str) -> float:
    """Deviation of the logarithm of a loss over seeds, root mean square over tasks; 0 for one seed."""
    logs: dict[str, list[float]] = {}
    for row in rows:
        if row["optimizer"] == optimizer and row["rate"] == row["batches"] == 1:
            logs.setdefault(row["task"], []).append(math.log(row[key]))
    return math.sqrt(statistics.fmean(statistics.variance(x) if len(x) > 1 else 0.0 for x in logs.values()))


def table_of(rows: Sequence[Row], rates: Sequence[float], batches: Sequence[float]) -> str:
    """One line for each optimizer, one column for each factor."""
    heads = [*(f"rate x {x:g}" for x in rates), *(f"batch x {x:g}" for x in batches if x != 1), "seeds"]
    lines = [f"| held-out, training | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    points = [*((rate, 1.0) for rate in rates), *((1.0, size) for size in batches if size != 1)]
    for name in NAMES:
        cells = []
        for rate, size in points:
            cells.append(", ".join(f"{mean_ratio(rows, (name, rate, size), key):.3f}" for key in ("held_out", "train")))
        cells.append(", ".join(f"{deviation_of(rows, name, key):.3f}" for key in ("held_out", "train")))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    data: Path,
    out: Path = RESULTS,
    seeds: Annotated[int, tyro.conf.arg(help="initial weights and orders of batches")] = 3,
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(help="names of development tasks")] = tuple(BEGIN),
    steps: Annotated[int | None, tyro.conf.arg(help="of every run; by default those of the task")] = None,
) -> None:
    """Measure how losses depend on learning rate, batch size and seed.

    Args:
        data: Folder with `fashion_mnist.npz`.
        out: Output folder.
        seeds: See above.
        tasks: See above.
        steps: See above.
    """
    torch.set_num_threads(1)
    previous = PreviousReport.read(RESULTS / "development_default_1.json", "development", (TUNED.name,))
    grid = {str(candidate): candidate for candidate in TUNED.grid}
    points = [*((rate, 1.0) for rate in RATES), *((1.0, size) for size in BATCHES if size != 1)]
    chosen = [task for task in TASKS if task.name in tasks]
    rows: list[Row] = []
    for task, seed, (rate, size) in tqdm([(t, s, p) for t in chosen for s in range(seeds) for p in points], unit="run"):
        begin = partial(BEGIN[task.name], batches=size)
        changed = replace(task, begin=begin, steps=steps or task.steps, checks=1)
        tuned = grid[previous.settings[task.name, TUNED.name]]
        for name, own in zip(NAMES, (tuned, Setting(Learned("default"), horizon_known=True)), strict=True):
            run = train(changed, replace(own, lr=rate * own.lr), seed, data)
            scores = {"train": float(running_mean(run.losses)[-1]), "held_out": final_held_out_loss(run)}
            rows.append({"task": task.name, "optimizer": name, "rate": rate, "batches": size, "seed": seed, **scores})
    about = f"{setting('torch')}. {len(chosen)} development tasks, {seeds} seeds. Loss over AdamW's, all factors 1."
    write(out, "sensitivity", f"{about}\n\n{table_of(rows, RATES, BATCHES)}", {"about": about, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main)
