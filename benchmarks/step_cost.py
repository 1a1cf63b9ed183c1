"""The cost of a step: time over fused AdamW, persistent and transient memory, and the bound set by memory traffic.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --models ViT GPT

Every optimizer takes turns with fused AdamW, each on its own copy of a model, on one thread, so that fluctuations of
the machine's speed affect both; a ratio is the median over adjacent turns. A turn is one refresh interval of the
shipped rule, so that steps with and without message passing have their natural weights. Times are processor times,
which other load disturbs less than wall-clock times. Transient memory is the peak that a step allocates, counted by
the profiler; persistent memory is the optimizer's state. A training step is forward pass, backward pass and optimizer
step.

    bytes        memory traffic per weight: every array read or written in every pass, and the gradient check
    operations   elements that PyTorch's operators write in an uncompiled step, per weight
    products     additions and multiplications in its matrix products, per weight; they take at least as long as at the
                 speed of a large square product, measured in the same run

Muon updates matrices and fused AdamW the rest. Writes `step_cost.json` and `step_cost.md`; takes half an hour, or, with
`--models`, is done in pieces.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import schedulefree
import torch
from result import setting, write
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nfn_optim import NFNOptimizer, pretrained
from nfn_optim.engine import inductor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import torchvision_ops

torchvision_ops.declare()
Build = Callable[[nn.Module], Any]
MAX_SECONDS = 10.0  # for the turns of one pair
RULE = pretrained.load()
TURN = RULE.config.refresh_every  # steps
WARMUP = TURN + 2  # steps, among them some with and some without message passing
CACHE = tempfile.TemporaryDirectory()
BYTES = {
    "AdamW": 28,  # p g m v read, p m v written
    # g; g m v; p g m v M and again g m v for message passing; p g m v M read, p m v M written
    "NFNOptimizer": 4 + 12 + 32 / TURN + 20 + 16,
}


@dataclass(frozen=True)
class Model:
    """A randomly initialised network with a typical batch."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    title: str


def mlp(*sizes: int) -> nn.Module:
    """A ReLU network."""
    layers = [layer for fan_in, fan_out in pairwise(sizes) for layer in (nn.Linear(fan_in, fan_out), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def timm(name: str) -> nn.Module:
    """A network from timm."""
    import timm  # noqa: PLC0415 - takes seconds

    network: nn.Module = timm.create_model(name)
    return network


def gpt2() -> nn.Module:
    """GPT-2 small."""
    import transformers  # noqa: PLC0415 - takes seconds

    return transformers.GPT2LMHeadModel(transformers.GPT2Config())  # type: ignore[no-any-return]


MODELS = {
    "MLP 0.1M": Model(lambda: mlp(784, 128, 10), lambda: torch.randn(128, 784), "128 images"),
    "MLP 1M": Model(lambda: mlp(784, 700, 700, 10), lambda: torch.randn(128, 784), "128 images"),
    "MLP 10M": Model(lambda: mlp(784, 2700, 2700, 10), lambda: torch.randn(128, 784), "128 images"),
    "ResNet-18, 12M": Model(lambda: timm("resnet18"), lambda: torch.randn(8, 3, 224, 224), "8 images"),
    "ViT-S, 22M": Model(lambda: timm("vit_small_patch16_224"), lambda: torch.randn(8, 3, 224, 224), "8 images"),
    "GPT-2 small, 124M": Model(gpt2, lambda: torch.randint(50257, (1, 512)), "512 tokens"),
    "1M in 2 tensors": Model(lambda: mlp(1000, 1000), lambda: torch.randn(128, 1000), "128 rows"),
    "1M in 32 tensors": Model(lambda: mlp(*[250] * 17), lambda: torch.randn(128, 250), "128 rows"),
    "1M in 200 tensors": Model(lambda: mlp(*[100] * 101), lambda: torch.randn(128, 100), "128 rows"),
}


class Muon:
    """Muon for matrices, fused AdamW for the rest."""

    def __init__(self, model: nn.Module) -> None:
        matrices = [p for p in model.parameters() if p.dim() == 2]  # noqa: PLR2004
        rest = [p for p in model.parameters() if p.dim() != 2]  # noqa: PLR2004
        self.parts = [torch.optim.Muon(matrices), *([torch.optim.AdamW(rest, fused=True)] if rest else [])]
        self.state = {p: s for part in self.parts for p, s in part.state.items()}

    def step(self) -> None:
        """Step both optimizers."""
        for part in self.parts:
            part.step()
        self.state = {p: s for part in self.parts for p, s in part.state.items()}


def schedule_free(model: nn.Module) -> Any:
    """Schedule-free AdamW, in training mode."""
    optimizer = schedulefree.AdamWScheduleFree(model.parameters())
    optimizer.train()
    return optimizer


FUSED, OWN = "AdamW fused", "NFNOptimizer"
OPTIMIZERS: dict[str, Build] = {
    FUSED: lambda m: torch.optim.AdamW(m.parameters(), fused=True),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), foreach=True),
    "Muon": Muon,
    "schedulefree AdamW": schedule_free,
    OWN: lambda m: NFNOptimizer(m, compile=False),
    "NFNOptimizer, compiled": lambda m: NFNOptimizer(m, compile=True),
    "NFNOptimizer adamw": lambda m: NFNOptimizer(m, rule="adamw", compile=False),
    "NFNOptimizer adamw, compiled": lambda m: NFNOptimizer(m, rule="adamw", compile=True),
}


def is_excluded(model: str, optimizer: str) -> bool:
    """Pairs that take minutes, are redundant, or are unfair to Muon: without bfloat16 products in the processor."""
    muon = optimizer == "Muon" and ("GPT" in model or not torch.cpu._is_avx512_bf16_supported())
    return muon or (model.startswith("1M in") and optimizer[:12] != "NFNOptimizer")


def backward(network: nn.Module, batch: Tensor) -> float:
    """One forward and backward pass; returns processor seconds."""
    started = time.thread_time()
    output = network(batch)
    output = output if isinstance(output, Tensor) else output.logits
    torch.autograd.backward(output.float().square().mean())
    return time.thread_time() - started


def take_turn(optimizer: Any) -> float:
    """Take the steps of a turn; returns processor seconds per step."""
    start = time.thread_time()
    for _ in range(TURN):
        optimizer.step()
    return (time.thread_time() - start) / TURN


def ready(model: Model, build: Build) -> tuple[nn.Module, Any, float]:
    """A network with gradients, its optimizer, and the wall-clock seconds of the first steps, compilation included.

    Compilation caches are cleared before.
    """
    inductor.clear()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=CACHE.name)
    torch.manual_seed(0)
    network = model.build()
    optimizer = build(network)
    backward(network, model.batch()[:1])
    started = time.perf_counter()
    for _ in range(WARMUP):
        optimizer.step()
    return network, optimizer, time.perf_counter() - started


def transient(optimizer: Any) -> int:
    """Peak bytes that a step allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        take_turn(optimizer)
    allocated = peak = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def products(optimizer: Any) -> float:
    """Operations in the matrix products of a step."""
    with FlopCounterMode(display=False) as counter:
        take_turn(optimizer)
    return counter.get_total_flops() / TURN


def product_speed(size: int = 1024) -> float:
    """Operations per second of a square product; the best of ten."""
    x, seconds = torch.randn(size, size), []
    for _ in range(10):
        started = time.thread_time()
        x @ x
        seconds.append(time.thread_time() - started)
    return 2.0 * size**3 / min(seconds)


class WrittenElements(TorchDispatchMode):
    """Counts the elements that operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator and count its output elements."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements += sum(
                x.numel() for x in (out if isinstance(out, list | tuple) else [out]) if isinstance(x, Tensor)
            )
        return out


def row(name: str, title: str, repetitions: int, training: float) -> dict[str, Any]:
    """Measure one optimizer on one model, in turns with fused AdamW."""
    model = MODELS[name]
    _, fused, _ = ready(model, OPTIMIZERS[FUSED])
    network, optimizer, first = ready(model, OPTIMIZERS[title])
    times: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(times) < repetitions and (len(times) < 3 or time.perf_counter() - started < MAX_SECONDS):  # noqa: PLR2004
        times.append((take_turn(fused), take_turn(optimizer)))
    weights = sum(p.numel() for p in network.parameters())
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    ratios = [own / other for other, own in times]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "model": name,
        "parameters": weights,
        "tensors": len(list(network.parameters())),
        "optimizer": title,
        "rule": pretrained.digest(RULE),
        "milliseconds": statistics.median(own for _, own in times) * 1e3,
        "fused_milliseconds": statistics.median(other for other, _ in times) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "whole_step": statistics.median((training + own) / (training + other) for other, own in times),
        "training_milliseconds": training * 1e3,
        "first_steps_seconds": first,
        "state_floats_per_parameter": sum(v.numel() * v.itemsize for v in state) / (4 * weights),
        "transient_bytes": (peak := transient(optimizer)),
        "transient_over_parameters": peak / (4 * weights),
        "products_per_parameter": products(optimizer) / weights if title == OWN else None,
    }


def operations() -> float:
    """Elements that an uncompiled step writes, per weight."""
    network, optimizer, _ = ready(MODELS["MLP 1M"], OPTIMIZERS["NFNOptimizer"])
    with WrittenElements() as written:
        take_turn(optimizer)
    return written.elements / TURN / sum(p.numel() for p in network.parameters())


def page(content: dict[str, Any]) -> str:
    """The results as a table with one line per model."""
    by_pair = {(r["model"], r["optimizer"]): r for r in content["steps"]}
    own, compiled = OWN, "NFNOptimizer, compiled"
    shown = [title for title in OPTIMIZERS if title != FUSED]
    lines = [
        f"{content['about']}. Time per step over fused AdamW's, median over adjacent turns.",
        "*Training*: a step with forward and backward pass over the same with fused AdamW, uncompiled and compiled.",
        f"*Memory*: peak allocation in a step, MB, likewise. *First*: time of the first {WARMUP} steps, s, likewise,",
        "compilation included. *Products*: operations in matrix products per weight, and the time that they take at",
        f"the speed of a large product, {content['product_speed'] / 1e9:.0f} billion a second, over fused AdamW's.",
        "Muon is excluded if the processor has no products in bfloat16, in which it computes.",
        "",
        "| model | fused AdamW, ms | " + " | ".join(shown) + " | training | memory | first | products |",
        "|---" * (len(shown) + 6) + "|",
    ]
    measured = {name: model for name, model in MODELS.items() if (name, compiled) in by_pair}
    for name, model in measured.items():
        ratios = [f"{by_pair[name, title]['ratio']:.1f}" if (name, title) in by_pair else "" for title in shown]
        both = [by_pair[name, title] for title in (own, compiled)]
        memory = " ".join(f"{r['transient_bytes'] / 1e6:.0f}" for r in both)
        first = " ".join(f"{r['first_steps_seconds']:.1f}" for r in both)
        each = both[0]["products_per_parameter"]
        alone = each * both[0]["parameters"] / content["product_speed"] * 1e3 / both[0]["fused_milliseconds"]
        lines.append(
            f"| {name}, {model.title} | {both[1]['fused_milliseconds']:.2f} | {' | '.join(ratios)} "
            f"| {both[0]['whole_step']:.2f} {both[1]['whole_step']:.2f} | {memory} | {first} "
            f"| {each:.0f}, {alone:.1f} |"
        )
    if (large := by_pair.get(("MLP 10M", FUSED))) is None:
        return "\n".join(lines)
    adamw_bytes, own_bytes = content["bytes"]["AdamW"], content["bytes"]["NFNOptimizer"]
    bandwidth = adamw_bytes * large["parameters"] / large["milliseconds"] / 1e6
    lines += [
        "",
        f"Fused AdamW moves {adamw_bytes} bytes per weight, here {bandwidth:.0f} GB per second at ten million weights;",
        f"NFNOptimizer has to move {own_bytes:.0f}, so memory traffic bounds it at {own_bytes / adamw_bytes:.1f} times",
        f"fused AdamW. Uncompiled it writes {content['operations']:.0f} numbers per weight to memory.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=[""], help="words in names; others of this rule are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {name: model for name, model in MODELS.items() if any(word in name for word in args.models)}
    path = args.out / "step_cost.json"
    rows = json.loads(path.read_text())["steps"] if path.exists() else []
    others, rule = MODELS.keys() - chosen.keys(), pretrained.digest(RULE)
    rows = [r for r in rows if r["model"] in others and r.get("rule") == rule]
    for name, model in chosen.items():
        network, batch = model.build(), model.batch()
        training = min(backward(network, batch) for _ in range(2))
        del network
        for title in OPTIMIZERS:
            if not is_excluded(name, title):
                rows.append(row(name, title, args.repetitions, training))
                print(rows[-1], flush=True)
                gc.collect()
    content = {"about": setting("torch"), "steps": rows, "bytes": BYTES, "operations": operations()}
    content["product_speed"] = product_speed()
    write(args.out, "step_cost", page(content), content)


if __name__ == "__main__":
    main()
