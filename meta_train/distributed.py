"""Several processes that meta-train one theta; one process is the same with nobody to talk to.

    torchrun --nproc-per-node 4 -m meta_train train RECIPE --out DIR

Work is dealt out by number: of the numbers 0, 1, 2, ... a process takes those that leave its rank when divided by the
number of processes, and `gather` puts what came of them back in order. Whoever sums the results then sums the same
numbers in the same order, however many processes there are, so that theta does not depend on their number.
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
PATIENCE = timedelta(minutes=10)  # for a process that does not answer


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together.

    Args:
        rank: Its number, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What of `items` is this process's work."""
        return items[self.rank :: self.size]

    def gather(self, results: Sequence[T]) -> list[T]:
        """Put the results of all shares back in order, in every process.

        Args:
            results: One for each item of this process's share.
        """
        if self.size == 1:
            return list(results)
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, list(results))
        return [everyone[i % self.size][i // self.size] for i in range(sum(map(len, everyone)))]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        if self.size == 1:
            return flag
        flags: list[Any] = [None] * self.size
        dist.all_gather_object(flags, flag)
        return any(flags)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, if it did; leave them in the end.

    Args:
        device: Where tensors live: gloo connects processes on CPUs, nccl those on GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    store = PrefixStore(f"restart {restarts()}", store)  # which still knows the addresses of processes that died
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Ranks(rank, size)
    finally:
        dist.destroy_process_group()


def own_rank() -> int:
    """This process's number among those that `torchrun` started, also after they have parted."""
    return int(os.environ.get("RANK", "0"))


def restarts() -> int:
    """How often `torchrun --max-restarts` has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
