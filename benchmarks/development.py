"""Compare rules with AdamW, tuned for each task, on tasks that may be looked at while a rule is being chosen.

    python benchmarks/development.py --data FOLDER --rule default --rule runs/digits/theta.safetensors

The folder holds `fashion_mnist.npz` and `cifar10.npz` (arrays `train_x8`, `train_x28`, `train_y`: uint8 images and
labels). Runs are cached by what they depend on, so that only new ones are computed. None of these tasks may be reported
as a test: they are what recipes and rules are chosen on.

Every task is trained for a fixed number of steps on the same initial parameters and batches by

    AdamW      at each of `LEARNING_RATES`, constant and cosine; the best final loss counts as tuned
    a rule     as it comes, not knowing the horizon, and told it (`total_steps`)

The final loss is the mean training loss of the last `SMOOTH` batches. The step reduction is the number of steps of the
tuned AdamW over the number after which the rule's running mean first reaches AdamW's final loss.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfn_optim import NFNOptimizer, pretrained

LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
SMOOTH = 30  # batches
Images = tuple[Tensor, Tensor]


def images(file: str, array: str, data: str) -> Images:
    """Standardised images `(count, channels, height, width)` and labels `(count,)`; at most 20,000."""
    found = np.load(Path(data) / file)
    x = torch.as_tensor(found[array][:20000], dtype=torch.float32)
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2)  # noqa: PLR2004 - grey or colour
    return (x - x.mean()) / x.std(), torch.as_tensor(found["train_y"][: len(x)].astype(np.int64))


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """A multilayer perceptron on flattened images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), act()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int, norm: bool) -> nn.Module:
    """Two convolutions with pooling on 28x28 images, flatten, linear."""

    def block(given: int, made: int) -> list[nn.Module]:
        middle = [nn.BatchNorm2d(made)] if norm else []
        return [nn.Conv2d(given, made, 3, padding=1), *middle, nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(1, channels), *block(channels, 2 * channels), nn.Flatten(), nn.Linear(2 * channels * 49, 10)
    )


@dataclass(frozen=True)
class Task:
    """What to train, on what, for how long."""

    file: str
    array: str
    build: Callable[[], nn.Module]
    batch_size: int
    steps: int


FASHION, CIFAR = "fashion_mnist.npz", "cifar10.npz"
TASKS = {
    "fashion 8x8, MLP 64-32-10": Task(FASHION, "train_x8", lambda: mlp(64, 32, 10), 64, 1000),
    "CIFAR 8x8, MLP 192-64-64-10": Task(CIFAR, "train_x8", lambda: mlp(192, 64, 64, 10, act=nn.GELU), 128, 1000),
    "fashion 28x28, MLP 784-128-128-10": Task(FASHION, "train_x28", lambda: mlp(784, 128, 128, 10), 64, 1000),
    "fashion 28x28, CNN": Task(FASHION, "train_x28", lambda: cnn(8, norm=False), 64, 600),
    "fashion 28x28, CNN BatchNorm": Task(FASHION, "train_x28", lambda: cnn(8, norm=True), 64, 600),
}
_images = lru_cache(maxsize=None)(images)


def losses(name: str, how: tuple[str, float, bool], seed: int, data: str) -> list[float]:
    """Train once.

    Args:
        name: A key of `TASKS`.
        how: `("adamw", lr, cosine)`, or `(rule, 1e-3, told the horizon)`.
        seed: Of initial parameters and batches.
        data: Folder with the images.

    Returns:
        The loss of every batch before its step; 1e3 from where it stopped to be finite.
    """
    torch.set_num_threads(1)
    task, (kind, lr, flag) = TASKS[name], how
    x, y = _images(task.file, task.array, data)
    torch.manual_seed(seed)
    model = task.build()
    batches = torch.Generator().manual_seed(seed + 1)
    schedule = None
    optimizer: torch.optim.Optimizer
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps) if flag else None
    else:
        optimizer = NFNOptimizer(model, lr=lr, rule=kind, total_steps=task.steps if flag else None)
    found = []
    for _ in range(task.steps):
        index = torch.randint(len(x), (task.batch_size,), generator=batches)
        loss = F.cross_entropy(model(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        found.append(loss.item())
        if not math.isfinite(found[-1]):
            return found[:-1] + [1e3] * (task.steps - len(found) + 1)
    return found


def running_mean(curve: list[float]) -> np.ndarray:
    """Mean over the last `SMOOTH` batches, or over all where there are fewer."""
    total = np.cumsum([0.0, *curve])
    last = np.arange(1, len(curve) + 1)
    first = np.maximum(last - SMOOTH, 0)
    return (total[last] - total[first]) / (last - first)


def step_reduction(curve: list[float], tuned: list[float]) -> float:
    """Steps of `tuned` over the steps that `curve` needs to reach its final loss; 0 where it never does."""
    reached = np.nonzero(running_mean(curve) <= running_mean(tuned)[-1])[0]
    return len(tuned) / (int(reached[0]) + 1) if len(reached) else 0.0


def main() -> None:
    """Run what is not cached and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with fashion_mnist.npz and cifar10.npz")
    parser.add_argument("--rule", action="append", default=[], help="name or path of a rule; may be given again")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache", type=Path, default=Path("runs/development"))
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    adamw = [("adamw", lr, cosine) for lr in LEARNING_RATES for cosine in (False, True)]
    rules = [(rule, 1e-3, told) for rule in given.rule for told in (False, True)]
    jobs = [(name, how, seed) for name in TASKS for how in adamw + rules for seed in range(given.seeds)]
    given.cache.mkdir(parents=True, exist_ok=True)

    shipped = Path(pretrained.__file__).parent

    def place(job: tuple[str, tuple[str, float, bool], int]) -> Path:
        name, (rule, *rest), seed = job
        file = next((f for f in (Path(rule), shipped / f"{rule}.safetensors") if f.is_file()), None)
        what = hashlib.sha256(file.read_bytes()).hexdigest() if file else rule
        stamp = f"{name} {TASKS[name].steps} {what} {rest} {seed} {torch.__version__}"
        return given.cache / (hashlib.sha256(stamp.encode()).hexdigest() + ".json")

    missing = [job for job in jobs if not place(job).exists()]
    with ProcessPoolExecutor(given.workers) as pool:
        futures = {pool.submit(losses, *job, given.data): job for job in missing}
        for number, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            place(job).write_text(json.dumps(future.result()))
            print(f"{number}/{len(missing)} {job}", flush=True)
    curves = {job: json.loads(place(job).read_text()) for job in jobs}

    lines = [
        "| task | AdamW tuned | AdamW 1e-3 | rule | horizon | final loss | step reduction, median of seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    table = []
    for name in TASKS:

        def final(how: tuple[str, float, bool], task: str = name) -> list[float]:
            return [float(running_mean(curves[task, how, seed])[-1]) for seed in range(given.seeds)]

        tuned = min(adamw, key=lambda how: statistics.mean(final(how)))
        for how in rules:
            reductions = [step_reduction(curves[name, how, s], curves[name, tuned, s]) for s in range(given.seeds)]
            table.append({"task": name, "tuned": tuned, "rule": how, "step_reduction": reductions, "final": final(how)})
            lines.append(
                f"| {name} | {statistics.mean(final(tuned)):.4f} (lr {tuned[1]:g}{', cosine' if tuned[2] else ''}) "
                f"| {statistics.mean(final(('adamw', 1e-3, False))):.4f} | {Path(how[0]).parent.name or how[0]} "
                f"| {'told' if how[2] else 'not told'} | {statistics.mean(final(how)):.4f} "
                f"({min(final(how)):.4f} to {max(final(how)):.4f}) | {statistics.median(reductions):.2f} |"
            )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "development.json").write_text(json.dumps(table, indent=1))
    (given.out / "development.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
