"""What a step costs: time over fused AdamW, persistent and transient memory, and how far that is from what must be.

    python benchmarks/step_cost.py

Every optimizer takes turns with fused AdamW on a model of its own, on one thread, so that a slow moment of the machine
hits both; a ratio is the median of the ratios of turns beside each other. A turn is as many steps as lie between two
talks of the neurons of the shipped rule, so that dear and cheap steps count as often as they occur. Times are of the
processor, which others on the machine disturb less than the clock. Transient memory is the most that a step allocates
above what there was before, counted by the profiler; persistent memory is the optimizer's state. The whole step is one
of training: forward and backward pass at the batch given, and the optimizer.

    bytes        that must move for each weight: every array read or written in every pass, and the check of gradients
    operations   for each weight: elements that PyTorch's operators write in an uncompiled step, over the weights

Muon takes matrices and fused AdamW the rest. Writes `step_cost.json` and `step_cost.md`; takes some eight minutes.
"""

from __future__ import annotations

import argparse
import gc
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

from nfn_optim import NFNOptimizer, pretrained
from nfn_optim.engine import inductor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import torchvision_ops

torchvision_ops.declare()
Build = Callable[[nn.Module], Any]
PATIENCE = 10.0  # seconds for the turns of one pair
TURN = pretrained.load().config.talk_every  # steps
FIRST = TURN + 2  # steps after which there was one at which neurons talk and one at which they do not
CACHE = tempfile.TemporaryDirectory()
BYTES = {
    "AdamW": 28,  # p g m v read, p m v written
    # g; g m v; p g m v M and again g m v, where neurons talk; p g m v M, and p m v M written
    "NFNOptimizer": 4 + 12 + 32 / TURN + 20 + 16,
}


@dataclass(frozen=True)
class Model:
    """A network, randomly initialised, and a usual batch."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    title: str


def mlp(*sizes: int) -> nn.Module:
    """A ReLU network."""
    layers = [layer for fan_in, fan_out in pairwise(sizes) for layer in (nn.Linear(fan_in, fan_out), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def timm(name: str) -> nn.Module:
    """A network of timm."""
    import timm  # noqa: PLC0415 - takes seconds

    found: nn.Module = timm.create_model(name)
    return found


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
        """Take both steps."""
        for part in self.parts:
            part.step()
        self.state = {p: s for part in self.parts for p, s in part.state.items()}


def schedule_free(model: nn.Module) -> Any:
    """AdamW of schedulefree, in training mode."""
    optimizer = schedulefree.AdamWScheduleFree(model.parameters())
    optimizer.train()
    return optimizer


FUSED = "AdamW fused"
OPTIMIZERS: dict[str, Build] = {
    FUSED: lambda m: torch.optim.AdamW(m.parameters(), fused=True),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), foreach=True),
    "Muon": Muon,
    "schedulefree AdamW": schedule_free,
    "NFNOptimizer": lambda m: NFNOptimizer(m, compile=False),
    "NFNOptimizer, compiled": lambda m: NFNOptimizer(m, compile=True),
    "NFNOptimizer adamw": lambda m: NFNOptimizer(m, rule="adamw", compile=False),
    "NFNOptimizer adamw, compiled": lambda m: NFNOptimizer(m, rule="adamw", compile=True),
}


def left_out(model: str, optimizer: str) -> bool:
    """What would take minutes, says nothing, or nothing fair: Muon where the processor has no products in bfloat16."""
    muon = optimizer == "Muon" and ("GPT" in model or not torch.cpu._is_avx512_bf16_supported())
    return muon or (model.startswith("1M in") and optimizer[:12] != "NFNOptimizer")


def backward(network: nn.Module, batch: Tensor) -> float:
    """Forward and backward pass; processor seconds."""
    begun = time.thread_time()
    output = network(batch)
    output = output if isinstance(output, Tensor) else output.logits
    torch.autograd.backward(output.float().square().mean())
    return time.thread_time() - begun


def take_turn(optimizer: Any) -> float:
    """The steps of a turn; processor seconds of one of them on average."""
    start = time.thread_time()
    for _ in range(TURN):
        optimizer.step()
    return (time.thread_time() - start) / TURN


def ready(model: Model, build: Build) -> tuple[nn.Module, Any, float]:
    """A network with gradients, its optimizer, and the seconds that the first steps of every kind took by the clock.

    Whatever is compiled is compiled anew.
    """
    inductor.forget()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=CACHE.name)
    torch.manual_seed(0)
    network = model.build()
    optimizer = build(network)
    backward(network, model.batch()[:1])
    begun = time.perf_counter()
    for _ in range(FIRST):
        optimizer.step()
    return network, optimizer, time.perf_counter() - begun


def transient(optimizer: Any) -> int:
    """Most bytes that a step holds above what there was before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        take_turn(optimizer)
    now = most = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


class Written(TorchDispatchMode):
    """Counts the elements that operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call and count."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements += sum(
                x.numel() for x in (out if isinstance(out, list | tuple) else [out]) if isinstance(x, Tensor)
            )
        return out


def row(name: str, title: str, repetitions: int, training: float) -> dict[str, Any]:
    """Measure one optimizer on one model, beside fused AdamW."""
    model = MODELS[name]
    _, fused, _ = ready(model, OPTIMIZERS[FUSED])
    network, optimizer, first = ready(model, OPTIMIZERS[title])
    times: list[tuple[float, float]] = []
    begun = time.perf_counter()
    while len(times) < repetitions and (len(times) < 3 or time.perf_counter() - begun < PATIENCE):  # noqa: PLR2004
        times.append((take_turn(fused), take_turn(optimizer)))
    floats = sum(p.numel() for p in network.parameters())
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    ratios = [own / other for other, own in times]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "model": name,
        "parameters": floats,
        "tensors": len(list(network.parameters())),
        "optimizer": title,
        "milliseconds": statistics.median(own for _, own in times) * 1e3,
        "fused_milliseconds": statistics.median(other for other, _ in times) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "whole_step": statistics.median((training + own) / (training + other) for other, own in times),
        "training_milliseconds": training * 1e3,
        "first_steps_seconds": first,
        "state_floats_per_parameter": sum(v.numel() * v.itemsize for v in state) / (4 * floats),
        "transient_bytes": (held := transient(optimizer)),
        "transient_over_parameters": held / (4 * floats),
    }


def operations() -> float:
    """Elements that a step writes uncompiled, for each weight."""
    network, optimizer, _ = ready(MODELS["MLP 1M"], OPTIMIZERS["NFNOptimizer"])
    with Written() as written:
        take_turn(optimizer)
    return written.elements / TURN / sum(p.numel() for p in network.parameters())


def page(content: dict[str, Any]) -> str:
    """The results as a table with a line for every model."""
    found = {(r["model"], r["optimizer"]): r for r in content["steps"]}
    own, compiled = "NFNOptimizer", "NFNOptimizer, compiled"
    shown = [title for title in OPTIMIZERS if title != FUSED]
    lines = [
        f"{content['about']}. Time of a step over fused AdamW's, median of turns beside each",
        "other. *Training*: a step with forward and backward pass over the same with fused AdamW, uncompiled and",
        "compiled. *Memory*: the most that a step allocates, MB, likewise. *First*: what the first "
        f"{FIRST} steps take, s, likewise, nothing being compiled yet. Muon is left out where the processor has no",
        "products in bfloat16, in which it computes.",
        "",
        "| model | fused AdamW, ms | " + " | ".join(shown) + " | training | memory | first |",
        "|---" * (len(shown) + 5) + "|",
    ]
    for name, model in MODELS.items():
        ratios = [f"{found[name, title]['ratio']:.1f}" if (name, title) in found else "" for title in shown]
        both = [found[name, title] for title in (own, compiled)]
        memory = " ".join(f"{r['transient_bytes'] / 1e6:.0f}" for r in both)
        first = " ".join(f"{r['first_steps_seconds']:.1f}" for r in both)
        lines.append(
            f"| {name}, {model.title} | {both[1]['fused_milliseconds']:.2f} | {' | '.join(ratios)} "
            f"| {both[0]['whole_step']:.2f} {both[1]['whole_step']:.2f} | {memory} | {first} |"
        )
    moved, least = content["bytes"]["AdamW"], content["bytes"]["NFNOptimizer"]
    large = found["MLP 10M", FUSED]
    speed = moved * large["parameters"] / large["milliseconds"] / 1e6
    lines += [
        "",
        f"Fused AdamW moves {moved} bytes a weight, here {speed:.0f} GB a second at ten million weights; NFNOptimizer",
        f"has to move {least:.0f}, so {least / moved:.1f} times fused AdamW is the floor set by memory. Uncompiled it",
        f"computes {content['operations']:.0f} numbers a weight, each written to memory.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repetitions", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, model in MODELS.items():
        network, batch = model.build(), model.batch()
        training = min(backward(network, batch) for _ in range(2))
        del network
        for title in OPTIMIZERS:
            if not left_out(name, title):
                rows.append(row(name, title, given.repetitions, training))
                print(rows[-1], flush=True)
                gc.collect()
    content = {"about": setting("torch"), "steps": rows, "bytes": BYTES, "operations": operations()}
    write(given.out, "step_cost", page(content), content)


if __name__ == "__main__":
    main()
