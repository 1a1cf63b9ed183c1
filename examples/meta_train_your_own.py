"""Fine-tune the shipped rule on your own module and your own data.

    python examples/meta_train_your_own.py

Two things are yours: `Mixer`, any `nn.Module` that works under `vmap` and differentiates twice, and `loader`, anything
that yields batches. `ModuleTask` makes a task of them, `train` meta-trains from the rule `default` for a few dozen
iterations and writes a rule file, which `NFNOptimizer(model, rule=file)` uses. Then new networks are trained in an
ordinary loop with AdamW, with the rule as it ships and with yours, and measured on examples that none of them saw.

So few iterations show how it is done, and leave the rule about where it was: the recipes of `python -m meta_train` take
thousands. Gradients are first-order, since with second-order ones this short a run makes the rule worse.

Columns of the table (mean over seeds, and the range):
    training loss   over the last tenth of the steps, in nats
    held-out loss   after the last step, in nats
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from meta_train.tasks import Augment, Examples, ModuleTask, Single
from meta_train.tasks.losses import cross_entropy
from meta_train.trainer import THETA, Config, train
from nfn_optim import NFNOptimizer
from nfn_optim.pretrained import load

BATCH_SIZE = 32


class Mixer(nn.Module):
    """Mixes the rows of an image, then what is in each of them, twice."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.rows = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.inside = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits. `(batch_size, 8, 8) -> (batch_size, 10)`."""
        x = self.embed(x)  # (batch_size, rows, width)
        for i in range(2):
            x = x + torch.tanh(self.rows[i](self.norms[2 * i](x).mT).mT)
            x = x + torch.tanh(self.inside[i](self.norms[2 * i + 1](x)))
        logits: Tensor = self.last(x.mean(1))
        return logits


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """Batches of images `(batch, 8, 8)` and classes `(batch,)`."""
    found = load_digits()
    x = torch.as_tensor(found.images, dtype=torch.float32)
    return DataLoader(TensorDataset((x - x.mean()) / x.std(), torch.as_tensor(found.target)), batch_size=100)


def meta_train(data: Examples, iterations: int, out: Path) -> Path:
    """Fine-tune `default` for the module on the data; returns the rule file."""
    task = ModuleTask(Mixer, data, cross_entropy, BATCH_SIZE, Augment(0.0, 0.0, 0.0))
    config = Config(
        rule=load("default").config,
        initial="default",
        distribution=Single(task),
        iterations=iterations,
        members=4,
        slots=8,
        window=20,
        horizon=(50, 200),
        second_order=False,
        lr=2e-4,
        warmup=5,
        clip=0.3,
    )
    train(config, out, {})
    return out / THETA


def trained(data: Examples, make: Callable[[nn.Module], torch.optim.Optimizer], seed: int, steps: int) -> list[float]:
    """Training loss over the last tenth of the steps, and held-out loss, of one network in an ordinary loop."""
    torch.manual_seed(seed)
    model, generator = Mixer(), torch.Generator().manual_seed(seed)
    optimizer = make(model)
    losses = []
    for _ in range(steps):
        index = torch.randint(data.train, (BATCH_SIZE,), generator=generator)
        loss = cross_entropy(model(data.x[index]), data.y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        held_out = cross_entropy(model(data.x[data.train :]), data.y[data.train :]).item()
    return [statistics.mean(losses[-max(1, steps // 10) :]), held_out]


def report(rows: dict[str, list[list[float]]], out: Path) -> None:
    """Print the table; write it as JSON."""
    table = Table("optimizer", "training loss", "held-out loss")
    for name, runs in rows.items():
        columns = list(zip(*runs, strict=True))
        table.add_row(name, *(f"{statistics.mean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns))
    Console().print(table)
    (out / "meta_train_your_own.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    """Meta-train, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/meta_train_your_own"), help="folder for it all; new")
    parser.add_argument("--iterations", type=int, default=40, help="updates of theta")
    parser.add_argument("--seeds", type=int, default=3, help="networks trained for each row of the table")
    parser.add_argument("--steps", type=int, default=200, help="steps for which they are trained")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Examples.of("mine", loader(), classes=10, held_out=0.2)
    rule = meta_train(data, options.iterations, options.out)
    made: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        **{f"AdamW {lr:g}": lambda m, lr=lr: torch.optim.AdamW(m.parameters(), lr) for lr in (1e-3, 3e-3, 1e-2, 3e-2)},
        "NFNOptimizer": NFNOptimizer,
        "NFNOptimizer, yours": lambda m: NFNOptimizer(m, rule=rule),
    }
    report(
        {n: [trained(data, f, s, options.steps) for s in range(options.seeds)] for n, f in made.items()}, options.out
    )
    print(f"wrote {rule}; use it with NFNOptimizer(model, rule={str(rule)!r})")


if __name__ == "__main__":
    main()
