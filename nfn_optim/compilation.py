"""Compilers: whether there is one, what it makes of a function, and what happens where it fails.

Compilation that fails once is not tried again in the process; all goes on uncompiled, with one warning.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

OPTIONS: dict[str, Any] = {
    "realize_reads_threshold": 10**5,
    "realize_opcount_threshold": 10**5,
    "realize_acc_reads_threshold": 10**5,
    "max_fusion_size": 10**5,
}
"""Keep the compiler from storing what is cheaper computed again."""

_failures: list[str] = []  # in this process


@cache
def can_compile() -> bool:
    """Whether there is a C++ compiler, as `torch.compile` looks for it."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def has_failed() -> bool:
    """Whether compilation is not to be tried any more."""
    return bool(_failures)


def fail(error: RuntimeError) -> None:
    """Give compilation up, with a warning."""
    _failures.append(str(error))
    warnings.warn(
        f"the update rule could not be compiled and goes on uncompiled, which is slower: {str(error)[:500]}; "
        f"install a C++ compiler, or say compile=False to silence this",
        stacklevel=4,
    )


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled for all shapes; itself if that fails when it is first called."""
    _load()
    run = torch.compile(function, dynamic=True, options=OPTIONS)

    def call(*args: Any) -> Any:
        if _failures:
            return function(*args)
        try:
            return run(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            fail(error)
            return function(*args)

    return call


def graph_of(function: Callable[..., Any], args: list[Any]) -> Callable[..., Any] | None:
    """A function of tensors recorded, with all that it calls, and compiled for these shapes; None if that fails.

    Args:
        function: Returns nothing, and decides nothing upon the tensors' values.
        args: Tensors for it; they may be changed.
    """
    _load()
    from torch._guards import TracingContext, tracing  # noqa: PLC0415 - heavy, as in `_load`
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415 - likewise
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415 - likewise
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415 - likewise

    # without a shape environment what was compiled would not be looked up on disk
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    try:
        with warnings.catch_warnings(), tracing(TracingContext(mode)):
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its parts for each other
            run: Callable[..., Any] = torch._inductor.compile(make_fx(function)(*args), args)
        return run
    except RuntimeError as error:  # the compiler's are such
        fail(error)
        return None


@cache
def _load() -> None:
    """Import the compiler, which is heavy, and only for those who compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        import torch._dynamo.exc  # noqa: PLC0415 - heavy
        import torch._inductor.compile_fx  # noqa: F401, PLC0415 - heavy, and what torch._inductor.compile needs
