"""Monitor NFNOptimizer in TensorBoard while it trains a small network with convolutions and attention on digits.

    python examples/watch_in_tensorboard.py
    tensorboard --logdir runs/watch_in_tensorboard

A training script that writes to TensorBoard needs one more line, `watch(optimizer, writer)`. The Custom Scalars tab
shows the charts; the Text tab explains them.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter

from nfn_optim import NFNOptimizer, watch

BATCH_SIZE = 64


class Network(nn.Module):
    """Two convolutions, self-attention over their sixteen output positions, and a linear layer."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        first = [nn.Conv2d(1, width // 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.stem = nn.Sequential(*first, nn.Conv2d(width // 2, width, 3, padding=1), nn.ReLU())
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(16 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, 1, 8, 8)` to logits `(batch, 10)`."""
        tokens = self.stem(images).flatten(2).transpose(1, 2)  # (batch, 16, width)
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        logits: Tensor = self.head((tokens + attended).flatten(1))
        return logits


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,797 images of 8x8 pixels: training images and labels, held-out images and labels."""
    data = load_digits()
    x = torch.as_tensor(data.images, dtype=torch.float32)[:, None]
    x = (x - x[:1500].mean()) / x[:1500].std()
    y = torch.as_tensor(data.target)
    return x[:1500], y[:1500], x[1500:], y[1500:]


def main() -> None:
    """Train and monitor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/watch_in_tensorboard"), help="folder for runs")
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    torch.manual_seed(0)
    x, y, held_x, held_y = digits()
    model = Network()
    optimizer = NFNOptimizer(model, total_steps=given.steps)
    folder = given.out / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")

    with SummaryWriter(str(folder)) as writer:
        watching = watch(optimizer, writer)  # the additional line
        for step in range(1, given.steps + 1):
            index = torch.randint(len(x), (BATCH_SIZE,))
            loss = cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0 or step == given.steps:
                with torch.no_grad():
                    accuracy = (model(held_x).argmax(-1) == held_y).float().mean().item()
                writer.add_scalar("loss/train", loss.item(), step)
                writer.add_scalar("accuracy/held_out", accuracy, step)
                print(f"step {step:4}   loss {loss.item():.4f}   accuracy {100 * accuracy:.1f} %")
        watching.close(accuracy=accuracy)

    print(f"\ntensorboard --logdir {given.out}\nthen open http://localhost:6006/#custom_scalars and #text")


if __name__ == "__main__":
    main()
