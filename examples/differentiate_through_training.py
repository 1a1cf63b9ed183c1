"""Learn which training examples to trust, by differentiating through training with NFNOptimizer.

    python examples/differentiate_through_training.py

A share of the labels of scikit-learn's digits is wrong, nobody knows which; of two hundred images more the labels are
known to be right. Every training image gets a weight. A network with BatchNorm and dropout is trained on the weighted
loss for a window of steps inside `higher.innerloop_ctx`; the loss that it then has on the images known to be right is
differentiated back through these steps to the weights; `write_back` carries the run over to the next window. At the end
networks are trained from scratch, by an ordinary loop, with and without the weights.

The table says how many of the images that were used for nothing else are classified correctly, %: the mean over seeds,
and the range.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import higher
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nfn_optim import NFNOptimizer
from nfn_optim.optimizer.differentiable import register

BATCH_SIZE, TRAIN, KNOWN = 64, 1300, 200
WRONG = 0.4  # share of the training labels
WINDOW = 5  # steps differentiated at once
RESTART = 20  # windows after which a new network is begun
LR = 0.1  # of the weights, per window


class Images(NamedTuple):
    """Images `(count, 64)` and their labels `(count,)`."""

    x: Tensor
    y: Tensor

    def batch(self, generator: torch.Generator) -> Tensor:
        """Numbers of random examples."""
        return torch.randint(len(self.x), (BATCH_SIZE,), generator=generator)


def digits() -> tuple[Images, Images, Images, Tensor]:
    """Training images with some labels wrong, images known to be right, images to measure on, and which are wrong."""
    found = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(found.target), generator=generator)
    x = torch.as_tensor(found.data, dtype=torch.float32)[order]
    x, y = (x - x.mean()) / x.std(), torch.as_tensor(found.target)[order]
    given = y[:TRAIN].clone()
    wrong = torch.rand(TRAIN, generator=generator) < WRONG
    given[wrong] = (given[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=generator)) % 10
    known = TRAIN + KNOWN
    return Images(x[:TRAIN], given), Images(x[TRAIN:known], y[TRAIN:known]), Images(x[known:], y[known:]), wrong


def network() -> nn.Module:
    """Buffers, and random numbers in the forward pass."""
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))


def weighted_loss(model: nn.Module, data: Images, index: Tensor, weights: Tensor) -> Tensor:
    """Of a batch; the weights count relative to their mean over all examples."""
    losses = F.cross_entropy(model(data.x[index]), data.y[index], reduction="none")
    return (losses * weights[index] / weights.mean()).mean()


def learn_weights(train: Images, known: Images, windows: int) -> Tensor:
    """Weights between 0 and 1 of all training examples, `(count,)`."""
    register()  # tells `higher` about NFNOptimizer
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(len(train.x), requires_grad=True)
    outer = torch.optim.Adam([logits], LR)
    for window in track(range(windows), "differentiating through training"):
        if window % RESTART == 0:
            model = network()
            optimizer = NFNOptimizer(model)
        with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
            for _ in range(WINDOW):
                diffopt.step(weighted_loss(fmodel, train, train.batch(generator), logits.sigmoid()))
            loss = F.cross_entropy(fmodel(known.x), known.y)
            outer.zero_grad()
            loss.backward()
            outer.step()
            diffopt.write_back()
    return logits.detach().sigmoid()


def accuracy(train: Images, held: Images, weights: Tensor, seed: int, steps: int) -> float:
    """Of a network trained with an ordinary loop, %."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = network()
    optimizer = NFNOptimizer(model, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        weighted_loss(model, train, train.batch(generator), weights).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return 100 * (model(held.x).argmax(-1) == held.y).float().mean().item()


def main() -> None:
    """Learn the weights, then see what they are worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/differentiate_through_training"), help="folder for it all"
    )
    parser.add_argument("--windows", type=int, default=240, help="windows from which the weights are learned")
    parser.add_argument("--seeds", type=int, default=3, help="networks trained for each row of the table")
    parser.add_argument("--steps", type=int, default=300, help="steps for which they are trained")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, known, held, wrong = digits()
    weights = learn_weights(train, known, options.windows)
    found = {
        "torch": torch.__version__,
        "windows": options.windows,
        "weight of right labels": weights[~wrong].mean().item(),
        "weight of wrong labels": weights[wrong].mean().item(),
        "told apart, %": 100 * ((weights < weights.mean()) == wrong).float().mean().item(),
    }
    compared = {"all alike": torch.ones(TRAIN), "learned": weights, "only the right ones": (~wrong).float()}
    rows = {
        title: [accuracy(train, held, given, seed, options.steps) for seed in range(options.seeds)]
        for title, given in compared.items()
    }
    report(found, rows, options.out)


def report(found: dict[str, Any], rows: dict[str, list[float]], out: Path) -> None:
    """Print the table; write it as Markdown and JSON."""
    title = (
        f"{100 * WRONG:.0f} % of the labels are wrong. Weights: {found['weight of right labels']:.2f} of right ones, "
        f"{found['weight of wrong labels']:.2f} of wrong ones; {found['told apart, %']:.0f} % are told apart."
    )
    lines = [(row, f"{statistics.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})") for row, v in rows.items()]
    table = Table("weights", "accuracy, %", title=title)
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    out.mkdir(parents=True, exist_ok=True)
    text = [title, "", "| weights | accuracy, % |", "|---|---|", *(f"| {row} | {value} |" for row, value in lines)]
    (out / "differentiate_through_training.md").write_text("\n".join(text) + "\n")
    (out / "differentiate_through_training.json").write_text(json.dumps({**found, "accuracy": rows}, indent=1) + "\n")
    print(f"wrote {out}/differentiate_through_training.{{md,json}}")


if __name__ == "__main__":
    main()
