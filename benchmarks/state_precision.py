"""The cost of moments in bfloat16: final losses over those with the state in float32, bytes, and time per step.

    python benchmarks/state_precision.py --out benchmarks/results

Four real networks are trained by the shipped rule, with the horizon known and unknown, from the same initial parameters
and on the same batches, in three variants:

    float32      the default
    bfloat16     `state_dtype=torch.bfloat16`
    perturbed    float32, with every gradient multiplied by 1 + 1e-6: the effect of a different rounding

The loss is measured on the training set (64 windows for the transformer) after the last step, as a ratio to the float32
run of the same seed: geometric mean over seeds, with a 95 % interval (Student's t on logarithms). The perturbed variant
shows how far two runs diverge through rounding alone. Times are processor seconds per step on an MLP of a million
weights: the two optimizers take turns of one refresh interval each, and the ratio is the median over adjacent turns,
with quartiles. One thread; five to ten minutes.
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

CONTEXT = 32  # characters per window
BATCH = 64  # images; half as many windows of text
VARIANTS: dict[str, tuple[torch.dtype | None, float]] = {  # precision of the moments, perturbation of the gradients
    "float32": (None, 0.0),
    "bfloat16": (torch.bfloat16, 0.0),
    "perturbed": (None, 1e-6),
}


@dataclass(frozen=True)
class Task:
    """A network, its data `(x, y)`, batch size and number of steps."""

    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    batch: int
    steps: int


@cache
def text() -> tuple[Tensor, Tensor]:
    """Windows of the docstrings of a package, with the next characters as targets."""
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


def final_loss(task: Task, variant: str, seed: int, horizon_known: bool) -> float:
    """Train one network."""
    dtype, perturbation = VARIANTS[variant]
    x, y = task.data()
    torch.manual_seed(seed)
    model = task.build()
    optimizer = NFNOptimizer(model, total_steps=task.steps if horizon_known else None, state_dtype=dtype, compile=False)
    order = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        rows = torch.randint(len(x), (task.batch,), generator=order)
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x[rows], y[rows]))
        for p in model.parameters() if perturbation else ():
            assert p.grad is not None
            p.grad.mul_(1 + perturbation)
        optimizer.step()
    subset = torch.randint(len(x), (64,), generator=order) if y.dim() > 1 else slice(None)
    with torch.no_grad():
        return loss_of(model, x[subset], y[subset]).item()


def ratio_of(losses: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Geometric mean of the pairwise ratios, and its 95 % interval."""
    logarithms = [math.log(one / other) for one, other in zip(losses, others, strict=True)]
    mean, deviation = statistics.mean(logarithms), statistics.stdev(logarithms)
    half = float(stats.t.ppf(0.975, len(logarithms) - 1)) * deviation / math.sqrt(len(logarithms))
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def compare(seeds: int) -> list[dict[str, Any]]:
    """The losses of all tasks."""
    rows = []
    for name, task in TASKS.items():
        for known in (False, True):
            losses = {
                variant: [final_loss(task, variant, seed, known) for seed in range(seeds)] for variant in VARIANTS
            }
            ratios = {v: ratio_of(losses[v], losses["float32"]) for v in VARIANTS if v != "float32"}
            row = {"task": name, "steps": task.steps, "horizon_known": known, "losses": losses, "ratios": ratios}
            rows.append(row)
            print(rows[-1], flush=True)
    return rows


def cost(turns: int) -> dict[str, Any]:
    """Bytes per parameter, and the time per step over that with the state in float32."""
    results: dict[str, Any] = {}
    for mode, compiled in (("eager", False), ("compiled", True)):
        pair = []
        for dtype in (None, torch.bfloat16):
            model, optimizer, _ = ready(
                MODELS["MLP 1M"], lambda m, d=dtype, c=compiled: NFNOptimizer(m, state_dtype=d, compile=c)
            )
            pair.append(optimizer)
            items = [item for state in optimizer.state.values() for item in state.items()]
            weights = sum(p.numel() for p in model.parameters())
            results[f"bytes {dtype or torch.float32}"] = {
                "moments": sum(v.numel() * v.itemsize for key, v in items if key.startswith("exp_avg")) / weights,
                "all": sum(v.numel() * v.itemsize for _, v in items) / weights,
            }
        times = [tuple(take_turn(optimizer) for optimizer in pair) for _ in range(turns)]
        quartiles = statistics.quantiles([short / full for full, short in times], n=4)
        results[mode] = {
            "ratio": quartiles[1],
            "quartiles": [quartiles[0], quartiles[2]],
            "float32_milliseconds": statistics.median(full for full, _ in times) * 1e3,
        }
    return results


def spread(middle: float, low: float, high: float, digits: int) -> str:
    """A number and its range."""
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def page(content: dict[str, Any]) -> str:
    """The results as text and a table."""
    cost, seeds = content["cost"], content["seeds"]
    size = {dtype: cost[f"bytes torch.{dtype}"] for dtype in ("float32", "bfloat16")}
    lines = [
        f"{content['about']}. Final training loss with `state_dtype=torch.bfloat16` over that of the same",
        f"training with the state in float32: geometric mean over {seeds} seeds (95 % interval). *Perturbed*: the same",
        "ratio for float32 runs whose gradients are multiplied by 1 + 1e-6, the effect of rounding alone.",
        "",
        "| task | steps | horizon | loss, float32 | bfloat16 | perturbed |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        mean = statistics.geometric_mean(row["losses"]["float32"])
        cells = [spread(r["ratio"], r["low"], r["high"], 3) for r in row["ratios"].values()]
        horizon = "known" if row["horizon_known"] else "unknown"
        lines.append(f"| {row['task']} | {row['steps']} | {horizon} | {mean:.4g} | {cells[0]} | {cells[1]} |")
    cells = [spread(r["ratio"], r["low"], r["high"], 3) for r in content["all"].values()]
    lines += [f"| all | | | | {cells[0]} | {cells[1]} |", ""]
    times = [spread(cost[mode]["ratio"], *cost[mode]["quartiles"], 2) for mode in ("eager", "compiled")]
    lines += [
        f"On an MLP of a million weights moments take {size['bfloat16']['moments']:.1f} bytes per parameter instead of",
        f"{size['float32']['moments']:.1f}, and the whole state {size['bfloat16']['all']:.2f} instead of",
        f"{size['float32']['all']:.2f}. A step takes {times[0]} times as long, compiled {times[1]} (median over",
        "adjacent turns, quartiles).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare(args.seeds)
    overall = {
        variant: ratio_of(
            [loss for row in rows for loss in row["losses"][variant]],
            [loss for row in rows for loss in row["losses"]["float32"]],
        )
        for variant in VARIANTS
        if variant != "float32"
    }
    content = {"about": setting("torch"), "seeds": args.seeds, "rows": rows, "all": overall, "cost": cost(args.turns)}
    write(args.out, "state_precision", page(content), content)


if __name__ == "__main__":
    main()
