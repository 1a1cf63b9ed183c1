"""Meta-training of one theta by several processes.

    torchrun --nproc-per-node 4 -m meta_train train RECIPE --out DIR

Work items are assigned by index: a process takes those whose index modulo the number of processes is its rank, and
`gather` restores the order of the results. Sums over them then have the same terms in the same order for any number of
processes, so that theta does not depend on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # of collective operations


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes.

    Args:
        rank: From 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def slice_of(self, items: Sequence[T]) -> Sequence[T]:
        """The items assigned to this process."""
        return items[self.rank :: self.size]

    def gather(self, results: Sequence[T]) -> list[T]:
        """The results of all processes in the order of the items, in every process.

        Args:
            results: One for each item of this process's slice.
        """
        if self.size == 1:
            return list(results)
        slices: list[Any] = [None] * self.size
        dist.all_gather_object(slices, list(results))
        return [slices[i % self.size][i // self.size] for i in range(sum(map(len, slices)))]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        flags: list[Any] = [None] * self.size
        dist.all_gather_object(flags, flag)
        return any(flags)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


SINGLE_PROCESS = Ranks()


@contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """Initialise the process group if `torchrun` started this process, and destroy it at exit.

    Args:
        device: Device of the tensors; the backend is gloo on CPUs and nccl on GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE_PROCESS
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    store = PrefixStore(f"restart {restart_count()}", store)  # it still has the addresses of dead processes
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Ranks(rank, size)
    finally:
        dist.destroy_process_group()


def own_rank() -> int:
    """The rank of this process, also without a process group."""
    return int(os.environ.get("RANK", "0"))


def restart_count() -> int:
    """How often `torchrun --max-restarts` has restarted the processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
