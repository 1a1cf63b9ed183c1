"""Speed of the training tasks without a rule: one inner step of every family, with 8 and with 64 members.

    python benchmarks/task_speed.py --before benchmarks/results/task_speed.json

A first-order step is a batch, the loss of all members and the gradient of its sum; a second-order step is the same with
`create_graph` and a gradient through that gradient, as in a differentiated window of one step. The measure is the
processor time of one thread in the fastest of many repetitions. Writes `task_speed.json` and `task_speed.md`, with a
column of the results in the file `--before`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from result import setting, write

from meta_train import tasks as families
from meta_train.tasks import Task

MEMBERS = (8, 64)
REPETITIONS = 20
MIN_SECONDS = 0.04  # per repetition

TRANSFORMER = {"width": 20, "heads": 2, "depth": 1, "norm": "layer", "qk_norm": True, "activation": "gelu",
               "fused": False, "bias": False, "initialisation": "default",
               "loss": "cross_entropy"}  # fmt: skip
CNN = {"norm": "none", "activation": "relu", "initialisation": "default", "batch_size": 24, "loss": "cross_entropy"}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp 64-32-10": ("MLPDistribution", {"zoom": 1, "widths": (32,), "activation": "relu", "layer_norm": False,
        "zero_bias": False, "batch_size": 64}),
    "mlp 256-48-48-10, norm": ("MLPDistribution", {"zoom": 2, "widths": (48, 48), "activation": "gelu",
        "layer_norm": True, "zero_bias": False, "batch_size": 64}),
    "cnn 8x8": ("CNNDistribution", {**CNN, "data": "digits", "widths": (8, 8, 12), "residual": False, "flatten": True}),
    "cnn 14x14, residual, batch norm": ("CNNDistribution", {**CNN, "data": "mnist14", "widths": (8, 8, 8),
        "residual": True, "norm": "batch", "flatten": False}),
    "vit 16x16": ("ViTDistribution", {**TRANSFORMER, "data": "mnist16", "context": 16, "batch_size": 12,
        "flatten": False}),
    "transformer": ("TransformerDistribution", {**TRANSFORMER, "data": "prose", "context": 14, "batch_size": 9}),
    "gru": ("GRUDistribution", {"data": "prose", "embedding": 24, "width": 24, "depth": 1, "initialisation": "default",
        "norm": False, "loss": "cross_entropy", "context": 10, "batch_size": 16}),
    "ngram": ("NgramDistribution", {"data": "prose", "embedding": 8, "widths": (32,), "activation": "relu",
        "norm": "none", "initialisation": "default", "loss": "cross_entropy", "context": 4, "batch_size": 64}),
    "vector, teacher": ("VectorDistribution", {"data": "teacher", "seed": 1, "inputs": 0, "widths": (24, 24),
        "activation": "tanh", "norm": "none", "loss": "squared_error", "initialisation": "default", "batch_size": 48}),
    "vector, batch norm": ("VectorDistribution", {"data": "wine", "seed": 1, "inputs": 0, "widths": (24, 24),
        "activation": "relu", "norm": "batch", "loss": "cross_entropy", "initialisation": "default", "batch_size": 48}),
    "autoencoder": ("AutoencoderDistribution", {"data": "digits", "widths": (32, 12), "activation": "gelu",
        "norm": "none", "initialisation": "default", "batch_size": 48, "loss": "squared_error"}),
    "inr, siren": ("INRDistribution", {"image": 0, "sine": True, "frequency": 5.0, "widths": (24, 24),
        "batch_size": 80, "data": "mnist14", "activation": "relu", "loss": "squared_error"}),
    "quadratic": ("QuadraticDistribution", {"seed": 0, "inputs": 16, "outputs": 4, "hidden": 0, "decades": 2.0}),
}  # fmt: skip


def task_of(kind: str, shape: dict[str, Any]) -> Task:
    """The task of a shape, with the augmentation of its family."""
    family = getattr(families, kind)()
    known = {field.name for field in fields(family.shape_class)}
    return family.rebuild({name: value for name, value in shape.items() if name in known})


def speeds(task: Task, members: int) -> dict[str, float]:
    """Member steps per second, of first and second order."""
    generator = torch.Generator().manual_seed(0)
    params, member = task.draw(members, generator)
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}

    def first() -> None:
        loss = task.losses(leaves, member, task.batch(members, generator))
        torch.autograd.grad(loss.sum(), list(leaves.values()))

    def second() -> None:
        loss = task.losses(leaves, member, task.batch(members, generator))
        grads = torch.autograd.grad(loss.sum(), list(leaves.values()), create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()))

    rates = {}
    for name, step in (("first", first), ("second", second)):
        step()
        times = []
        for _ in range(REPETITIONS):
            count, started = 0, time.process_time()
            while (elapsed := time.process_time() - started) < MIN_SECONDS:
                step()
                count += 1
            times.append(elapsed / count)
        rates[name] = members / min(times)
    return rates


def page(content: dict[str, Any]) -> str:
    """The results as a table, beside those of `--before`."""
    lines = [
        f"Member steps per second of processor time. {content['about']}.",
        "",
        "| task | members | first order, before | now | second order, before | now |",
        "|---|---|---|---|---|---|",
    ]
    for name, by_members in content["speeds"].items():
        for members, now in by_members.items():
            old = content["before"].get(name, {}).get(members, {})
            cells = [f"{old[key]:.0f} | {now[key]:.0f}" if old else f" | {now[key]:.0f}" for key in now]
            lines.append(f"| {name} | {members} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for both files")
    parser.add_argument("--before", type=Path, default=None, help="a previous task_speed.json to compare with")
    parser.add_argument("--only", default="", help="measure only shapes whose names contain this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(options.before.read_text())["speeds"] if options.before else {}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, (kind, shape) in SHAPES.items():
        if options.only not in name:
            continue
        task = task_of(kind, shape)
        results[name] = {str(members): speeds(task, members) for members in MEMBERS}
    content = {"about": setting("torch"), "speeds": results, "before": before}
    write(options.out, "task_speed", page(content), content)


if __name__ == "__main__":
    main()
