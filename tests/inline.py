"""A pool of processes without processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future


class Pool:
    """A pool that does the work itself."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., float], *args: object) -> Future[float]:
        future: Future[float] = Future()
        future.set_result(work(*args))
        return future
