"""Cost of `watch` at its default interval: time of training steps with it relative to those without.

    python benchmarks/monitor_cost.py

Two copies of a network are trained on the same batches, one of them observed. They alternate by whole intervals, so
that every turn of the observed copy has exactly one observation and a slow moment of the machine affects both; the
median of the ratios of adjacent turns is reported. Adjacent steps with and without an observation measure the cost of
one observation more precisely. Times are processor times of all threads, including the one that writes events, because
the machine is shared. Writes `monitor_cost.json` and `monitor_cost.md`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from result import setting, write
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from nfn_optim import NFNOptimizer, watch

EVERY = 50  # the default
BATCH = 64


def mlp(*sizes: int) -> nn.Sequential:
    """A ReLU network."""
    layers = [layer for fan_in, fan_out in pairwise(sizes) for layer in (nn.Linear(fan_in, fan_out), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Four convolutions with BatchNorm."""
    blocks = [
        layer
        for channels_in, channels_out in pairwise((3, 32, 64, 64, 128))
        for layer in (
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 4, 10))


def transformer() -> nn.Sequential:
    """Eight blocks with attention, 98 tensors."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 8, enable_nested_tensor=False), nn.Flatten(), nn.Linear(64 * 16, 10)
    )


MODELS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "MLP 784-128-10": (lambda: mlp(784, 128, 10), (784,)),
    "MLP 784-700-700-10": (lambda: mlp(784, 700, 700, 10), (784,)),
    "CNN, 4 convolutions": (cnn, (3, 32, 32)),
    "transformer, 8 blocks": (transformer, (16, 64)),
}
CASES = [("MLP 784-128-10", "adamw"), *((name, "default") for name in MODELS)]


class Training:
    """A network in training; every copy has the same weights and batches."""

    def __init__(self, name: str, rule: str) -> None:
        torch.manual_seed(0)
        make, shape = MODELS[name]
        self.model, self.x = make(), torch.randn(BATCH, *shape)
        self.y = torch.randint(10, (BATCH,))
        self.optimizer = NFNOptimizer(self.model, rule=rule)

    def run(self, steps: int) -> float:
        """Take some steps; returns their time in seconds."""
        start = time.process_time()
        for _ in range(steps):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
        return time.process_time() - start


def cost(name: str, rule: str, pairs: int, folder: str) -> dict[str, Any]:
    """A row of the table."""
    alone, observed = Training(name, rule), Training(name, rule)
    ratios, seconds = [], []
    with SummaryWriter(folder) as writer, watch(observed.optimizer, writer) as observer:
        for turn in range(pairs + 1):
            one, other = (alone, observed) if turn % 2 else (observed, alone)
            first, second = one.run(EVERY), other.run(EVERY)
            if turn > 0:  # the first turn traces the network and writes layout and text
                without, with_monitor = (first, second) if one is alone else (second, first)
                ratios.append(with_monitor / without)
                seconds.append(without / EVERY)
        observations = []
        for _ in range(5 * pairs):
            observer.every = 10**9
            observed.run(1)
            without = observed.run(1)
            observer.every = 1
            observations.append(observed.run(1) - without)
    quartiles = statistics.quantiles(ratios, n=4)
    step, observation = statistics.median(seconds), statistics.median(observations)
    return {
        "model": name,
        "rule": rule,
        "tensors": sum(1 for _ in observed.model.parameters()),
        "parameters": sum(p.numel() for p in observed.model.parameters()),
        "step_milliseconds": step * 1e3,
        "observation_milliseconds": observation * 1e3,
        "observation_over_interval": observation / (EVERY * step),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "pairs": pairs,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--pairs", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, rule in CASES:
            rows.append(cost(name, rule, args.pairs, f"{folder}/{len(rows)}"))
            print(rows[-1], flush=True)
    about = setting("torch")
    lines = [
        f"{about}. Batches of {BATCH}, an observation every {EVERY} steps. *Cost* is the time of an observation "
        f"relative to that of the steps between two; *measured* is the additional time of training with `watch`, "
        f"median (quartiles) of {args.pairs} pairs of turns of {EVERY} steps.",
        "",
        "| model | tensors | rule | step, ms | observation, ms | cost, % | measured, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        middle, low, high = (100 * (value - 1) for value in (row["ratio"], *row["ratio_quartiles"]))
        lines.append(
            f"| {row['model']} | {row['tensors']} | {row['rule']} | {row['step_milliseconds']:.2f} "
            f"| {row['observation_milliseconds']:.2f} | {100 * row['observation_over_interval']:.2f} "
            f"| {middle:+.1f} ({low:+.1f} to {high:+.1f}) |"
        )
    write(args.out, "monitor_cost", "\n".join(lines), {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
