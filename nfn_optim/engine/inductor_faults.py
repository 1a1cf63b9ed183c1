"""Faults of inductor for CPUs that compiled steps meet, mended while they are compiled.

A node of inductor's scheduler that reads a buffer after something was added to it (`index_add`) depends on the addition
under a new name of the buffer. When the loops of a node are computed anew to be fused with others, torch 2.13 forgets
the new name (2.14 does not): the read may then come before the addition, and results are wrong without a word.

Where outer loops are fused, torch 2.13 and 2.14 ask every user of a buffer how it reads it, and raise KeyError if one
does not: a write that only has to come later is a user too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


@contextmanager
def mended() -> Iterator[None]:
    """Within it, reads come after additions, and a user of a buffer may not read it; the compiler is loaded."""
    from torch._inductor.loop_body import LoopBody  # noqa: PLC0415 - heavy, as below
    from torch._inductor.scheduler import SchedulerNode  # noqa: PLC0415 - heavy

    recompute: Any = SchedulerNode.recompute_size_and_body
    read_expression: Any = LoopBody.get_read_expr

    @wraps(recompute)
    def renamed(node: SchedulerNode, *args: Any, **kwargs: Any) -> None:
        recompute(node, *args, **kwargs)
        node.set_read_writes(node.read_writes.rename(node.mutation_renames))

    @wraps(read_expression)
    def expression_or_none(body: LoopBody, buffer: str) -> Any:
        try:
            return read_expression(body, buffer)
        except KeyError:
            return None

    SchedulerNode.recompute_size_and_body = renamed  # type: ignore[method-assign, assignment]
    LoopBody.get_read_expr = expression_or_none  # type: ignore[method-assign]
    try:
        yield
    finally:
        SchedulerNode.recompute_size_and_body = recompute  # type: ignore[method-assign]
        LoopBody.get_read_expr = read_expression  # type: ignore[method-assign]
