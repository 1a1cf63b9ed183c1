"""Compiling in another process while training goes on uncompiled.

    submit(calls) -> Job    queue calls; one line on the log
    a thread                hands them to a process one after the other, and loads the functions that it has saved
    adopt(step)             at the beginning of a step: once no job is open any more, the graphs of all are used;
                            one line on the log that names the step

Tracing and lowering are tens of seconds of Python. In a thread they would slow training two- or threefold and share
the compiler's global state with a training that compiles its own functions; loading a function takes a tenth of a
second. Calls are pickled: one that cannot be, or whose parts cannot be imported elsewhere, is not compiled.

The process (`nfn_optim.engine.compile_process`) ends with this one, however that ends.
"""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from multiprocessing.connection import Pipe
from threading import Lock, Thread

import torch

from nfn_optim.engine.compile_process import path_in
from nfn_optim.engine.inductor import Call, Graph, fail, load, load_deprecated

LOG = logging.getLogger(__name__)
COMMAND = """
import sys
connection, client, folder, *sys.path = sys.argv[1:]
import nfn_optim.engine.compile_process as process
process.serve(int(connection), int(client), folder)
"""
REMEDY = "pass compile=True to compile in this process, before the first step"
SECONDS_TO_LOAD = 10.0  # a function: the end of the interpreter waits so long


def is_possible(device: torch.device) -> bool:
    """Whether steps on a device can be compiled in the background.

    Which step is the first compiled one depends on time. So processes that train together, whose replicas would differ
    by rounding, and those that want deterministic algorithms compile in the foreground.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    startable = os.name == "posix" and bool(sys.executable) and not getattr(sys, "frozen", False)
    return device.type == "cpu" and startable and not together and not torch.are_deterministic_algorithms_enabled()


class Job:
    """Calls that are compiled in the background.

    Attributes:
        calls: The calls.
        requests: The same, pickled.
        outcome: Their graphs, or what went wrong; None while that is open.
        is_ready: Whether the graphs are used.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls, self.is_ready = calls, False
        self.requests: list[bytes] = []
        self.outcome: list[Graph] | Exception | None = None
        self._owner = os.getpid()
        try:
            self.requests += [pickle.dumps(call) for call in calls]
        except Exception as error:  # of any type: objects raise it
            self.outcome = error

    @property
    def graphs(self) -> list[tuple[Call, Graph]]:
        """Calls and their graphs, once it is ready."""
        assert isinstance(self.outcome, list)
        return list(zip(self.calls, self.outcome, strict=True))

    @property
    def is_lost(self) -> bool:
        """Whether it was open when this process was forked from another."""
        return not self.is_ready and self._owner != os.getpid()


def submit(calls: Sequence[Call]) -> Job:
    """Compile calls in the background."""
    job = Job(calls)
    _of_process(os.getpid()).submit(job)
    return job


def adopt(step: int) -> None:
    """Use what was compiled, if no job is open; where one failed, warn once and stop compiling.

    Args:
        step: Number of the step that begins, for the log.
    """
    _of_process(os.getpid()).adopt(step)


def wait() -> None:
    """Return when no job is open."""
    _of_process(os.getpid()).wait()


class _Server:
    """The process that compiles, and the folder of what it saves."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nfn_optim_")
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *map(str, (theirs.fileno(), os.getpid(), self._folder.name)), *sys.path],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from the keyboard is not for it
        )
        theirs.close()

    def compile(self, request: bytes) -> Graph:
        """Compile a call.

        Raises:
            RuntimeError: It cannot be compiled, or the process has ended.
        """
        try:
            self._connection.send_bytes(pickle.dumps((request, torch.get_default_dtype())))
            answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the process that compiles has ended, with code {self._process.wait()}") from error
        if isinstance(answer, Exception):
            raise answer
        load()
        graph: Graph = answer[0]
        path = path_in(self._folder.name)
        function = torch._inductor.CompiledArtifact.load(path=path)  # type: ignore[attr-defined]
        return replace(graph, run=partial(function, *answer[1]))

    def end(self) -> None:
        """End it at once, with the compilers that it has started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._folder.cleanup()


class _Background:
    """The jobs of one process."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._lock = Lock()
        self._jobs: list[Job] = []  # whose graphs are not used yet
        self._queue: deque[Job] = deque()
        self._thread: Thread | None = None
        self._server: _Server | None = None
        self._started = 0.0
        self._stopped = False
        atexit.register(self.stop)

    def submit(self, job: Job) -> None:
        """See `submit`."""
        load_deprecated()
        with self._lock:
            if not self._jobs:
                self._started = time.monotonic()
                LOG.warning(
                    "compiling the optimizer's steps in the background, which takes half a minute or more once, and "
                    "seconds in each later process; training goes on, uncompiled until then; compile=False avoids it"
                )
            self._jobs.append(job)
            if job.outcome is None:
                self._queue.append(job)
            if self._queue and self._thread is None:
                self._thread = Thread(target=self._work, name="nfn_optim compiler", daemon=True)
                self._thread.start()

    def adopt(self, step: int) -> None:
        """See `adopt`."""
        if not self._jobs:
            return
        with self._lock:
            if any(job.outcome is None for job in self._jobs):
                return
            jobs, self._jobs = self._jobs, []
        for job in jobs:
            if isinstance(job.outcome, Exception):
                fail(job.outcome, REMEDY)
                return
        for job in jobs:
            job.is_ready = True
        LOG.warning("the optimizer's steps are compiled from step %d on", step)
        LOG.info("compiling took %.0f s in the background", time.monotonic() - self._started)

    def wait(self) -> None:
        """See `wait`."""
        if (thread := self._thread) is not None:
            thread.join()

    def stop(self) -> None:
        """Give up all jobs; at the end of the process."""
        if self._owner != os.getpid():
            return
        with self._lock:
            self._stopped = True
            self._queue.clear()
            if self._server is not None:
                self._server.end()
        if (thread := self._thread) is not None:
            thread.join(SECONDS_TO_LOAD)

    def _work(self) -> None:
        """Compile what is queued; in a thread."""
        failure: Exception | None = None
        found: list[tuple[Call, Graph]] = []
        while (job := self._next()) is not None:
            try:
                for call, request in zip(job.calls, () if failure else job.requests, strict=failure is None):
                    found.append((call, _find(call, found) or self._running().compile(request)))
            except Exception as error:  # raised in a thread, and of interest in `adopt`
                failure = error
            job.outcome = failure or [graph for _, graph in found[-len(job.calls) :]]

    def _next(self) -> Job | None:
        """The next job; None, and no process any more, where there is none."""
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            if self._server is not None:
                self._server.end()
            self._server = self._thread = None
            return None

    def _running(self) -> _Server:
        """The process, started at its first use."""
        with self._lock:
            if self._stopped:
                raise RuntimeError("nothing is compiled any more at the end of the interpreter")
            self._server = self._server or _Server()
            return self._server


def _find(call: Call, found: Sequence[tuple[Call, Graph]]) -> Graph | None:
    """A graph that serves a call, among those that are used and those that will be."""
    new = (graph for other, graph in found if other.kind == call.kind and graph.holds(call.tensors))
    return call.find_graph() or next(new, None)


@cache
def _of_process(pid: int) -> _Background:
    del pid
    return _Background()
