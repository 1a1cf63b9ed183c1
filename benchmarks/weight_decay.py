"""Weight decay: NFNOptimizer beside AdamW at several strengths, judged by held-out loss.

    python benchmarks/weight_decay.py --data FOLDER

On development tasks that overfit. AdamW has the learning rate and the schedule that were tuned for the task without
decay; NFNOptimizer has its defaults and `total_steps`. Both multiply a weight by 1 - rate x decay at every step, each
with its own rate. Held-out loss of the last weights over that of the same optimizer without decay, and the training
loss likewise; geometric means over tasks and seeds. Writes `weight_decay.json` and `weight_decay.md` to
`benchmarks/results`.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from result import setting, write
from tqdm import tqdm

from meta_train.evaluation.curve import running_mean
from meta_train.evaluation.development import TASKS
from meta_train.evaluation.loop import train
from meta_train.evaluation.optimizers import TUNED, Learned, Setting
from meta_train.evaluation.previous_report import PreviousReport

NAMES = (
    "fashion 8x8, MLP 64-32-10",
    "CIFAR 8x8, MLP 192-64-64-10",
    "fashion 28x28, MLP 784-128-128-10",
    "fashion 28x28, CNN BatchNorm",
    "fashion 28x28, CNN",
    "text, transformer",
)
STRENGTHS = (0.0, 0.1, 1.0, 4.0, 16.0)
RESULTS = Path(__file__).parent / "results"


def main(
    data: Path,
    out: Path = RESULTS,
    seeds: Annotated[int, tyro.conf.arg(help="initial weights and orders of batches")] = 2,
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(help="names of development tasks")] = NAMES,
) -> None:
    """Measure weight decay on development tasks.

    Args:
        data: Folder with `fashion_mnist.npz` and `cifar10.npz`.
        out: Output folder.
        seeds: See above.
        tasks: See above.
    """
    torch.set_num_threads(1)
    previous = PreviousReport.read(RESULTS / "development_default_1.json", "development", (TUNED.name,))
    grid = {str(candidate): candidate for candidate in TUNED.grid}
    rows = []
    pairs = [(task, seed) for task in TASKS if task.name in tasks for seed in range(seeds)]
    for task, seed in tqdm(pairs, unit="task"):
        settings = {
            TUNED.name: grid[previous.settings[task.name, TUNED.name]],
            "NFNOptimizer": Setting(Learned("default"), horizon_known=True),
        }
        for label, chosen in settings.items():
            for strength in STRENGTHS:
                run = train(replace(task, weight_decay=strength), chosen, seed, data)
                scores = {"train": running_mean(run.losses)[-1], "held_out": run.held_out[-1][1]["loss"]}
                rows.append({"task": task.name, "seed": seed, "optimizer": label, "weight_decay": strength, **scores})
    baseline = {(row["task"], row["seed"], row["optimizer"]): row for row in rows if row["weight_decay"] == 0}
    header = ["weight decay", *(f"{strength:g}" for strength in STRENGTHS[1:]), "held-out without"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for label in (TUNED.name, "NFNOptimizer"):
        cells = []
        for strength in STRENGTHS[1:]:
            chosen_rows = [row for row in rows if row["optimizer"] == label and row["weight_decay"] == strength]
            means = [
                statistics.geometric_mean(
                    [row[key] / baseline[row["task"], row["seed"], label][key] for row in chosen_rows]
                )
                for key in ("held_out", "train")
            ]
            cells.append(", ".join(f"{mean:.3f}" for mean in means))
        without = statistics.geometric_mean([row["held_out"] for row in baseline.values() if row["optimizer"] == label])
        lines.append(f"| {label} | {' | '.join(cells)} | {without:.3f} |")
    count = len({row["task"] for row in rows})
    head = f"{setting('torch')}. {count} development tasks, {seeds} seeds. Loss over that without: held-out, training."
    write(
        out,
        "weight_decay",
        head + "\n\n" + "\n".join(lines),
        {"setting": setting("torch"), "seeds": seeds, "rows": rows},
    )


if __name__ == "__main__":
    tyro.cli(main)
