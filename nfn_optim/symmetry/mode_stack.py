"""The stack of dispatch modes of a thread."""

from __future__ import annotations

from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack, _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode


def push_below(mode: TorchDispatchMode) -> None:
    """Put a mode below all others, unless it is on the stack, so that others may end before or after it."""
    if mode not in _modes():
        others = [_pop_torch_dispatch_stack(None) for _ in range(_len_torch_dispatch_stack())]
        for each in (mode, *reversed(others)):
            _push_on_torch_dispatch_stack(each)


def remove(mode: TorchDispatchMode) -> None:
    """Take a mode from the stack, if it is there, and leave the others in their order."""
    if mode in _modes():
        above = []
        while (other := _pop_torch_dispatch_stack(None)) is not mode:
            above.append(other)
        for other in reversed(above):
            _push_on_torch_dispatch_stack(other)


def is_symbolic() -> bool:
    """Whether ops of this thread are recorded instead of computed."""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


def _modes() -> list[Any]:
    """The modes, the innermost last."""
    return [torch._C._get_dispatch_stack_at(index) for index in range(_len_torch_dispatch_stack())]
