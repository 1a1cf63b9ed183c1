"""Learn which training labels to trust, by differentiating through training with NFNOptimizer.

    python examples/differentiate_through_training.py

Some of the training labels of scikit-learn's digits are wrong; two hundred more images have clean labels. Every
training image gets a weight, and the weights are learned. In each window, a network with BatchNorm and dropout trains
on the weighted loss for a few steps inside `higher.innerloop_ctx`; its loss on the clean images is then differentiated
through these steps with respect to the weights, and `write_back` carries the inner run over to the next window.
Finally, an ordinary loop trains new networks with and without the weights.

The table gives their accuracy on a held-out test set, in %: mean over seeds, and range.
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

BATCH_SIZE, TRAIN, CLEAN = 64, 1300, 200
WRONG = 0.4  # fraction of the training labels
WINDOW = 5  # steps differentiated at once
RESTART = 20  # windows per inner run
LR = 0.1  # of the weights; one update per window


class Images(NamedTuple):
    """Images `(count, 64)` and their labels `(count,)`."""

    x: Tensor
    y: Tensor

    def batch(self, generator: torch.Generator) -> Tensor:
        """Indices of random examples, `(BATCH_SIZE,)`."""
        return torch.randint(len(self.x), (BATCH_SIZE,), generator=generator)


def digits() -> tuple[Images, Images, Images, Tensor]:
    """Training images with noisy labels, clean images, test images; and which of the training labels are wrong."""
    data = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.target), generator=generator)
    x = torch.as_tensor(data.data, dtype=torch.float32)[order]
    x, y = (x - x.mean()) / x.std(), torch.as_tensor(data.target)[order]
    noisy = y[:TRAIN].clone()
    wrong = torch.rand(TRAIN, generator=generator) < WRONG
    noisy[wrong] = (noisy[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=generator)) % 10
    end = TRAIN + CLEAN
    return Images(x[:TRAIN], noisy), Images(x[TRAIN:end], y[TRAIN:end]), Images(x[end:], y[end:]), wrong


def network() -> nn.Module:
    """An MLP with buffers (BatchNorm) and randomness (dropout) in its forward pass."""
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))


def weighted_loss(model: nn.Module, data: Images, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy of a batch; weights are divided by their mean over all examples."""
    losses = F.cross_entropy(model(data.x[index]), data.y[index], reduction="none")
    return (losses * weights[index] / weights.mean()).mean()


def learn_weights(train: Images, clean: Images, windows: int) -> Tensor:
    """Weight of every training example, between 0 and 1, `(count,)`."""
    register()  # makes NFNOptimizer differentiable inside `higher`
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
            loss = F.cross_entropy(fmodel(clean.x), clean.y)
            outer.zero_grad()
            loss.backward()
            outer.step()
            diffopt.write_back()
    return logits.detach().sigmoid()


def accuracy(train: Images, test: Images, weights: Tensor, seed: int, steps: int) -> float:
    """Test accuracy of a new network after an ordinary training loop, %."""
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
        return 100 * (model(test.x).argmax(-1) == test.y).float().mean().item()


def main() -> None:
    """Learn the weights, then train with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/differentiate_through_training"), help="output folder")
    parser.add_argument("--windows", type=int, default=240, help="updates of the weights")
    parser.add_argument("--seeds", type=int, default=3, help="networks per row of the table")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each of these networks")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, clean, test, wrong = digits()
    weights = learn_weights(train, clean, options.windows)
    learned = {
        "torch": torch.__version__,
        "windows": options.windows,
        "weight of right labels": weights[~wrong].mean().item(),
        "weight of wrong labels": weights[wrong].mean().item(),
        "separated, %": 100 * ((weights < weights.mean()) == wrong).float().mean().item(),
    }
    compared = {"equal": torch.ones(TRAIN), "learned": weights, "zero for wrong labels": (~wrong).float()}
    rows = {
        title: [accuracy(train, test, values, seed, options.steps) for seed in range(options.seeds)]
        for title, values in compared.items()
    }
    report(learned, rows, options.out)


def report(learned: dict[str, Any], rows: dict[str, list[float]], out: Path) -> None:
    """Print the table; write it as Markdown and JSON."""
    title = (
        f"{100 * WRONG:.0f} % of the labels are wrong. Mean weight: {learned['weight of right labels']:.2f} of right "
        f"labels, {learned['weight of wrong labels']:.2f} of wrong ones; {learned['separated, %']:.0f} % are separated."
    )
    lines = [(row, f"{statistics.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})") for row, v in rows.items()]
    table = Table("weights", "accuracy, %", title=title)
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    out.mkdir(parents=True, exist_ok=True)
    text = [title, "", "| weights | accuracy, % |", "|---|---|", *(f"| {row} | {value} |" for row, value in lines)]
    (out / "differentiate_through_training.md").write_text("\n".join(text) + "\n")
    (out / "differentiate_through_training.json").write_text(json.dumps({**learned, "accuracy": rows}, indent=1) + "\n")
    print(f"wrote {out}/differentiate_through_training.{{md,json}}")


if __name__ == "__main__":
    main()
