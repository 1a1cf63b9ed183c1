"""The work of each rank in the tests of distributed training: train on its slice of digits and return the results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from digits import axes_of, batches, network
from ranks import WORLD
from rules import random_rule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nfn_optim import NFNOptimizer
from nfn_optim.engine.moments import MOMENTS
from nfn_optim.engine.sharding import local
from nfn_optim.optimizer.state import entries_of

STEPS = 20
Outcome = dict[str, Any]


class CollectiveCounter(TorchDispatchMode):
    """Counts how many numbers each collective call sends."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        if "c10d" in func.namespace and "wait" not in func.__name__:
            self.sent.append(sum(leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))
        return func(*args, **(kwargs or {}))


def slice_of(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """This rank's slice of a batch."""
    images, classes = (part[dist.get_rank() :: WORLD] for part in batch)
    return images, classes


def train(model: nn.Module, optimizer: Any, first: int = 0, last: int = STEPS, divide: bool = True) -> list[float]:
    """One step per batch, on this rank's slice or on all of it; returns the mean loss over ranks before each step."""
    losses = []
    for batch in batches(STEPS)[first:last]:
        images, classes = slice_of(batch) if divide else batch
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(mean.item() / WORLD)
    return losses


def whole(tensor: Tensor) -> Tensor:
    """A parameter as a plain tensor."""
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def outcome(model: nn.Module, optimizer: NFNOptimizer, losses: list[float]) -> Outcome:
    """The results for the tests."""
    return {
        "losses": losses,
        "params": [whole(p) for p in model.parameters()],
        "axes": axes_of(optimizer),
        "fallbacks": optimizer.fallbacks,
    }


def sharded(hidden: int, **options: Any) -> nn.Sequential:
    """The network in FSDP2, each layer a unit of its own."""
    from torch.distributed.fsdp import fully_shard

    model = network(hidden)
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


# ------------------------------------------------------------------------------------------------- run by every rank


def data_parallel() -> Outcome:
    """DistributedDataParallel."""
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = NFNOptimizer(model.parameters())
    return outcome(model, optimizer, train(model, optimizer))


def fully_sharded(hidden: int, **config: Any) -> Outcome:
    """FSDP2, and the numbers that an optimizer step sends."""
    model = sharded(hidden)
    optimizer = NFNOptimizer(model.parameters(), rule=random_rule(0.1, **config) if config else "default")
    found = outcome(model, optimizer, train(model, optimizer))
    with CollectiveCounter() as counter:
        optimizer.step()
    return {**found, "sent": counter.sent}


def sent_and_held(sizes: Sequence[int], steps: Sequence[int]) -> Outcome:
    """FSDP2 of linear layers: what steps send, the peak bytes that they allocate, and the numbers in the state.

    Args:
        sizes: Of the layers.
        steps: Numbers of steps; those between are left out.
    """
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(given, made) for given, made in pairwise(sizes)))
    fully_shard(model)
    optimizer = NFNOptimizer(model.parameters())
    found: Outcome = {"sent": [], "held": []}
    for step in steps:
        optimizer.param_groups[0]["steps_taken"] = step
        model(torch.randn(8, sizes[0])).square().mean().backward()
        with CollectiveCounter() as counter, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            optimizer.step()
        found["sent"].append(counter.sent)
        found["held"].append(peak_bytes(record))
    entries = [value for state in optimizer.state.values() for value in entries_of(state).values()]
    return {**found, "state": sum(local(value).numel() for value in entries)}


def peak_bytes(record: Any) -> int:
    """The most bytes that were allocated at once, of those allocated while a profiler watched."""
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


class Gate(nn.Module):
    """A hidden layer whose values and gates are projected by one tensor."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 2 * hidden), nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        value, gate = self.up(images).chunk(2, -1)
        classes: Tensor = self.down(value * gate.sigmoid())
        return classes


def fused() -> Outcome:
    """FSDP2 of a network with a tensor that holds two matrices, the rows of each on both ranks or on one."""
    from torch.distributed.fsdp import fully_shard

    model = Gate(6)
    fully_shard(model)
    optimizer = NFNOptimizer(model.parameters())
    return outcome(model, optimizer, train(model, optimizer))


def trained_gate() -> Gate:
    """A network whose weights look as if they had been trained."""
    model = Gate(6)
    with torch.no_grad():
        for p in (model.up.weight, model.down.weight):
            p.add_(torch.outer(torch.linspace(-1, 1, p.shape[0]), torch.linspace(1, 2, p.shape[1]).cos()))
    return model


def first_step_sizes(model: nn.Module) -> list[float]:
    """The logarithms of step sizes of all matrices and vectors after the first step."""
    optimizer = NFNOptimizer(model)
    images, classes = batches(1)[0]
    F.cross_entropy(model(images), classes).backward()
    optimizer.step()
    return [x for p in model.parameters() for x in optimizer.state[p]["log_step_size"].flatten().tolist()]


def fully_sharded_and_trained_before() -> list[float]:
    """FSDP2 of that network."""
    from torch.distributed.fsdp import fully_shard

    model = trained_gate()
    fully_shard(model)
    return first_step_sizes(model)


def mixed_precision() -> Outcome:
    """FSDP2 that computes in bfloat16: parameters and state are float32, inputs of the modules are not."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = sharded(8, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = NFNOptimizer(model.parameters())
    return outcome(model, optimizer, train(model, optimizer))


def flattened(use_orig_params: bool) -> Outcome:
    """FSDP1, which divides parameters into flat shards, and the warnings about it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    optimizer = NFNOptimizer(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = train(model, optimizer)
    return {"losses": losses, "axes": axes_of(optimizer), "warnings": [str(warning.message) for warning in caught]}


def tensor_parallel() -> Outcome:
    """Rows of the first layer and columns of the second divided; every rank sees the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, mesh = network(8), init_device_mesh("cpu", (WORLD,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = NFNOptimizer(model.parameters())
    return outcome(model, optimizer, train(model, optimizer, divide=False))


def given_gradients(how: str) -> dict[str, Tensor]:
    """Moments in bfloat16 after some steps on gradients that are the same everywhere; FSDP2, DDP or neither."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    model: nn.Module = sharded(7) if how == "FSDP2" else network(7)
    model = nn.parallel.DistributedDataParallel(model) if how == "DDP" else model
    optimizer = NFNOptimizer(model.parameters(), state_dtype=torch.bfloat16)
    model(batches(1)[0][0])
    for step in range(5):
        for p, g in zip(model.parameters(), gradients(step), strict=True):
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        optimizer.step()
    names = [(name.removeprefix("module."), p) for name, p in model.named_parameters()]
    return {f"{name} {key}": whole(optimizer.state[p][key]) for name, p in names for key in MOMENTS}


def gradients(step: int) -> list[Tensor]:
    """Random gradients for `network(7)`."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in network(7).parameters()]


def poisoned() -> Outcome:
    """FSDP2, with a gradient that is not finite on one rank only."""
    from torch.distributed.tensor import DTensor

    model = sharded(8)
    optimizer = NFNOptimizer(model.parameters())
    train(model, optimizer, last=2)
    before = [whole(p) for p in model.parameters()]
    grad = model[0].weight.grad
    assert isinstance(grad, DTensor)
    if dist.get_rank() == 1:
        grad.to_local()[0, 0] = torch.nan
    optimizer.step()
    unchanged = all(torch.equal(whole(p), old) for p, old in zip(model.parameters(), before, strict=True))
    return {"skipped": optimizer.skipped_steps, "kept": unchanged}


def sharded_checkpoint() -> Outcome:
    """FSDP2, saved whole and loaded into new shards by torch.distributed.checkpoint."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)

    def start() -> tuple[nn.Module, NFNOptimizer]:
        model = sharded(7)
        return model, NFNOptimizer(model.parameters())

    model, optimizer = start()
    train(model, optimizer, last=STEPS // 2)
    weights = copy.deepcopy(get_model_state_dict(model, options=options))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    losses = train(model, optimizer, STEPS // 2)
    again, resumed = start()
    set_model_state_dict(again, dict(weights), options=options)
    set_optimizer_state_dict(again, resumed, copy.deepcopy(saved), options=options)
    found = outcome(again, resumed, train(again, resumed, STEPS // 2))
    return {**found, "uninterrupted": losses, "weights": weights, "saved": saved}


def zero_redundancy() -> Outcome:
    """ZeroRedundancyOptimizer, which steps a part of the parameters on each rank; saved and resumed."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def start() -> tuple[nn.Module, ZeroRedundancyOptimizer]:
        model = nn.parallel.DistributedDataParallel(network())
        return model, ZeroRedundancyOptimizer(model.parameters(), NFNOptimizer, lr=1e-3)

    model, optimizer = start()
    first = train(model, optimizer, last=STEPS // 2)
    optimizer.consolidate_state_dict(to=0)
    saved = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    weights = copy.deepcopy(model.state_dict())
    losses = train(model, optimizer, STEPS // 2)
    again, resumed = start()
    again.load_state_dict(weights)
    assert saved[0] is not None
    resumed.load_state_dict(saved[0])
    mine = resumed.optim
    assert isinstance(mine, NFNOptimizer)
    return {**outcome(again, mine, train(again, resumed, STEPS // 2)), "first": first, "uninterrupted": losses}
