"""Federated averaging: NFNOptimizer beside AdamW at four learning rates.

    python benchmarks/federated.py --data FOLDER

Five clients have 500 images of Fashion-MNIST (14x14) each, with different shares of the classes (a Dirichlet
distribution). In every round each takes some steps on its own images from the weights of the server, and the server
takes the mean of their weights. Optimizers are made anew for every round, or kept by their clients, so that their state
belongs to weights that have been replaced. Held-out losses and accuracies of the server's weights, means over seeds.
Writes `federated.json` and `federated.md` to `benchmarks/results`.

References:
    Communication-Efficient Learning of Deep Networks from Decentralized Data (McMahan et al., 2017), Alg. 1,
        arXiv:1602.05629
    Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification (Hsu et al., 2019),
        Sec. 3, arXiv:1909.06335
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from result import setting, write
from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.evaluation.networks import mlp
from meta_train.evaluation.pretraining import reduced_images
from nfn_optim import NFNOptimizer

CLIENTS, IMAGES, HELD = 5, 500, 2000
CONCENTRATION = 0.3  # of the Dirichlet distribution; the lower, the more clients differ
BATCH = 32
RATES = (3e-4, 1e-3, 3e-3, 1e-2)

Make = Callable[[nn.Module, int], torch.optim.Optimizer]
"""From a network and the number of steps of an optimizer's life."""
Data = tuple[Tensor, Tensor]


def contenders(rates: Sequence[float]) -> dict[str, Make]:
    """Label -> what makes the optimizer."""
    return {
        **{f"AdamW, {lr:g}": lambda m, _, lr=lr: torch.optim.AdamW(m.parameters(), lr, fused=True) for lr in rates},
        "NFNOptimizer": lambda m, _: NFNOptimizer(m),
        "with `total_steps`": lambda m, steps: NFNOptimizer(m, total_steps=steps),
    }


def shares_of_clients(data: Data, seed: int) -> list[Data]:
    """The images of every client, drawn by its own distribution of classes."""
    torch.manual_seed(seed)
    x, y = data
    classes = int(y.max()) + 1
    preferences = torch.distributions.Dirichlet(torch.full((classes,), CONCENTRATION)).sample((CLIENTS,))
    counts = torch.bincount(y, minlength=classes).clamp(min=1)
    rows = [torch.multinomial((preference / counts)[y], IMAGES) for preference in preferences + 1e-6]
    return [(x[chosen], y[chosen]) for chosen in rows]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, steps: int, batches: torch.Generator) -> None:
    """The local steps of a client."""
    for _ in range(steps):
        chosen = torch.randint(len(data[0]), (BATCH,), generator=batches)
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][chosen]), data[1][chosen]).backward()
        optimizer.step()


@torch.no_grad()
def average(server: nn.Module, clients: Sequence[nn.Module]) -> None:
    """Give the server the mean of the clients' weights, which have equally many images."""
    for p, *others in zip(server.parameters(), *(client.parameters() for client in clients), strict=True):
        p.copy_(torch.stack(others).mean(0))


@torch.no_grad()
def scores(model: nn.Module, held: Data) -> tuple[float, float]:
    """Loss and accuracy."""
    logits = model(held[0])
    return F.cross_entropy(logits, held[1]).item(), (logits.argmax(-1) == held[1]).float().mean().item()


def run(make: Make, kept: bool, data: Sequence[Data], held: Data, rounds: int, steps: int, seed: int) -> list[Any]:
    """Held-out loss and accuracy of the server after every round.

    Args:
        make: Makes an optimizer.
        kept: Whether clients keep their optimizers from round to round.
        data: The images of every client.
        held: Held-out images.
        rounds: Number of rounds.
        steps: Of every client in every round.
        seed: Of initial weights and batches.
    """
    torch.manual_seed(seed)
    server = mlp(196, 64, 10)
    clients = [deepcopy(server) for _ in data]
    optimizers = [make(client, rounds * steps) for client in clients] if kept else []
    batches, found = torch.Generator().manual_seed(seed), []
    for _ in range(rounds):
        for k, (client, own) in enumerate(zip(clients, data, strict=True)):
            client.load_state_dict(server.state_dict())
            train(client, optimizers[k] if kept else make(client, steps), own, steps, batches)
        average(server, clients)
        found.append(scores(server, held))
    return found


def text_of(rows: Sequence[dict[str, Any]], about: str) -> str:
    """The table: a line for each optimizer, after half of the rounds and all."""
    lines = [
        about,
        "",
        "| held-out loss, accuracy | made anew, half | all | kept, half | all |",
        "|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(row["optimizer"] for row in rows):
        cells = []
        for kept in (False, True):
            runs = [row["rounds"] for row in rows if row["optimizer"] == label and row["kept"] == kept]
            for k in ((len(runs[0]) + 1) // 2 - 1, len(runs[0]) - 1):
                loss, accuracy = (
                    statistics.fmean(values) for values in zip(*(found[k] for found in runs), strict=True)
                )
                cells.append(f"{loss:.3f}, {100 * accuracy:.1f} %")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    data: Path,
    out: Path = Path(__file__).parent / "results",
    seeds: Annotated[int, tyro.conf.arg(help="shares of clients, initial weights and batches")] = 2,
    rounds: Annotated[int, tyro.conf.arg(help="number of rounds")] = 10,
    steps: Annotated[int, tyro.conf.arg(help="of every client in every round")] = 20,
) -> None:
    """Compare optimizers of clients in federated averaging.

    Args:
        data: Folder with `fashion_mnist.npz`.
        out: Output folder.
        seeds: See above.
        rounds: See above.
        steps: See above.
    """
    torch.set_num_threads(1)
    shown, held = (reduced_images(data, "fashion_mnist", p, 0, n) for p, n in (("train", 10_000), ("test", HELD)))
    rows: list[dict[str, Any]] = []
    for label, make in contenders(RATES).items():
        for kept in (False, True):
            for seed in range(seeds):
                found = run(make, kept, shares_of_clients(shown, seed), held, rounds, steps, seed)
                rows.append({"optimizer": label, "kept": kept, "seed": seed, "rounds": found})
            print(label, "kept" if kept else "made anew", found[-1], file=sys.stderr, flush=True)
    about = f"{setting('torch')}. {CLIENTS} clients, {rounds} rounds of {steps} steps, means over {seeds} seeds."
    write(out, "federated", text_of(rows, about), {"about": about, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main)
