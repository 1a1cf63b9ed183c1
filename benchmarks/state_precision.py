"""What moments in bfloat16 cost: final losses over those with the state in float32, bytes, and the time of a step.

    python benchmarks/state_precision.py --out benchmarks/results

Four real networks are trained by the shipped rule, told the horizon and not, from the same initial parameters and on
the same batches, in three ways:

    float32      the state as it is by default
    bfloat16     `state_dtype=torch.bfloat16`
    disturbed    float32, with every gradient multiplied by 1 + 1e-6: what any other rounding does to a training

The loss is that over the training set (of the transformer, over 64 windows) after the last step, and what is compared
are ratios to the float32 run of the same seed: geometric mean over seeds, with a 95 % interval (Student's t on
logarithms). The third way says how far two runs part that differ by nothing that matters. Times are processor seconds
of a step on an MLP of a million weights: the two take turns of as many steps as lie between two talks of the neurons,
and the ratio is the median of the ratios of turns beside each other, with quartiles. One thread; five to ten minutes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from replace_adam import cached, cnn, digits, mlp, mnist, small_mlp
from result import setting, write
from step_cost import MODELS, ready, take_turn

from meta_train.evaluation.datasets import characters
from meta_train.evaluation.networks import CharacterTransformer
from nfn_optim import NFNOptimizer

CONTEXT = 32  # characters that the transformer reads
BATCH = 64  # images; windows of text are half as many
WAYS: dict[str, tuple[torch.dtype | None, float]] = {  # precision of the moments, disturbance of the gradients
    "float32": (None, 0.0),
    "bfloat16": (torch.bfloat16, 0.0),
    "disturbed": (None, 1e-6),
}


@dataclass(frozen=True)
class Task:
    """A network, its data `(x, y)`, and how long it is trained."""

    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    batch: int
    steps: int


@cache
def text() -> tuple[Tensor, Tensor]:
    """Windows of the docstrings of a package, and the characters that follow."""
    windows = characters("sympy").unfold(0, CONTEXT + 1, CONTEXT)
    return windows[:, :-1].long(), windows[:, 1:].long()


def transformer() -> nn.Module:
    """Two blocks of 32 channels."""
    return CharacterTransformer(int(characters("sympy").max()) + 1, CONTEXT, 32, 2)


TASKS = {
    "digits, MLP 64-32-10": Task(small_mlp, lambda: cached(digits)[:2], BATCH, 300),
    "MNIST-5k, MLP 784-128-128-10": Task(mlp, lambda: cached(mnist)[:2], BATCH, 300),
    "MNIST-5k, CNN": Task(cnn, lambda: cached(mnist)[:2], BATCH, 300),
    "docstrings, transformer": Task(transformer, text, BATCH // 2, 500),
}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, 0-d; outputs `(batch, classes)` or `(batch, length, classes)`."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def final_loss(task: Task, way: str, seed: int, told: bool) -> float:
    """Train one network."""
    dtype, disturbance = WAYS[way]
    x, y = task.data()
    torch.manual_seed(seed)
    model = task.build()
    optimizer = NFNOptimizer(model, total_steps=task.steps if told else None, state_dtype=dtype, compile=False)
    order = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        rows = torch.randint(len(x), (task.batch,), generator=order)
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x[rows], y[rows]))
        for p in model.parameters() if disturbance else ():
            assert p.grad is not None
            p.grad.mul_(1 + disturbance)
        optimizer.step()
    most = torch.randint(len(x), (64,), generator=order) if y.dim() > 1 else slice(None)
    with torch.no_grad():
        return loss_of(model, x[most], y[most]).item()


def ratio_of(losses: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Geometric mean of the ratios of pairs, and its 95 % interval."""
    logarithms = [math.log(one / other) for one, other in zip(losses, others, strict=True)]
    mean, spread = statistics.mean(logarithms), statistics.stdev(logarithms)
    half = float(stats.t.ppf(0.975, len(logarithms) - 1)) * spread / math.sqrt(len(logarithms))
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def compare(seeds: int) -> list[dict[str, Any]]:
    """The losses of all tasks."""
    rows = []
    for name, task in TASKS.items():
        for told in (False, True):
            losses = {way: [final_loss(task, way, seed, told) for seed in range(seeds)] for way in WAYS}
            ratios = {way: ratio_of(losses[way], losses["float32"]) for way in WAYS if way != "float32"}
            rows.append({"task": name, "steps": task.steps, "told": told, "losses": losses, "ratios": ratios})
            print(rows[-1], flush=True)
    return rows


def cost(turns: int) -> dict[str, Any]:
    """Bytes a parameter, and the time of a step over that with the state in float32."""
    found: dict[str, Any] = {}
    for how, compiled in (("eager", False), ("compiled", True)):
        pair = []
        for dtype in (None, torch.bfloat16):
            made = ready(MODELS["MLP 1M"], lambda m, d=dtype, c=compiled: NFNOptimizer(m, state_dtype=d, compile=c))
            pair.append(made[1])
            every = [value for state in made[1].state.values() for value in state.items()]
            weights = sum(p.numel() for p in made[0].parameters())
            found[f"bytes {dtype or torch.float32}"] = {
                "moments": sum(v.numel() * v.itemsize for key, v in every if key.startswith("exp_avg")) / weights,
                "all": sum(v.numel() * v.itemsize for _, v in every) / weights,
            }
        times = [tuple(take_turn(optimizer) for optimizer in pair) for _ in range(turns)]
        quartiles = statistics.quantiles([short / full for full, short in times], n=4)
        found[how] = {
            "ratio": quartiles[1],
            "quartiles": [quartiles[0], quartiles[2]],
            "float32_milliseconds": statistics.median(full for full, _ in times) * 1e3,
        }
    return found


def spread(middle: float, low: float, high: float, digits: int) -> str:
    """A figure and its range."""
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def page(content: dict[str, Any]) -> str:
    """The results as text and a table."""
    cost, seeds = content["cost"], content["seeds"]
    kept = {dtype: cost[f"bytes torch.{dtype}"] for dtype in ("float32", "bfloat16")}
    lines = [
        f"{content['about']}. Final training loss with `state_dtype=torch.bfloat16` over that of the same",
        f"training with the state in float32: geometric mean over {seeds} seeds (95 % interval). *Disturbed*: the same",
        "ratio for float32 runs whose gradients are multiplied by 1 + 1e-6: how far trainings part by rounding alone.",
        "",
        "| task | steps | horizon | loss, float32 | bfloat16 | disturbed |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        mean = statistics.geometric_mean(row["losses"]["float32"])
        cells = [spread(r["ratio"], r["low"], r["high"], 3) for r in row["ratios"].values()]
        told = "told" if row["told"] else "not told"
        lines.append(f"| {row['task']} | {row['steps']} | {told} | {mean:.4g} | {cells[0]} | {cells[1]} |")
    cells = [spread(r["ratio"], r["low"], r["high"], 3) for r in content["all"].values()]
    lines += [f"| all | | | | {cells[0]} | {cells[1]} |", ""]
    times = [spread(cost[how]["ratio"], *cost[how]["quartiles"], 2) for how in ("eager", "compiled")]
    lines += [
        f"On an MLP of a million weights moments take {kept['bfloat16']['moments']:.1f} bytes a parameter instead of",
        f"{kept['float32']['moments']:.1f}, and the whole state {kept['bfloat16']['all']:.2f} instead of",
        f"{kept['float32']['all']:.2f}. A step takes {times[0]} times as long, compiled {times[1]} (median of turns",
        "beside each other, quartiles).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=25)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare(given.seeds)
    every = {
        way: ratio_of(
            [loss for row in rows for loss in row["losses"][way]],
            [loss for row in rows for loss in row["losses"]["float32"]],
        )
        for way in WAYS
        if way != "float32"
    }
    content = {"about": setting("torch"), "seeds": given.seeds, "rows": rows, "all": every, "cost": cost(given.turns)}
    write(given.out, "state_precision", page(content), content)


if __name__ == "__main__":
    main()
