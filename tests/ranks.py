"""Two processes with a gloo group between them, to run distributed code in.

They are started once and kept, since importing torch takes longer than any of these tests. What they run must be a
function of an importable module; what it returns comes back pickled. A rank that raises or hangs fails the test, and
both are then started anew.
"""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2
COMPILE_AFTER = 60.0  # seconds that a function may take


class Ranks:
    """Runs functions on `WORLD` processes at once."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._ends: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns on every rank.

        Raises:
            RuntimeError: It raised; the message has the rank's traceback.
            TimeoutError: It did not come back.
        """
        if not self._processes:
            self._start()
        done = False
        try:
            for end in self._ends:
                end.send_bytes(pickle.dumps((function, args)))
            answers: dict[int, Any] = {}
            while len(answers) < WORLD:
                answers |= self._receive([rank for rank in range(WORLD) if rank not in answers])
            done = True
        finally:
            if not done:
                self.close()
        return [answers[rank] for rank in range(WORLD)]

    def close(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for end in self._ends:
            end.close()
        self._processes, self._ends = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(rendezvous), there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._ends.append(here)

    def _receive(self, missing: list[int]) -> dict[int, Any]:
        """Whatever answers come first, by rank: of two ranks one raises and the other hangs."""
        ready = wait([self._ends[rank] for rank in missing], COMPILE_AFTER)
        if not ready:
            raise TimeoutError(f"ranks {missing} hang")
        answers = {}
        for rank in missing:
            if self._ends[rank] in ready:
                error, answers[rank] = pickle.loads(self._ends[rank].recv_bytes())
                if error:
                    raise RuntimeError(f"rank {rank} failed:\n{error}")
        return answers


def _serve(rank: int, rendezvous: str, end: Connection) -> None:
    """Run what comes, until the other end is closed."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # torch's own: ZeroRedundancyOptimizer's package compiles TorchScript when it is imported
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
    timeout = datetime.timedelta(seconds=COMPILE_AFTER / 2)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD, timeout=timeout)
    while True:
        try:
            function, args = pickle.loads(end.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps((None, function(*args)))
        except Exception:  # whatever it is, the test that asked shows it
            answer = pickle.dumps((traceback.format_exc(), None))
        end.send_bytes(answer)
