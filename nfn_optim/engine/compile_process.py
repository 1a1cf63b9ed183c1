"""The process that compiles for another one, see `nfn_optim.engine.background`.

It answers requests one after the other, has low priority, and kills itself and the compilers it has started when the
other process, its client, closes the connection or ends in any way.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from nfn_optim.engine.inductor import Call, Graph, build_graph, load

NICENESS = 1  # training comes first; much more, and a busy machine never gets done
SECONDS_TO_NOTICE = 5.0  # that a client has ended whose forks still have its connection

Request = tuple[bytes, torch.dtype]
"""A pickled `Call`, and the default dtype of the other process."""


def path_in(folder: str) -> str:
    """Where the compiled function of the last answer is saved."""
    return f"{folder}/function"


def serve(connection: int, client: int, folder: str) -> None:
    """Answer requests until the end of the connection or of the client.

    An answer is the `Graph` without its function and the first arguments of that, or the exception that was raised.

    Args:
        connection: File descriptor.
        client: Number of the process, which has started this one.
        folder: Of `path_in`; removed if the client has not done so.
    """
    os.nice(NICENESS)
    pipe = Connection(connection)
    requests: SimpleQueue[Request] = SimpleQueue()
    Thread(target=_receive, args=(pipe, requests, client, folder), daemon=True).start()
    while True:
        request = requests.get()
        try:
            answer: tuple[Graph, list[Tensor]] | Exception = _save(request, path_in(folder))
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        pipe.send_bytes(pickle.dumps(answer))  # `send` would share the memory of tensors


def _receive(pipe: Connection, requests: SimpleQueue[Request], client: int, folder: str) -> None:
    """Queue requests; at the end of the client nobody wants what is being compiled."""
    try:
        while os.getppid() == client:
            if pipe.poll(SECONDS_TO_NOTICE):
                requests.put(pickle.loads(pipe.recv_bytes()))
    except (EOFError, OSError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


@torch.no_grad()
def _save(request: Request, path: str) -> tuple[Graph, list[Tensor]]:
    """Compile a call and save the function; its answer."""
    pickled, default_dtype = request
    call: Call = pickle.loads(pickled)
    torch.set_num_threads(call.threads)
    torch.set_default_dtype(default_dtype)
    load()
    tensors = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu") for x in call.tensors]
    if not call.dynamic:
        tensors = [_example(x) for x in tensors]
        call(*(_example(x) for x in tensors))  # fills caches, which must not be traced
    graph = build_graph(call, tensors, _compile, dynamic=call.dynamic)
    artifact: Any = graph.run
    artifact.func.save(path=path)
    return replace(graph, run=_not_here), list(artifact.args)


def _example(x: Tensor) -> Tensor:
    """A tensor of the same kind; ones, and zeros where they may be indices."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).fill_(1 if x.is_floating_point() else 0)


def _compile(traced: GraphModule, inputs: list[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Compile to a function that can be saved, and its first arguments: constants of the trace."""
    constants = _lift_constants(traced)
    examples = [inputs[0].fake_mode.from_tensor(x) if isinstance(inputs[0], FakeTensor) else x for x in constants]
    artifact: Callable[..., Any] = torch._inductor.standalone_compile(
        traced,
        [*examples, *inputs],
        dynamic_shapes="from_tracing_context",
        options={"config_patches": options},
        aot=True,
        donate_graph_module=True,
    )
    return partial(artifact, *constants)


def _lift_constants(traced: GraphModule) -> list[Tensor]:
    """Make the tensors that a trace holds its first arguments; saved functions do not hold them."""
    graph = traced.graph
    nodes = [node for node in graph.nodes if node.op == "get_attr"]
    first = next(iter(graph.nodes))
    arguments: dict[Any, Node] = {}
    for node in nodes:
        if node.target not in arguments:
            with graph.inserting_before(first):
                arguments[node.target] = graph.placeholder(f"constant_{len(arguments)}")
            arguments[node.target].meta = node.meta
        node.replace_all_uses_with(arguments[node.target])
        graph.erase_node(node)
    constants = [getattr(traced, name).clone() for name in arguments]  # equal arguments would be merged
    for name in arguments:
        delattr(traced, name)
    traced.recompile()
    return constants


def _not_here(*_: Tensor) -> None:
    """What stands for the function where it has not been loaded."""
