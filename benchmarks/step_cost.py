"""What a step costs: time over fused AdamW, persistent and transient memory, and the speed of meta-training.

    python benchmarks/step_cost.py

Optimizers take turns within every repetition, on one thread, so that a slow moment of the machine hits all of them; a
ratio is the median of the ratios of turns beside each other. Transient memory is the most that the step allocates above
what there was before, counted by the profiler, over the size of the parameters; persistent memory is the optimizer's
state. Writes `step_cost.json` and `step_cost.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from meta_train.meta_gradient import truncated_backprop
from meta_train.tasks import MLPTask, digits
from meta_train.tasks.mlp import Augment, MLPShape
from meta_train.unroll import start, unroll
from nfn_optim import NFNOptimizer, RuleConfig, UpdateRule

Build = Callable[[nn.Module], torch.optim.Optimizer]


def mlp(*sizes: int) -> nn.Sequential:
    """A ReLU network."""
    layers = [layer for fan_in, fan_out in pairwise(sizes) for layer in (nn.Linear(fan_in, fan_out), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Four convolutions with BatchNorm."""
    widths = (3, 32, 64, 64, 128)
    blocks = [
        layer
        for given, made in pairwise(widths)
        for layer in (nn.Conv2d(given, made, 3, padding=1), nn.BatchNorm2d(made), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 4, 10))


MODELS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "MLP 0.1M": (lambda: mlp(784, 128, 10), (8, 784)),
    "MLP 1M": (lambda: mlp(784, 700, 700, 10), (8, 784)),
    "MLP 10M": (lambda: mlp(784, 2700, 2700, 10), (8, 784)),
    "CNN 0.1M": (cnn, (8, 3, 32, 32)),
}
OPTIMIZERS: dict[str, Build] = {
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), foreach=True),
    "NFNOptimizer adamw": lambda m: NFNOptimizer(m, rule="adamw"),
    "NFNOptimizer default": NFNOptimizer,
}


def ready(name: str, build: Build) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """A model with gradients, and its optimizer after two steps."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make()
    optimizer = build(model)
    model(torch.randn(shape)).square().mean().backward()
    for _ in range(2):
        optimizer.step()
    return model, optimizer


def transient(optimizer: torch.optim.Optimizer) -> int:
    """Most bytes that one step holds above what there was before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        optimizer.step()
    now = most = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def step_costs(repetitions: int) -> list[dict[str, Any]]:
    """A row for every model and optimizer."""
    rows = []
    for name in MODELS:
        pairs = {title: ready(name, build) for title, build in OPTIMIZERS.items()}
        times: dict[str, list[float]] = {title: [] for title in pairs}
        for _ in range(repetitions):
            for title, (_, optimizer) in pairs.items():
                begun = time.perf_counter()
                optimizer.step()
                times[title].append(time.perf_counter() - begun)
        for title, (model, optimizer) in pairs.items():
            floats = sum(p.numel() for p in model.parameters())
            state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
            ratios = [own / fused for own, fused in zip(times[title], times["AdamW fused"], strict=True)]
            quartiles = statistics.quantiles(ratios, n=4)
            rows.append(
                {
                    "model": name,
                    "parameters": floats,
                    "optimizer": title,
                    "milliseconds": statistics.median(times[title]) * 1e3,
                    "ratio": statistics.median(ratios),
                    "ratio_quartiles": [quartiles[0], quartiles[2]],
                    "state_floats_per_parameter": sum(v.numel() for v in state) / floats,
                    "transient_over_parameters": transient(optimizer) / (4 * floats),
                }
            )
            print(rows[-1], flush=True)
    return rows


def meta_throughput(repetitions: int) -> dict[str, float]:
    """Inner steps per second (members x steps over time): MLP 64-32-10, batch 64, 16 members."""
    generator = torch.Generator().manual_seed(0)
    task = MLPTask(MLPShape(1, (32,), "relu", False, False, 64), digits(), Augment())
    found = {}
    for title, rule in (("learned", UpdateRule(RuleConfig(power=1.0))), ("AdamW", UpdateRule.nominal())):
        for window, differentiable in ((20, True), (50, False)):
            times = []
            for _ in range(repetitions):
                carry = start(rule, task, 16, 1000, generator)
                begun = time.perf_counter()
                if differentiable and rule.learns:
                    truncated_backprop(rule, task, carry, window, generator, second_order=True)
                elif differentiable:  # the same unroll under differentiable AdamW, to the initial parameters
                    carry.params["0.weight"].requires_grad_()
                    losses, _, _ = unroll(rule, task, carry, window, generator)
                    losses.mean().backward()
                else:
                    with torch.no_grad():
                        unroll(rule, task, carry, window, generator)
                times.append(time.perf_counter() - begun)
            kind = "differentiated" if differentiable else "forward only"
            found[f"{title}, {window} steps {kind}"] = 16 * window / statistics.median(times)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repetitions", type=int, default=21)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, throughput = step_costs(given.repetitions), meta_throughput(5)
    about = f"{date.today()}, torch {torch.__version__}, {platform.machine()}, one thread of {os.cpu_count()}"
    lines = [
        f"{about}. Time over fused AdamW: median (quartiles) of pairs.",
        "",
        "| model | optimizer | ms | over fused AdamW | state, floats a parameter | transient, parameters |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['model']} | {row['optimizer']} | {row['milliseconds']:.2f} | {row['ratio']:.1f} "
            f"({low:.1f} to {high:.1f}) | {row['state_floats_per_parameter']:.2f} "
            f"| {row['transient_over_parameters']:.1f} |"
        )
    lines += ["", "| meta-training, MLP 64-32-10, batch 64, 16 members | inner steps per second |", "|---|---|"]
    lines += [f"| {title} | {value:.0f} |" for title, value in throughput.items()]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "step_cost.md").write_text("\n".join(lines) + "\n")
    content = {"about": about, "steps": rows, "inner_steps_per_second": throughput}
    (given.out / "step_cost.json").write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
