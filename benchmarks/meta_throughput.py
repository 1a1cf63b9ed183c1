"""How fast inner training goes while a rule is meta-trained, and where the time goes.

    python benchmarks/meta_throughput.py

Inner steps per second (members x steps over time) of an MLP 64-32-10 on 8x8 digits, batch 64, for 16 members: 20 steps
differentiated (truncated backprop), and 50 forward only (as for persistent evolution strategies). Beside the learned
rule stand, in the same run and taking turns with it,

    AdamW      differentiable AdamW: the nominal part of the same rule, its learning rate being what is learned
    nothing    p + 0: the task's own forward and backward passes, the limit
    one        the learned rule with a single member: hardly any arithmetic, so what is left is overhead

A time over AdamW's is the median of the ratios of turns beside each other; shares are of the learned rule's time:
the task's is that of *nothing*, overhead that of *one*, of which a part is the task's.
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


class Nothing(nn.Module):
    """A rule that leaves everything as it is, but for a number that is learned."""

    learns = True

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))

    def talks(self, _taken: int) -> bool:
        """Never."""
        return False

    def init(self, params: Params, batch_dims: int = 0) -> State:
        """No state."""
        return {name: {} for name in params}

    def forward(self, params: Params, grads: Params, state: State, *_: Any, **__: Any) -> tuple[Params, State]:
        """No update; it depends on the number and on the gradient, so that everything is differentiated."""
        return {name: g * self.number.reshape(-1, *(1,) * (g.dim() - 1)) for name, g in grads.items()}, state


def turns(repetitions: int) -> dict[str, list[float]]:
    """Seconds by name, all names taking turns."""
    task = MLPTask(MLPShape(1, (32,), "relu", False, False, 64), digits(), Augment())
    learned, adamw, nothing = UpdateRule(UNIVERSAL), UpdateRule.nominal(), Nothing()
    generator = torch.Generator().manual_seed(0)

    def backprop(rule: Any, members: int = MEMBERS) -> Callable[[], object]:
        carry = start(rule, task, members, 1000, generator)
        return lambda: Estimation(window=BACKPROP)(rule, task, carry, generator)

    def through_adamw() -> None:
        rate = torch.full((MEMBERS,), LR, requires_grad=True)
        losses = unroll(adamw, task, adamw_carry, BACKPROP, generator, how=Unrolling(lr=rate)).losses
        torch.autograd.grad(losses.mean(), rate)

    adamw_carry = start(adamw, task, MEMBERS, 1000, generator)

    def forward(rule: Any, theta: dict[str, Tensor] | None = None, members: int = MEMBERS) -> Callable[[], object]:
        carry = start(rule, task, members, 1000, generator)
        return torch.no_grad()(lambda: unroll(rule, task, carry, FORWARD, generator, theta=theta))

    own = {name: p.detach().expand(MEMBERS, *p.shape).contiguous() for name, p in learned.named_parameters()}
    work: dict[str, Callable[[], object]] = {
        "backprop, learned": backprop(learned),
        "backprop, AdamW": through_adamw,
        "backprop, nothing": backprop(nothing),
        "backprop, one": backprop(learned, 1),
        "forward, learned": forward(learned, own),
        "forward, AdamW": forward(adamw),
        "forward, nothing": forward(nothing),
        "forward, one": forward(learned, None, 1),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + 1):
        for name, run in work.items():
            begun = time.perf_counter()
            run()
            if repetition:  # the first one warms up
                times[name].append(time.perf_counter() - begun)
    return times


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repetitions", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(1)
    times = turns(given.repetitions)
    about = setting("torch")
    rows = []
    for kind, title, steps in (
        ("backprop", f"{BACKPROP} steps differentiated", BACKPROP),
        ("forward", f"{FORWARD} steps forward only", FORWARD),
    ):
        found = {name: times[f"{kind}, {name}"] for name in ("learned", "AdamW", "nothing", "one")}

        def share(name: str, of: dict[str, list[float]] = found) -> float:
            return statistics.median(a / b for a, b in zip(of[name], of["learned"], strict=True))

        rows.append(
            {
                "kind": title,
                "steps_per_second": MEMBERS * steps / statistics.median(found["learned"]),
                "adamw_steps_per_second": MEMBERS * steps / statistics.median(found["AdamW"]),
                "time_over_adamw": 1 / share("AdamW"),
                "task_share": share("nothing"),
                "overhead_share": share("one"),
            }
        )
    lines = [
        f"{about}. MLP 64-32-10, batch 64, {MEMBERS} members; medians of {given.repetitions} turns.",
        "",
        "| | inner steps a second | AdamW's | time over AdamW's | share of the task | share of overhead |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['kind']} | {r['steps_per_second']:.0f} | {r['adamw_steps_per_second']:.0f} | {r['time_over_adamw']:.1f} "
        f"| {100 * r['task_share']:.0f} % | {100 * r['overhead_share']:.0f} % |"
        for r in rows
    ]
    write(given.out, "meta_throughput", "\n".join(lines), {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
