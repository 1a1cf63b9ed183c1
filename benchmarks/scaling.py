"""Training in many processes: what an optimizer step sends and holds, counted from shapes alone.

    python benchmarks/scaling.py

Transformers of one and of 70 billion weights on the meta device, the default rule, one to 1,024 ranks; nothing is run.
`tests/integrations/test_distributed.py` counts what two ranks send and hold, and compares it with these functions.

    S  =  sum over matrices of  rows (2 k + 1)    Z and N in the subspace of dimension k, and the energy of every row;
                                                  rows (k + 1) without whitening
    B  =  sum over matrices of  rest k            the bases, of matrices with more rows and columns than the rule's rank
    P  =  sum over tensors of  6 (1 + sizes)      statistics of every row, column and tensor
    A  =  numbers of the largest matrix

Under FSDP2 every rank puts S + 1 numbers into all-reduces at a step, P and B more at a refresh, and all matrices once,
at the first step, where weights that were trained before are recognised. Under DDP it sends nothing. Each of R ranks in
a ring sends 2 (R - 1) / R times the numbers of an all-reduce, and half of that for the reduction of sharded gradients.
All numbers are in float32, on rank 0, which has the largest shards. Members of divided tensors (experts, fused
projections) count as tensors. Of what is transient the terms above are counted and a tile of the passes; single numbers
for each neuron are left out, which are a few percent. Writes `scaling.json` and `scaling.md`; takes seconds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result import setting, write
from torch import nn

from nfn_optim import UpdateRule, pretrained
from nfn_optim.engine.executor import Execution
from nfn_optim.engine.moments import MOMENTS
from nfn_optim.engine.weight_features import STATISTICS
from nfn_optim.rule.subspace import STATE_KEY
from nfn_optim.rule.whitening import WHITENER

BYTES = 4  # of a number
RANKS = tuple(2**k for k in range(11))
TILE_NUMBERS = 16  # held for each weight of a tile, see `Execution`
ADAMW_MOMENTS = 2
EXACT_BELOW = 1e11  # bytes: fewer are shown with a decimal
MATRIX = 2  # dimensions
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transformer:
    """Sizes of a decoder with grouped keys and values, gated hidden layers and no biases."""

    width: int
    layers: int
    hidden: int
    keys: int
    vocabulary: int
    tied: bool

    def build(self) -> nn.Module:
        """Its tensors, on the meta device."""
        with torch.device("meta"):
            maps = [(self.width, self.width)] * 2 + [(self.width, self.keys)] * 2
            maps += [(self.width, self.hidden)] * 2 + [(self.hidden, self.width)]
            blocks = [
                nn.ModuleList([*(nn.Linear(*m, bias=False) for m in maps), *(nn.RMSNorm(self.width) for _ in range(2))])
                for _ in range(self.layers)
            ]
            ends = [nn.Embedding(self.vocabulary, self.width), nn.RMSNorm(self.width)]
            ends += [] if self.tied else [nn.Linear(self.width, self.vocabulary, bias=False)]
            return nn.ModuleList([*ends, *blocks])


MODELS = {
    "1B": Transformer(width=2048, layers=16, hidden=8192, keys=512, vocabulary=128256, tied=True),
    "70B": Transformer(width=8192, layers=80, hidden=28672, keys=1024, vocabulary=128256, tied=False),
}


@dataclass(frozen=True)
class Counts:
    """What the step of a rule sends and holds.

    Args:
        shapes: Of all tensors.
        rule: Of the optimizer, with orthogonal directions.
    """

    shapes: Sequence[Shape]
    rule: UpdateRule

    @property
    def matrices(self) -> list[Shape]:
        """The shapes of matrices."""
        return [shape for shape in self.shapes if len(shape) >= MATRIX]

    def dimension(self, shape: Shape) -> int:
        """Dimension of the subspace of a matrix, k."""
        basis = self.rule.entry_shapes(shape).get(STATE_KEY)
        return math.prod(shape[1:]) if basis is None else basis[-1]

    def whitens(self, shape: Shape) -> bool:
        """Whether the momentum of a matrix is projected too."""
        return WHITENER in self.rule.entry_shapes(shape)

    @property
    def projections(self) -> int:
        """S."""
        each = {shape: 2 if self.whitens(shape) else 1 for shape in self.matrices}
        return sum(shape[0] * (each[shape] * self.dimension(shape) + 1) for shape in self.matrices)

    @property
    def bases(self) -> int:
        """B."""
        found = (self.rule.entry_shapes(shape).get(STATE_KEY) for shape in self.matrices)
        return sum(math.prod(basis) for basis in found if basis is not None)

    @property
    def statistics(self) -> int:
        """P."""
        return STATISTICS * sum(1 + sum(shape) for shape in self.shapes)

    def sent(self, *, refresh: bool, first: bool = False) -> list[int]:
        """Numbers that a rank puts into each all-reduce of a step under FSDP2, in order.

        Args:
            refresh: Whether the step refreshes coefficients and bases.
            first: Whether it is the first one.
        """
        gathered = [math.prod(shape) for shape in self.matrices] if first else []
        moved = [self.bases] if self.bases else []
        rest = [self.statistics, self.projections, *moved] if refresh else [self.projections]
        return [1, *gathered, *rest]  # the first one says whether all gradients are finite

    def state(self, ranks: int = 1) -> int:
        """Numbers in the state of a rank: moments of its shards, all else whole."""
        entries = [shape.numel() for x in self.shapes for shape in self.rule.entry_shapes(x).values()]
        return len(MOMENTS) * local_weights(self.shapes, ranks) + sum(entries) + len(self.shapes)

    def transient(self, ranks: int = 1, *, sharded: bool = True, first: bool = False) -> int:
        """Numbers that a rank holds beside parameters, gradients and state, at the most: at a refresh.

        Args:
            ranks: Over which tensors are sharded.
            sharded: Whether they are DTensors: contributions to an all-reduce are padded, then put into one buffer.
            first: Whether it is the first step.
        """
        s, b = self.projections, self.bases
        whitened = sum(shape[0] * self.dimension(shape) for shape in self.matrices if self.whitens(shape))
        held = [s + whitened + (3 if sharded else 2) * b]  # Z, N and Z'; images, their sums and the bases of these
        held += [2 * s + s // ranks] if sharded else []
        held = [x + TILE_NUMBERS * min(Execution().tile, local_weights(self.shapes, ranks)) for x in held]
        held += [4 * max(math.prod(shape) for shape in self.matrices)] if first else []
        return max(held)


def local_weights(shapes: Sequence[Shape], ranks: int) -> int:
    """Weights on rank 0 where every tensor is sharded along its first dimension."""
    return sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in shapes)


def ring(numbers: float, ranks: int) -> float:
    """Bytes that a rank sends in a ring all-reduce."""
    return 2 * (ranks - 1) / ranks * BYTES * numbers


def row(title: str, counts: Counts, ranks: int, *, sharded: bool) -> dict[str, Any]:
    """What a rank sends and holds, in bytes."""
    weights, every = local_weights(counts.shapes, 1), counts.rule.config.refresh_every
    local = local_weights(counts.shapes, ranks if sharded else 1)
    steps = {"plain": {"refresh": False}, "refresh": {"refresh": True}, "first": {"refresh": True, "first": True}}
    sent = {name: ring(sum(counts.sent(**step)), ranks) if sharded else 0.0 for name, step in steps.items()}
    gradients = ring(weights, ranks) / (2 if sharded else 1)
    mean = ((every - 1) * sent["plain"] + sent["refresh"]) / every
    shards = ranks if sharded else 1
    return {
        "model": title,
        "weights": weights,
        "ranks": ranks,
        "sharded": sharded,
        "sent": {**sent, "mean": mean},
        "sent_gradients": gradients,
        "sent_over_gradients": mean / gradients if gradients else 0.0,
        "parameters": BYTES * local,
        "gradients": BYTES * local,
        "state": BYTES * counts.state(shards),
        "transient": BYTES * counts.transient(shards, sharded=sharded),
        "transient_first": BYTES * counts.transient(shards, sharded=sharded, first=True),
        "adamw_state": BYTES * (ADAMW_MOMENTS * local + len(counts.shapes)),
    }


def page(content: Mapping[str, Any]) -> str:
    """One line for each model and number of ranks."""

    def gigabytes(*values: float) -> str:
        return " | ".join(f"{x / 1e9:.1f}" if x < EXACT_BELOW else f"{x / 1e9:,.0f}" for x in values)

    lines = [
        f"{content['about']}. Counted, not measured: GB of a rank, in float32. *Sent*: by the optimizer, on top of",
        f"the gradients' reduction, at a plain step and at a refresh (every {content['refresh_every']} steps); *over",
        "gradients*: the mean over that reduction. AdamW sends nothing. *Transient*: what a step holds for a moment.",
        "*Total*: parameters, gradients, state and that; of AdamW, fused, without it.",
        "",
        "| model | | ranks | sent, plain | refresh | first step | over gradients, % | parameters, gradients | state "
        "| transient | first step | total | AdamW's total |",
        "|---" * 13 + "|",
    ]
    for r in content["rows"]:
        total = r["parameters"] + r["gradients"] + r["state"] + r["transient"]
        adamw = r["parameters"] + r["gradients"] + r["adamw_state"]
        sent = gigabytes(*(r["sent"][name] for name in ("plain", "refresh", "first")))
        held = gigabytes(r["parameters"] + r["gradients"], r["state"], r["transient"], r["transient_first"])
        kind, ranks = ("FSDP2", f"{r['ranks']:,}") if r["sharded"] else ("DDP", "any")
        share = f"{100 * r['sent_over_gradients']:.1f}"
        lines.append(f"| {r['model']} | {kind} | {ranks} | {sent} | {share} | {held} | {gigabytes(total, adamw)} |")
    return "\n".join(lines)


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rule, rows = pretrained.load(), []
    for title, model in MODELS.items():
        counts = Counts([tuple(p.shape) for p in model.build().parameters()], rule)
        rows.append(row(title, counts, max(RANKS), sharded=False))
        rows += [row(title, counts, ranks, sharded=True) for ranks in RANKS]
    content = {"about": setting("torch"), "rule": pretrained.DEFAULT, "refresh_every": rule.config.refresh_every}
    content["rows"] = rows
    write(args.out, "scaling", page(content), content)


if __name__ == "__main__":
    main()
