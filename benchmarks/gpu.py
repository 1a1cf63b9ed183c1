"""What can only be measured on a GPU, in ten minutes: cost, memory and synchronisation of a step, training, capture.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --tiny

    steps       a step over fused AdamW's, in turns of one refresh interval (medians over adjacent turns, CUDA events);
                uncompiled and compiled, parameters in float32 and bfloat16; bytes per weight of the state, and of what
                a turn allocates beside it at the most
    waits       whether a step synchronises: PyTorch's own check, and the calls that a profiler sees, beside those that
                it sees of fused AdamW (it makes some itself)
    training    a GPT on docstrings against AdamW and Muon (AdamW for the rest), each with warm-up and a cosine
    capture     a refresh interval of steps as one CUDA graph, against the same steps taken one by one

The parts divide the time that is left; what does not fit in is skipped, and the result says so (`--parts training
--out FOLDER` gives all of it to one of them). Results are written
after every row, so that a run that is killed keeps what is done. Without a GPU, or with `--tiny`, sizes are tiny: that
shows that the parts run, and measures nothing. Writes `gpu.json` and `gpu.md`.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from result import save, setting, write
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from meta_train.evaluation import losses, rivals
from meta_train.evaluation.gpt import GPT
from meta_train.evaluation.optimizers import REAL_MUON_RATES, REAL_RATES, Learned, Setting, adamw, as_used
from meta_train.evaluation.pretraining import CODES, codes
from nfn_optim import NFNOptimizer, pretrained
from nfn_optim.engine import inductor

TURN = pretrained.load().config.refresh_every  # steps
WARMUP = TURN + 2  # steps, among them some with and some without a refresh
MIN_PAIRS, MAX_PAIRS = 3, 15
MAX_SECONDS = 5.0  # for the turns of one row
PROBE = 10  # steps of a training after which it is known whether it fits in
TAIL = 0.05  # fraction of the steps over whose losses the last one is averaged
CURVE = 20  # points of a loss curve
WATCHED = 60  # steps: the count of skipped steps is looked at every 50
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
NEEDS_GPU = "needs a GPU"
Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """On which device, and how large everything is.

    Args:
        device: The device.
        networks: Width and number of blocks of the networks that are stepped, 8 width^2 weights a block.
        width: Of the GPT; a block has 12 width^2 weights.
        depth: Of the GPT.
        context: Of the GPT, in characters.
        batch: Passages a step.
        steps: Of a training.
        package: Whose docstrings it learns.
    """

    device: torch.device
    networks: dict[str, tuple[int, int]]
    width: int
    depth: int
    context: int
    batch: int
    steps: int
    package: str

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"


NETWORKS = {"1M": (256, 2), "10M": (512, 5), "100M": (1024, 12), "1B": (2048, 30)}
FULL = Setup(torch.device("cuda"), NETWORKS, 512, 10, 256, 32, 2000, "torch")
TINY = Setup(torch.device("cpu"), {"1k": (8, 2), "4k": (16, 2)}, 16, 1, 16, 4, 20, "torch")


def synchronize(setup: Setup) -> None:
    """Wait for the device."""
    if setup.on_gpu:
        torch.cuda.synchronize()


def milliseconds(setup: Setup, run: Callable[[], object]) -> float:
    """The time that a function takes on the device."""
    synchronize(setup)
    if not setup.on_gpu:
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def collect(setup: Setup) -> None:
    """Return the memory of what is no longer used to the device."""
    gc.collect()
    if setup.on_gpu:
        torch.cuda.empty_cache()


def message(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# ----------------------------------------------------------------------------------------------------------- a step


def fused(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that all are compared with."""
    return torch.optim.AdamW(model.parameters(), fused=True)


def ready(
    setup: Setup, size: tuple[int, int], dtype: torch.dtype, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A ReLU network with random gradients, and its optimizer after the first steps."""
    torch.manual_seed(0)
    width, blocks = size
    layers = [(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)) for _ in range(blocks)]
    model = nn.Sequential(*(part for layer in layers for part in layer)).to(setup.device, dtype)
    optimizer = make(model)
    model(torch.randn(8, width, dtype=dtype, device=setup.device)).float().square().mean().backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad.normal_(std=1e-3)
    take(optimizer, WARMUP)
    return model, optimizer


def take(optimizer: torch.optim.Optimizer, steps: int = TURN) -> None:
    """Take some steps."""
    for _ in range(steps):
        optimizer.step()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The size of the state."""
    entries = (value for state in optimizer.state_dict()["state"].values() for value in state.values())
    return sum(value.numel() * value.itemsize for value in entries if isinstance(value, Tensor))


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that a function allocates at once."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def step_row(setup: Setup, size: tuple[int, int], dtype: torch.dtype, compiled: bool) -> Row:
    """Measure steps of one network, in turns with fused AdamW."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, own = ready(setup, size, dtype, lambda model: NFNOptimizer(model, compile=compiled))
    if compiled and inductor.has_failed():
        return {"failed": next((str(w.message)[:300] for w in caught if "compiled" in str(w.message)), "not compiled")}
    _, other = ready(setup, size, dtype, fused)
    pairs: list[tuple[float, float]] = []
    started = time.monotonic()
    while len(pairs) < MAX_PAIRS and (len(pairs) < MIN_PAIRS or time.monotonic() - started < MAX_SECONDS):
        pairs.append((milliseconds(setup, lambda: take(own)) / TURN, milliseconds(setup, lambda: take(other)) / TURN))
    weights = sum(p.numel() for p in model.parameters())
    return {
        "milliseconds": statistics.median(mine for mine, _ in pairs),
        "adamw_milliseconds": statistics.median(its for _, its in pairs),
        "ratio": statistics.median(mine / its for mine, its in pairs),
        "pairs": len(pairs),
        "state_bytes": state_bytes(own) / weights,
        "adamw_state_bytes": state_bytes(other) / weights,
        "transient_bytes": peak_bytes(lambda: take(own)) / weights if setup.on_gpu else NEEDS_GPU,
    }


def kinds(names: Sequence[str]) -> list[tuple[str, torch.dtype, bool]]:
    """Networks, dtypes and whether steps are compiled, the most important first.

    Whole steps of the smallest network are compiled, which takes minutes.
    """
    precise, half = torch.float32, torch.bfloat16
    smallest, *middle, largest = names
    order = [(name, dtype, False) for name in (smallest, *middle) for dtype in (precise, half)]
    order += [(name, precise, True) for name in middle]
    order += [(largest, dtype, compiled) for dtype in (precise, half) for compiled in (False, True)]
    return order + [(name, half, True) for name in middle] + [(smallest, dtype, True) for dtype in (precise, half)]


def steps(setup: Setup, deadline: float) -> Iterator[Row]:
    """The part of that name: all `kinds`."""
    speed: dict[tuple[torch.dtype, bool], float] = {}  # milliseconds a weight of the last network
    for name, dtype, compiled in kinds(list(setup.networks)):
        size = setup.networks[name]
        row = {"weights": name, "dtype": str(dtype).removeprefix("torch."), "compiled": compiled}
        weights = 8 * size[0] ** 2 * size[1]
        needed = speed.get((dtype, compiled), 0.0) * weights * (2 * WARMUP + MIN_PAIRS * TURN) / 1e3
        left = deadline - time.monotonic()
        if compiled and not setup.on_gpu:
            yield row | {"skipped": f"{NEEDS_GPU}; step_cost.py measures CPUs"}
        elif needed >= left:
            yield row | {"skipped": f"needs {needed:.0f} s, {left:.0f} s left"}
        else:
            try:
                row |= step_row(setup, size, dtype, compiled)
                speed[dtype, compiled] = row.get("milliseconds", 0.0) / weights
            except Exception as error:  # out of memory, or what compilation raises
                row |= {"failed": message(error)}
            collect(setup)
            yield row


# ------------------------------------------------------------------------------------------------- synchronisation


def waits_in(events: Iterable[str]) -> dict[str, int]:
    """How often each kind of call that waits for the device is among the names of a profiler's events."""
    return dict(Counter(kind for name in events for kind in WAITS if name.startswith(kind)))


def waits(setup: Setup, deadline: float) -> Iterator[Row]:
    """The part of that name: a refresh interval of steps of the second network."""
    size = [*setup.networks.values()][1]
    for title, make in (("NFNOptimizer", lambda model: NFNOptimizer(model, compile=False)), ("AdamW fused", fused)):
        if not setup.on_gpu or time.monotonic() >= deadline:
            yield {"optimizer": title, "skipped": "no time left" if setup.on_gpu else NEEDS_GPU}
            continue
        _, optimizer = ready(setup, size, torch.float32, make)
        synchronize(setup)
        torch.cuda.set_sync_debug_mode("error")
        try:
            take(optimizer, WATCHED)
            found = "none"
        except RuntimeError as error:
            found = message(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
            take(optimizer)
        yield {"optimizer": title, "found": found, "calls": waits_in(event.name for event in record.events())}


# -------------------------------------------------------------------------------------------------------- training


def contenders() -> dict[str, Setting]:
    """Optimizers by title, the most important first."""

    def others(title: str, make: Any, rates: Iterable[float]) -> dict[str, Setting]:
        return {f"{title}, {s}": s for s in as_used(make, rates)}

    (low, *middle, high), (muon_low, *muon_middle, muon_high) = REAL_RATES, REAL_MUON_RATES
    own, known = Setting(Learned("default")), Setting(Learned("default"), horizon_known=True)
    found = {"NFNOptimizer": own} | others("AdamW", adamw, (*middle, low, high))
    found |= others("Muon", rivals.muon, muon_middle) | {"NFNOptimizer, horizon known": known}
    return found | others("Muon", rivals.muon, (muon_low, muon_high))


def train(setup: Setup, configured: Setting, deadline: float) -> Row:
    """Train the GPT; given up after `PROBE` steps if it does not fit in, stopped where it takes longer after all."""
    torch.manual_seed(0)
    device = setup.device
    model = GPT(CODES, setup.context, setup.width, setup.depth).to(device)
    with device:  # where the model and the loss make tensors of their own
        training = losses.language(model, codes(setup.package).to(device), setup.context, setup.batch)
    optimizers = configured.optimizers(model, setup.steps)
    schedules = [s for o in optimizers if (s := configured.schedule(o, setup.steps)) is not None]
    batches, found = torch.Generator(device).manual_seed(0), []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=setup.on_gpu)
    started = time.monotonic()
    for step in range(setup.steps):
        with device, autocast:
            loss = training.loss(batches)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for part in (*optimizers, *schedules):
            part.step()
        found.append(loss.detach())
        if step == 0:
            synchronize(setup)
            started = time.monotonic()
        if step == PROBE:
            synchronize(setup)
            needed = (time.monotonic() - started) / PROBE * (setup.steps - step)
            if needed > deadline - time.monotonic():
                return {"skipped": f"needs {needed:.0f} s, {deadline - time.monotonic():.0f} s left"}
        if time.monotonic() > deadline:
            break
    synchronize(setup)
    seconds, curve = time.monotonic() - started, torch.stack(found).float()
    with torch.no_grad(), device, autocast:
        held_out = training.held_out()["loss"]
    own = [o.symmetry for o in optimizers if isinstance(o, NFNOptimizer) and o.symmetry is not None]
    stopped = {} if len(found) == setup.steps else {"skipped": f"no time left after {len(found)} steps"}
    return stopped | {
        "weights": sum(p.numel() for p in model.parameters()),
        "steps": len(found),
        "loss": curve[-math.ceil(TAIL * setup.steps) :].mean().item(),
        "held_out": held_out,
        "milliseconds": 1e3 * seconds / max(len(found) - 1, 1),
        "curve": [part.mean().item() for part in curve.tensor_split(min(CURVE, len(curve)))],
        "free_axes": sum(len(symmetry.free) for symmetry in own),
    }


def training(setup: Setup, deadline: float) -> Iterator[Row]:
    """The part of that name."""
    for title, configured in contenders().items():
        row = {"optimizer": title}
        if time.monotonic() >= deadline:
            row |= {"skipped": "no time left"}
        else:
            try:
                row |= train(setup, configured, deadline)
            except Exception as error:  # one optimizer that fails leaves the others
                row |= {"failed": message(error)}
            collect(setup)
        yield row


# --------------------------------------------------------------------------------------------------------- capture


def capture(setup: Setup, deadline: float) -> Iterator[Row]:
    """The part of that name. It is the last one, since a failed capture may leave the device unusable."""
    if not setup.on_gpu or time.monotonic() >= deadline:
        yield {"skipped": "no time left" if setup.on_gpu else NEEDS_GPU}
        return
    size = [*setup.networks.values()][1]
    nets = [ready(setup, size, torch.float32, lambda m: NFNOptimizer(m, compile=False)) for _ in range(2)]
    (model, captured), (twin, one_by_one) = nets
    before = [p.detach().clone() for p in twin.parameters()]
    take(captured, -WARMUP % TURN + TURN)  # an interval begins with a refresh
    take(one_by_one, -WARMUP % TURN + TURN)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            take(captured)
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # whatever does not allow capture
        yield {"failed": f"not supported: {message(error)}"}
        return
    take(one_by_one)
    both = zip(model.parameters(), twin.parameters(), before, strict=True)
    errors = [((p - q).norm() / (q - old).norm()).item() for p, q, old in both]
    times = [
        [milliseconds(setup, run) / TURN for _ in range(MIN_PAIRS)] for run in (graph.replay, partial(take, one_by_one))
    ]
    replayed, eager = (statistics.median(x) for x in times)
    yield {"milliseconds": replayed, "eager_milliseconds": eager, "relative_error": max(errors)}


# ---------------------------------------------------------------------------------------------------------- result

PARTS: dict[str, tuple[Callable[[Setup, float], Iterator[Row]], float]] = {  # and seconds, if all of them run
    "steps": (steps, 190),
    "waits": (waits, 15),
    "training": (training, 330),
    "capture": (capture, 15),
}


def run(names: Sequence[str], setup: Setup, seconds: float, keep: Callable[[dict[str, list[Row]]], None]) -> None:
    """Run some parts one after the other.

    Args:
        names: Keys of `PARTS`.
        setup: Of everything.
        seconds: For all of them.
        keep: Called with the rows of all parts so far, after every row.
    """
    end = time.monotonic() + seconds
    rows: dict[str, list[Row]] = {}
    for k, name in enumerate(names):
        part, share = PARTS[name]
        now = time.monotonic()
        rows[name] = []
        try:
            for row in part(setup, now + max(end - now, 0.0) * share / sum(PARTS[n][1] for n in names[k:])):
                rows[name].append(row)
                print(name, row, flush=True)
                keep(rows)
        except Exception as error:  # the parts after it are run
            rows[name].append({"failed": message(error)})
            keep(rows)


def page(content: dict[str, Any]) -> str:
    """The results as tables, one for each part."""
    rule = f"The rule `{pretrained.DEFAULT}`, steps in turns of {TURN}."
    tiny = " Tiny sizes, which show that it runs and measure nothing." if content["tiny"] else ""
    columns = {
        "steps": "weights dtype compiled adamw_milliseconds milliseconds ratio adamw_state_bytes state_bytes "
        "transient_bytes",
        "waits": "optimizer found calls",
        "training": "optimizer weights steps loss held_out milliseconds free_axes",
        "capture": "milliseconds eager_milliseconds relative_error",
    }
    lines = [f"{content['about']}. {rule}{tiny} Bytes are per weight."]
    for name, rows in content["parts"].items():
        keys = columns[name].split()
        titles = " | ".join(key.replace("_", " ") for key in keys)
        lines += ["", f"| {titles} | |", "|---" * (len(keys) + 1) + "|"]
        for row in rows:
            shown = (row.get(key, "") for key in keys)
            cells = " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in shown)
            lines.append(f"| {cells} | {row.get('skipped', row.get('failed', ''))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    tiny = args.tiny or not torch.cuda.is_available()
    setup = TINY if tiny else FULL
    where = torch.cuda.get_device_name() if setup.on_gpu else "CPU"
    content: dict[str, Any] = {"about": f"{setting('torch')}, {where}", "tiny": tiny, "parts": {}}

    def keep(parts: dict[str, list[Row]]) -> None:
        content["parts"] = parts
        save(args.out, "gpu", page(content), content)

    torch.set_num_threads(1)
    run(args.parts, setup, 60 * args.minutes, keep)
    write(args.out, "gpu", page(content), content)


if __name__ == "__main__":
    main()
