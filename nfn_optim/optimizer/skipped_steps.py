"""Steps not taken because a gradient is not finite: how many, and a warning where no step is taken any more.

On a CPU a skipped step is known at once. Elsewhere it is known on the device only: there both counts stay until someone
asks, and the count of steps skipped in a row is copied every `LOOK_EVERY` steps without waiting for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nfn_optim.engine.sharding import local
from nfn_optim.optimizer.gradient_check import grads_finite
from nfn_optim.optimizer.real_view import real

Params = Callable[[], Mapping[str, Tensor]]
MAX_IN_A_ROW = 30  # steps skipped before a warning; loss scaling skips fewer
LOOK_EVERY = 50  # steps after which the count on a device is copied


class SkippedSteps:
    """Skipped steps of an optimizer that are not yet counted in its groups, and those in a row."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._pending: Tensor | None = None  # on the device: skipped steps, and those in a row
        self._total: Tensor | None = None  # on the device: 1 and 0
        self._steps = 0  # since the count on the device was read
        self._copied: Callable[[], Tensor | None] | None = None

    def note(self, finite: bool, params: Params, *, stacklevel: int) -> None:
        """Note a step, taken if all gradients are `finite`; warns after `MAX_IN_A_ROW` that were not.

        Args:
            finite: Whether they are.
            params: Yields all parameters by name.
            stacklevel: Of the warning, as if the caller gave it.
        """
        self._in_a_row = 0 if finite else self._in_a_row + 1
        if self._in_a_row == MAX_IN_A_ROW:
            _warn(self._in_a_row, params, stacklevel + 1)

    def note_on_device(self, finite: Tensor, params: Params, *, stacklevel: int) -> None:
        """Note a step of which only the device knows whether it is taken; does not synchronise unless it warns.

        Args:
            finite: 0-d.
            params: As of `note`.
            stacklevel: Likewise.
        """
        if self._pending is None or self._total is None:
            self._pending, self._total = (finite.new_tensor(x, dtype=torch.int64) for x in ([0, 0], [1, 0]))
        self._pending = torch.where(finite, self._pending * self._total, self._pending + 1)
        self._steps += 1
        if self._steps < LOOK_EVERY:
            return
        if self._copied is None:
            self._copied = copy_to_host(self._pending)
        elif (counts := self._copied()) is not None:
            in_a_row, self._steps, self._copied = int(counts[1]), 0, None
            if in_a_row >= MAX_IN_A_ROW > self._in_a_row:
                _warn(in_a_row, params, stacklevel + 1)
            self._in_a_row = in_a_row

    def collect(self) -> int:
        """The number of skipped steps that only the device knew; synchronises if there may be any."""
        if self._pending is None or self._total is None:
            return 0
        skipped = int(self._pending[0].item())
        self._pending = self._pending * (1 - self._total)
        return skipped


def copy_to_host(counts: Tensor) -> Callable[[], Tensor | None]:
    """Begin to copy a tensor to the host, without waiting.

    Returns:
        What yields the copy once it is there, and None before; on other devices than CUDA's it always yields None.
    """
    if not counts.is_cuda:
        return lambda: None
    with torch.cuda.device(counts.device):
        copy, event = counts.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
    return lambda: copy if event.query() else None  # type: ignore[no-untyped-call]


def _warn(steps: int, params: Params, stacklevel: int) -> None:
    """Warn that nothing is trained, naming the parameters whose gradients are to blame."""
    grads = {name: local(real(p.grad)) for name, p in params().items() if p.grad is not None}
    named = [name for name, g in grads.items() if not grads_finite([g])]
    if not named:
        return  # repaired meanwhile, or known to another process
    kind = "NaN" if any(bool(grads[name].isnan().any()) for name in named) else "infinite, or its square is"
    warnings.warn(
        f"no step was taken {steps} times in a row: the gradient of {named} is {kind}, so nothing is trained. "
        f"torch.autograd.set_detect_anomaly(True) finds the operation (often sqrt, log or a division in a branch that "
        f"torch.where does not choose); a parameter that the loss does not need can be frozen with "
        f"requires_grad_(False), or its gradient set to None",
        stacklevel=stacklevel + 1,
    )
