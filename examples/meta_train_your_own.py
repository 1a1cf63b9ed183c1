"""Fine-tune the shipped rule on your own module and data.

    python examples/meta_train_your_own.py

Replace two things with your own: `Mixer`, any `nn.Module` that works under `vmap` and is twice differentiable, and
`loader`, any iterable of batches. `ModuleTask` turns them into a task. `train` meta-trains for a few dozen iterations,
starting from the rule `default`, and writes a rule file for `NFNOptimizer(model, rule=file)`. Then an ordinary loop
trains new networks with AdamW, with the shipped rule and with yours, and evaluates them on held-out examples.

So few iterations demonstrate the procedure but hardly change the rule: the recipes of `python -m meta_train` take
thousands. Meta-gradients are first-order, because second-order ones make the rule worse in so short a run.

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
    """Two blocks that mix across the rows of an image, then within each row."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.rows = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.columns = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits. `(batch_size, 8, 8) -> (batch_size, 10)`."""
        x = self.embed(x)  # (batch_size, rows, width)
        for i in range(2):
            x = x + torch.tanh(self.rows[i](self.norms[2 * i](x).mT).mT)
            x = x + torch.tanh(self.columns[i](self.norms[2 * i + 1](x)))
        logits: Tensor = self.last(x.mean(1))
        return logits


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """Batches of images `(batch, 8, 8)` and classes `(batch,)`."""
    data = load_digits()
    x = torch.as_tensor(data.images, dtype=torch.float32)
    return DataLoader(TensorDataset((x - x.mean()) / x.std(), torch.as_tensor(data.target)), batch_size=100)


def meta_train(data: Examples, iterations: int, out: Path) -> Path:
    """Fine-tune `default` on the module and the data; return the rule file."""
    task = ModuleTask(Mixer, data, cross_entropy, BATCH_SIZE, Augment(0.0, 0.0, 0.0))
    config = Config(
        rule=load("default").config,
        initial="default",
        distribution=Single(task),
        iterations=iterations,
        members=4,
        inner_runs=8,
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
    """Train one network; return the mean training loss of the last tenth of the steps, and the held-out loss."""
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
    """Meta-train, then compare optimizers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/meta_train_your_own"), help="output folder; must be new")
    parser.add_argument("--iterations", type=int, default=40, help="updates of theta")
    parser.add_argument("--seeds", type=int, default=3, help="networks per row of the table")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each of these networks")
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
