"""Throughput of inner training during meta-training, and its breakdown.

    python benchmarks/meta_throughput.py

Inner steps per second (members x steps over time) of an MLP 64-32-10 on 8x8 digits, batch 64, for 16 members: 20 steps
differentiated (truncated backprop), and 50 forward only (as for persistent evolution strategies). In turns with the
learned rule are measured

    AdamW         differentiable AdamW: the nominal part of the same rule, with its learning rate as theta
    no update     p + 0: the forward and backward passes of the task only, a lower bound
    one member    the learned rule with a single member: little arithmetic, so mostly overhead

A ratio of times is the median over adjacent turns. Fractions are of the learned rule's time: for the task, that of
*no update*; overhead, that of *one member*, which includes a part of the task's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from result import setting, write
from torch import Tensor, nn

from meta_train.meta_gradient import Estimation
from meta_train.recipes import UNIVERSAL
from meta_train.tasks import Augment, MLPShape, MLPTask, Params, digits
from meta_train.unroll import LR, Unrolling, start, unroll
from nfn_optim import UpdateRule
from nfn_optim.engine.moments import State

MEMBERS, BACKPROP, FORWARD = 16, 20, 50


class NoUpdate(nn.Module):
    """A rule without an update, with one parameter."""

    learned = True

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    def refreshes(self, _taken: int) -> bool:
        """Never."""
        return False

    def init(self, params: Params, batch_dims: int = 0) -> State:
        """No state."""
        return {name: {} for name in params}

    def forward(self, params: Params, grads: Params, state: State, *_: Any, **__: Any) -> tuple[Params, State]:
        """A zero update that depends on the factor and on the gradient, so that everything is differentiated."""
        return {name: g * self.factor.reshape(-1, *(1,) * (g.dim() - 1)) for name, g in grads.items()}, state


def turns(repetitions: int) -> dict[str, list[float]]:
    """Seconds by name, measured in turns."""
    task = MLPTask(MLPShape(1, (32,), "relu", False, False, 64), digits(), Augment())
    learned, adamw, no_update = UpdateRule(UNIVERSAL), UpdateRule.adamw(), NoUpdate()
    generator = torch.Generator().manual_seed(0)

    def backprop(rule: Any, members: int = MEMBERS) -> Callable[[], object]:
        carry = start(rule, task, members, 1000, generator)
        return lambda: Estimation(window=BACKPROP)(rule, task, carry, generator)

    def through_adamw() -> None:
        rate = torch.full((MEMBERS,), LR, requires_grad=True)
        losses = unroll(adamw, task, adamw_carry, BACKPROP, generator, unrolling=Unrolling(lr=rate)).losses
        torch.autograd.grad(losses.mean(), rate)

    adamw_carry = start(adamw, task, MEMBERS, 1000, generator)

    def forward(rule: Any, theta: dict[str, Tensor] | None = None, members: int = MEMBERS) -> Callable[[], object]:
        carry = start(rule, task, members, 1000, generator)
        return torch.no_grad()(lambda: unroll(rule, task, carry, FORWARD, generator, theta=theta))

    theta_per_member = {
        name: p.detach().expand(MEMBERS, *p.shape).contiguous() for name, p in learned.named_parameters()
    }
    work: dict[str, Callable[[], object]] = {
        "backprop, learned": backprop(learned),
        "backprop, AdamW": through_adamw,
        "backprop, no update": backprop(no_update),
        "backprop, one member": backprop(learned, 1),
        "forward, learned": forward(learned, theta_per_member),
        "forward, AdamW": forward(adamw),
        "forward, no update": forward(no_update),
        "forward, one member": forward(learned, None, 1),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if repetition:  # the first is a warm-up
                times[name].append(time.perf_counter() - started)
    return times


def page(content: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        f"{content['about']}. MLP 64-32-10, batch 64, {MEMBERS} members; medians of {content['repetitions']} turns.",
        "",
        "| | inner steps per second | AdamW's | time over AdamW's | fraction for the task | overhead |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['kind']} | {r['steps_per_second']:.0f} | {r['adamw_steps_per_second']:.0f} | {r['time_over_adamw']:.1f} "
        f"| {100 * r['task_fraction']:.0f} % | {100 * r['overhead_fraction']:.0f} % |"
        for r in content["rows"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repetitions", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    times = turns(args.repetitions)
    about = setting("torch")
    rows = []
    for kind, title, steps in (
        ("backprop", f"{BACKPROP} steps differentiated", BACKPROP),
        ("forward", f"{FORWARD} steps forward only", FORWARD),
    ):
        seconds = {name: times[f"{kind}, {name}"] for name in ("learned", "AdamW", "no update", "one member")}

        def fraction(name: str, seconds: dict[str, list[float]] = seconds) -> float:
            return statistics.median(a / b for a, b in zip(seconds[name], seconds["learned"], strict=True))

        rows.append(
            {
                "kind": title,
                "steps_per_second": MEMBERS * steps / statistics.median(seconds["learned"]),
                "adamw_steps_per_second": MEMBERS * steps / statistics.median(seconds["AdamW"]),
                "time_over_adamw": 1 / fraction("AdamW"),
                "task_fraction": fraction("no update"),
                "overhead_fraction": fraction("one member"),
            }
        )
    content = {"about": about, "repetitions": args.repetitions, "rows": rows}
    write(args.out, "meta_throughput", page(content), content)


if __name__ == "__main__":
    main()
