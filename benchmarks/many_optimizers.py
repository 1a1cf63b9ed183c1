"""Cost of steps inside the backward pass: one optimizer for each parameter, layer or block, beside one for all.

    python benchmarks/many_optimizers.py

76 linear layers, 152 tensors. Gradients are the same at every step; a round is one step of every optimizer. The layouts
alternate by turns of four rounds, one of which refreshes, so that a slow moment of the machine affects all; medians of
turns are reported. Times are processor times, because the machine is shared.
*Gradients held* is the largest number of gradients that exist at once, over that of all. Writes `many_optimizers.json`
and `many_optimizers.md`.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

import torch
from result import setting, write
from torch import nn

from nfn_optim import NFNOptimizer

LAYERS, WIDTH = 76, 16
ROUNDS = 4  # of a turn, of which the shipped rule refreshes in one
LAYOUTS = {"one for all": LAYERS, "blocks of 19 layers": 19, "blocks of 4 layers": 4, "layers": 1, "parameters": 0}


class Layout:
    """The network, and optimizers that divide its parameters among them.

    Args:
        rule: Of the optimizers.
        layers: For each optimizer; 0 for one parameter each.
    """

    def __init__(self, rule: str, layers: int) -> None:
        torch.manual_seed(0)
        self.model = model = nn.Sequential(
            *(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh()))
        )
        params, size = list(model.parameters()), 2 * layers or 1
        self.optimizers = [NFNOptimizer(params[k : k + size], rule=rule) for k in range(0, len(params), size)]
        self.held = size / len(params)
        model(torch.randn(4, WIDTH)).square().sum().backward()
        self.seconds: list[float] = []

    def turn(self) -> None:
        """Take `ROUNDS` steps with every optimizer, and note the processor time of a round in seconds."""
        begun = time.process_time()
        for _ in range(ROUNDS):
            for optimizer in self.optimizers:
                optimizer.step()
        self.seconds.append((time.process_time() - begun) / ROUNDS)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    rows = []
    lines = ["| rule | one optimizer for | optimizers | round, ms | over one for all | gradients held, % |"]
    lines += ["|---|---|---|---|---|---|"]
    for rule in ("default", "adamw"):
        layouts = {name: Layout(rule, layers) for name, layers in LAYOUTS.items()}
        for turn in range(2 + given.turns):
            for layout in layouts.values():
                layout.turn()
                layout.seconds = (
                    layout.seconds if turn > 1 else []
                )  # the network is traced first, and refreshes come close
        whole = statistics.median(layouts["one for all"].seconds)
        for name, layout in layouts.items():
            count, middle = len(layout.optimizers), statistics.median(layout.seconds)
            rows.append({"rule": rule, "layout": name, "optimizers": count, "seconds": layout.seconds})
            rows[-1] |= {"ratio": middle / whole, "held": layout.held}
            numbers = f"{count} | {1e3 * middle:.1f} | {middle / whole:.1f} | {100 * layout.held:.1f}"
            lines.append(f"| {rule} | {name} | {numbers} |")
    where = setting("torch")
    text = f"{where}. {2 * LAYERS} tensors; medians of {given.turns} turns, processor time.\n\n" + "\n".join(lines)
    write(given.out, "many_optimizers", text, {"setting": where, "rows": rows})


if __name__ == "__main__":
    main()
