"""The cost of finding the symmetry: the first forward pass and the first step, over passes without an optimizer.

    python benchmarks/first_step_cost.py

The first forward pass is traced while it runs, the first step names what was found. Each turn takes a new network of
the same weights, runs one iteration without an optimizer to warm up, times another, then constructs `NFNOptimizer` and
times its first iterations. Times are processor times on one thread; a ratio is the median over turns.

    forward      first forward pass / forward pass
    iteration    first forward and backward pass and step / forward and backward pass
    second       second forward and backward pass and step / forward and backward pass

Writes `first_step_cost.json` and `first_step_cost.md`; takes some five minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result import setting, write
from torch import Tensor, nn

from nfn_optim import NFNOptimizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import torchvision_ops

torchvision_ops.declare()
TURNS = 3


@dataclass(frozen=True)
class Model:
    """A randomly initialised network with a typical batch."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    title: str


class Sequences(nn.Module):
    """A recurrent layer, and a linear one that reads its last output."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        """See the class."""
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(recurrent.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The output at the last time step, `(batch, 3)`."""
        output: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return output


class Cell(nn.Module):
    """An LSTM cell in a loop of Python."""

    def __init__(self) -> None:
        """See the class."""
        super().__init__()
        self.cell, self.head = nn.LSTMCell(8, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The output at the last time step, `(batch, 3)`."""
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        assert state is not None
        output: Tensor = self.head(state[0])
        return output


def timm(name: str) -> nn.Module:
    """A network from timm."""
    import timm  # noqa: PLC0415 - takes seconds

    network: nn.Module = timm.create_model(name)
    return network


def gpt2() -> nn.Module:
    """GPT-2 small."""
    import transformers  # noqa: PLC0415 - takes seconds

    return transformers.GPT2LMHeadModel(transformers.GPT2Config())  # type: ignore[no-any-return]


def images() -> Tensor:
    """Four images."""
    return torch.randn(4, 3, 224, 224)


MODELS = {
    "ViT-S": Model(lambda: timm("vit_small_patch16_224"), images, "4 images"),
    "DenseNet-121": Model(lambda: timm("densenet121"), images, "4 images"),
    "ResNet-18": Model(lambda: timm("resnet18"), images, "4 images"),
    "GPT-2 small": Model(gpt2, lambda: torch.randint(50257, (1, 256)), "256 tokens"),
    "MLP": Model(
        lambda: nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)),
        lambda: torch.randn(64, 784),
        "64 rows",
    ),
    "LSTM": Model(
        lambda: Sequences(nn.LSTM(8, 32, batch_first=True)), lambda: torch.randn(4, 1000, 8), "4 x 1,000 time steps"
    ),
    "GRU": Model(
        lambda: Sequences(nn.GRU(8, 32, batch_first=True)), lambda: torch.randn(4, 1000, 8), "4 x 1,000 time steps"
    ),
    "GRU, 3 layers": Model(
        lambda: Sequences(nn.GRU(32, 64, num_layers=3, batch_first=True)),
        lambda: torch.randn(8, 300, 32),
        "8 x 300 time steps",
    ),
    "LSTM cell": Model(Cell, lambda: torch.randn(4, 1000, 8), "4 x 1,000 time steps"),
}


def loss_of(output: Any) -> Tensor:
    """A loss for the output of any of the models."""
    tensor: Tensor = output if isinstance(output, Tensor) else output.logits
    return tensor.square().mean()


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a call, and its result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def turn(model: Model) -> dict[str, float]:
    """Seconds of plain and of first passes of a new network."""
    torch.manual_seed(0)
    network, x = model.build().train(), model.batch()

    def iteration(optimizer: NFNOptimizer | None = None) -> tuple[float, float]:
        forward, output = seconds(lambda: network(x))

        def rest() -> None:
            loss_of(output).backward()
            if optimizer is not None:
                optimizer.step()

        after, _ = seconds(rest)
        network.zero_grad()
        return forward, forward + after

    iteration()
    forward, plain = iteration()
    optimizer = NFNOptimizer(network)
    first_forward, first = iteration(optimizer)
    _, second = iteration(optimizer)
    assert optimizer.symmetry is not None
    return {
        "forward": forward,
        "iteration": plain,
        "first_forward": first_forward,
        "first_iteration": first,
        "second_iteration": second,
        "free": len(optimizer.symmetry.free),
    }


def row_of(name: str, model: Model) -> dict[str, Any]:
    """Measure a model; returns medians and ratios."""
    turn(model)
    turns = [turn(model) for _ in range(TURNS)]
    row: dict[str, Any] = {"model": name, "batch": model.title}
    row |= {key: statistics.median(t[key] for t in turns) for key in turns[0]}
    for ratio, (above, below) in {
        "forward_ratio": ("first_forward", "forward"),
        "iteration_ratio": ("first_iteration", "iteration"),
        "second_ratio": ("second_iteration", "iteration"),
    }.items():
        row[ratio] = statistics.median(t[above] / t[below] for t in turns)
    print(row, flush=True)
    return row


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The rows as a Markdown table."""
    lines = [
        "| model | batch | forward, ms | first forward | forward and backward, ms | first with step | second |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {row['model']} | {row['batch']} | {1e3 * row['forward']:.0f} | {row['forward_ratio']:.1f}x "
        f"| {1e3 * row['iteration']:.0f} | {row['iteration_ratio']:.1f}x | {row['second_ratio']:.1f}x |"
        for row in rows
    ]


def main() -> None:
    """Measure all models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row_of(name, MODELS[name]) for name in options.models]
    about = setting("torch", "timm", "transformers")
    text = f"{about}. Median of {TURNS} turns; ratios are over passes without an optimizer."
    write(options.out, "first_step_cost", "\n".join([text, "", *table(rows)]), {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
