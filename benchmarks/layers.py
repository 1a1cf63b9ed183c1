"""NF-layers beside the seed paper's code (`nfn`): time of forward and backward, and peak memory.

    python benchmarks/layers.py

Both apply one NP or HNP layer to a batch of eight networks, with as many channels out as in, in the same process and in
turns; a ratio is the median of the ratios of turns beside each other. "Inner": the features need gradients, as in the
middle of a network; "first": they do not. Peak memory is the most that forward and backward hold above what there was
before (parameters and features), counted by the profiler; it contains the outputs and all gradients, which both must
make. Products: the share of our time that matrix products take, by the profiler. Writes `layers.json` and `layers.md`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nfn.common import WeightSpaceFeatures, network_spec_from_wsfeat
from nfn.layers import HNPLinear, NPLinear
from result import setting, write
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from nfn_optim.layers import NFLinear, free_ends
from nfn_optim.symmetry import Symmetry

BATCH = 8
CELLS = (
    *(("MNIST MLP 784-128-128-10", "NP", channels) for channels in (16, 64)),
    *(
        (network, kind, channels)
        for network in ("MLP 64-32-10", "CNN 1-16-16-16-10")
        for kind in ("NP", "HNP")
        for channels in (16, 64)
    ),
    ("MNIST MLP 784-128-128-10", "HNP", 16),
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def chain(sizes: Sequence[int], tap: int = 1) -> Symmetry:
    """Linear layers, or convolutions of `tap` times `tap`, one behind the other."""
    axes = ["in", *(f"h{n}" for n in range(len(sizes) - 2)), "out"]
    lengths, fixed = dict(zip(axes, sizes, strict=True)), {"in", "out"}
    dims: dict[str, tuple[str, ...]] = {}
    for n in range(len(sizes) - 1):
        taps = (f"y{n}", f"x{n}") if tap > 1 else ()
        dims |= {f"{n}.weight": (axes[n + 1], axes[n], *taps), f"{n}.bias": (axes[n + 1],)}
        lengths |= dict.fromkeys(taps, tap)
        fixed |= set(taps)
    return Symmetry(dims, lengths, frozenset(fixed))


NETWORKS = {
    "MNIST MLP 784-128-128-10": chain((784, 128, 128, 10)),
    "MLP 64-32-10": chain((64, 32, 10)),
    "CNN 1-16-16-16-10": chain((1, 16, 16, 16, 10), 3),
}


def ours(symmetry: Symmetry, kind: str, channels: int, inner: bool) -> tuple[nn.Module, Callable[[], None]]:
    """The layer, and what to time."""
    symmetry = symmetry if kind == "HNP" else free_ends(symmetry)
    layer = NFLinear(symmetry, channels, channels)
    features = {
        name: torch.randn(BATCH, *symmetry.shape_of(name), channels, requires_grad=inner) for name in symmetry.dims
    }
    grads = [torch.randn_like(x) for x in features.values()]

    def turn() -> None:
        torch.autograd.backward(list(layer(features).values()), grads)
        _forget([*layer.parameters(), *features.values()])

    return layer, turn


def theirs(symmetry: Symmetry, kind: str, channels: int, inner: bool) -> tuple[nn.Module, Callable[[], None]]:
    """The same of nfn; channels come first."""
    features: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    for name in symmetry.dims:
        x = torch.randn(BATCH, channels, *symmetry.shape_of(name), requires_grad=inner)
        features[name.split(".")[1]].append(x)
    given = WeightSpaceFeatures(features["weight"], features["bias"])
    layer: nn.Module = {"NP": NPLinear, "HNP": HNPLinear}[kind](
        network_spec_from_wsfeat(given, True), channels, channels
    )
    everything = [*given.weights, *given.biases]
    grads = [torch.randn_like(x) for x in everything]

    def turn() -> None:
        out = layer(given)
        torch.autograd.backward([*out.weights, *out.biases], grads)
        _forget([*layer.parameters(), *everything])

    return layer, turn


def _forget(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None


def watched(turn: Callable[[], None]) -> tuple[float, float]:
    """Peak memory in MiB, and the share of time in matrix products."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        turn()
    now = most = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    averages = record.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    products = sum(event.self_cpu_time_total for event in averages if event.key in PRODUCTS)
    return most / 2**20, products / total


def row_of(network: str, kind: str, channels: int, inner: bool, repetitions: int) -> dict[str, Any]:
    """Measure a cell."""
    torch.manual_seed(0)
    built = [made(NETWORKS[network], kind, channels, inner) for made in (ours, theirs)]
    times: list[list[float]] = [[], []]
    for number in range(1 + repetitions):
        for taken, (_, turn) in zip(times, built, strict=True):
            begun = time.perf_counter()
            turn()
            if number:
                taken.append(time.perf_counter() - begun)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    (memory, products), (their_memory, _) = (watched(turn) for _, turn in built)
    row = {
        "network": network,
        "kind": kind,
        "channels": channels,
        "layer": "inner" if inner else "first",
        "coefficients": sum(p.numel() for p in built[0][0].parameters()),
        "nfn_coefficients": sum(p.numel() for p in built[1][0].parameters()),
        "milliseconds": statistics.median(times[0]) * 1e3,
        "nfn_milliseconds": statistics.median(times[1]) * 1e3,
        "times_as_fast": statistics.median(ratios),
        "peak_mib": memory,
        "nfn_peak_mib": their_memory,
        "share_of_products": products,
    }
    print(row, flush=True)
    return row


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table in Markdown."""
    titles = "network, layer, channels, coefficients, ms, nfn ms, times as fast, MiB, nfn MiB, over nfn, products"
    lines = [f"| {titles.replace(', ', ' | ')} |", "|---" * len(titles.split(", ")) + "|"]
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['kind']}, {row['layer']} | {row['channels']} | {row['coefficients']:,} "
            f"| {row['milliseconds']:.1f} | {row['nfn_milliseconds']:.1f} | {row['times_as_fast']:.2f} "
            f"| {row['peak_mib']:.1f} | {row['nfn_peak_mib']:.1f} | {row['peak_mib'] / row['nfn_peak_mib']:.2f} "
            f"| {row['share_of_products']:.0%} |"
        )
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repetitions", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for network, kind, channels in CELLS:
        large = network.startswith("MNIST")
        for inner in (True, False):
            repetitions = min(given.repetitions, 1 if kind == "HNP" else 3) if large else given.repetitions
            rows.append(row_of(network, kind, channels, inner, repetitions))
            gc.collect()
    about = setting("torch", "nfn")
    lines = [f"{about}. Forward and backward, batch of {BATCH}; medians.", "", *lines_of(rows)]
    write(given.out, "layers", "\n".join(lines), {"about": about, "cells": rows})


if __name__ == "__main__":
    main()
