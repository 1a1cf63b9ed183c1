"""Cost of NFLinear and of the paper's code (`nfn`): time of forward and backward, and peak memory.

    python benchmarks/layers.py

Each applies one NP or HNP layer with equal numbers of input and output channels to a batch of eight networks,
alternating in one process; a speedup is the median of the ratios of adjacent repetitions. The features of an "inner"
layer require gradients, those of a "first" layer do not. Peak memory is what forward and backward allocate in addition
to parameters and features, according to the profiler; it includes the outputs and all gradients. Products: the fraction
of our time spent in matrix products, according to the profiler. Writes `layers.json` and `layers.md`.
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
CONFIGURATIONS = (
    *(("MNIST MLP 784-128-128-10", "NP", channels) for channels in (16, 64)),
    *(
        (network, kind, channels)
        for network in ("MLP 64-32-10", "CNN 1-16-16-16-10")
        for kind in ("NP", "HNP")
        for channels in (16, 64)
    ),
    ("MNIST MLP 784-128-128-10", "HNP", 16),
)
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def chain(sizes: Sequence[int], tap: int = 1) -> Symmetry:
    """The HNP symmetry of a sequence of linear layers, or of convolutions with `tap * tap` taps."""
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


def nf_linear(symmetry: Symmetry, kind: str, channels: int, inner: bool) -> tuple[nn.Module, Callable[[], None]]:
    """Our layer, and a function that runs forward and backward."""
    symmetry = symmetry if kind == "HNP" else free_ends(symmetry)
    layer = NFLinear(symmetry, channels, channels)
    features = {
        name: torch.randn(BATCH, *symmetry.shape_of(name), channels, requires_grad=inner) for name in symmetry.dims
    }
    grads = [torch.randn_like(x) for x in features.values()]

    def step() -> None:
        torch.autograd.backward(list(layer(features).values()), grads)
        _clear_grads([*layer.parameters(), *features.values()])

    return layer, step


def nfn_linear(symmetry: Symmetry, kind: str, channels: int, inner: bool) -> tuple[nn.Module, Callable[[], None]]:
    """The layer of nfn, and a function that runs forward and backward; channels come first."""
    tensors: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    for name in symmetry.dims:
        x = torch.randn(BATCH, channels, *symmetry.shape_of(name), requires_grad=inner)
        tensors[name.split(".")[1]].append(x)
    features = WeightSpaceFeatures(tensors["weight"], tensors["bias"])
    layer: nn.Module = {"NP": NPLinear, "HNP": HNPLinear}[kind](
        network_spec_from_wsfeat(features, True), channels, channels
    )
    inputs = [*features.weights, *features.biases]
    grads = [torch.randn_like(x) for x in inputs]

    def step() -> None:
        out = layer(features)
        torch.autograd.backward([*out.weights, *out.biases], grads)
        _clear_grads([*layer.parameters(), *inputs])

    return layer, step


def _clear_grads(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None


def profiled(step: Callable[[], None]) -> tuple[float, float]:
    """Peak memory in MiB, and the fraction of time spent in matrix products."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    allocated = peak = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    averages = record.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    products = sum(event.self_cpu_time_total for event in averages if event.key in MATRIX_PRODUCTS)
    return peak / 2**20, products / total


def row_of(network: str, kind: str, channels: int, inner: bool, repetitions: int) -> dict[str, Any]:
    """Measure both layers in one configuration."""
    torch.manual_seed(0)
    built = [build(NETWORKS[network], kind, channels, inner) for build in (nf_linear, nfn_linear)]
    times: list[list[float]] = [[], []]
    for repetition in range(1 + repetitions):
        for measured, (_, step) in zip(times, built, strict=True):
            start = time.perf_counter()
            step()
            if repetition:  # the first is a warm-up
                measured.append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    (memory, products), (nfn_memory, _) = (profiled(step) for _, step in built)
    row = {
        "network": network,
        "kind": kind,
        "channels": channels,
        "layer": "inner" if inner else "first",
        "coefficients": sum(p.numel() for p in built[0][0].parameters()),
        "nfn_coefficients": sum(p.numel() for p in built[1][0].parameters()),
        "milliseconds": statistics.median(times[0]) * 1e3,
        "nfn_milliseconds": statistics.median(times[1]) * 1e3,
        "speedup": statistics.median(ratios),
        "peak_mib": memory,
        "nfn_peak_mib": nfn_memory,
        "matrix_product_fraction": products,
    }
    print(row, flush=True)
    return row


def table_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table in Markdown."""
    titles = "network, layer, channels, coefficients, ms, nfn ms, speedup, MiB, nfn MiB, MiB ratio, products"
    lines = [f"| {titles.replace(', ', ' | ')} |", "|---" * len(titles.split(", ")) + "|"]
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['kind']}, {row['layer']} | {row['channels']} | {row['coefficients']:,} "
            f"| {row['milliseconds']:.1f} | {row['nfn_milliseconds']:.1f} | {row['speedup']:.2f} "
            f"| {row['peak_mib']:.1f} | {row['nfn_peak_mib']:.1f} | {row['peak_mib'] / row['nfn_peak_mib']:.2f} "
            f"| {row['matrix_product_fraction']:.0%} |"
        )
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for network, kind, channels in CONFIGURATIONS:
        large = network.startswith("MNIST")
        for inner in (True, False):
            repetitions = min(args.repetitions, 1 if kind == "HNP" else 3) if large else args.repetitions
            rows.append(row_of(network, kind, channels, inner, repetitions))
            gc.collect()
    about = setting("torch", "nfn")
    lines = [f"{about}. Forward and backward, batch of {BATCH}; medians.", "", *table_of(rows)]
    write(args.out, "layers", "\n".join(lines), {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
