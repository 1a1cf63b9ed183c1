"""Recurrent layers, whose functions run thousands of small kernels, or a single one that is hard to see through.

A trace is left while such a function runs on real tensors. The axes of a layer are those of two time steps, which are
followed on the meta device: the second uses the state that the first returns, so that more steps relate no more axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nfn_optim.symmetry.axes import fresh
from nfn_optim.symmetry.dispatch import tensors_in
from nfn_optim.symmetry.live_trace import LiveTrace
from nfn_optim.symmetry.unification import fix

LAYERS = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
CELLS = frozenset({torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell})
STEPS = 2


class Recurrence(TorchFunctionMode):
    """Follows the functions of recurrent layers.

    Args:
        trace: The trace that they belong to.
    """

    def __init__(self, trace: LiveTrace) -> None:
        """See the class."""
        super().__init__()
        self.trace = trace

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function; a recurrent one out of sight of the trace, which follows two steps of it instead."""
        is_cell = func in CELLS
        if not (is_cell or func in LAYERS) or kwargs or not self.trace.watching:
            return func(*args, **(kwargs or {}))
        with self.trace.paused():
            result = func(*args)
        with self.trace.guarded():
            (_follow_cell if is_cell else _follow_layer)(self.trace, func, args, result)
        return result


def _follow_cell(trace: LiveTrace, func: Any, args: Sequence[Any], result: Any) -> None:
    """Give the outputs of one time step their dimensions.

    Args:
        trace: The trace.
        func: The function.
        args: `(input, state or states, *params)`.
        result: The state or states.
    """
    inputs, outs = tensors_in(args), tensors_in(result)
    key = trace.key_of(func, inputs, {}, False)
    if key is None or not trace.recall(key, outs):
        for out, meta in zip(outs, trace.shadow(func, args), strict=True):
            trace.share(out, meta)
        trace.remember(key, inputs, outs)


def _follow_layer(trace: LiveTrace, func: Any, args: Sequence[Any], result: Sequence[Tensor]) -> None:
    """Give the outputs of a recurrent function their dimensions.

    Args:
        trace: The trace.
        func: The function.
        args: `(input, hx, params, has_biases, layers, dropout, train, bidirectional, batch_first)`, or, for packed
            sequences, `(data, batch_sizes, hx, params, has_biases, layers, dropout, train, bidirectional)`.
        result: The output and the final states.
    """
    packed = not isinstance(args[3], bool)
    inputs, rest = args[0], args[2:] if packed else args[1:]
    states, params, has_biases, layers, _, _, bidirectional, *order = rest
    batch_first = bool(order and order[0])
    time, batch = (1, 0) if batch_first else (0, 1)
    dims = trace.lookup(inputs)
    fix(dims[0] if packed else dims[time])
    count = (states if isinstance(states, Tensor) else states[0]).shape[1]
    short = torch.empty(STEPS, count, inputs.shape[-1], device="meta")
    batch_dim = fresh([count], fixed=True)[0] if packed else dims[batch]
    trace.give(short, (fresh([STEPS], fixed=True)[0], batch_dim, dims[-1]))
    out, *final = trace.shadow(
        lambda x, *others: func(x, *others, has_biases, layers, 0.0, False, bidirectional, False),
        (short, states, list(params)),
    )
    features = trace.lookup(out)[-1]
    trace.give(result[0], (*dims[:-1], features))
    for real, meta in zip(result[1:], final, strict=True):
        trace.share(real, meta)
