"""Recurrent layers, whose functions run thousands of small kernels, or a single one that is hard to see through.

A trace is left while such a function runs. Which axes are one is known beforehand, for each layer and direction:

    weight_ih  (gates h) in     weight_hh  (gates h) out     biases  (gates h)     weight_hr  out h

with h = out unless an LSTM projects its outputs. The order of time steps is fixed.

Legend: see `nfn_optim.symmetry.axes` for `Dim` and `Dims`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nfn_optim.symmetry.axes import Dim, Dims, fresh, size_of
from nfn_optim.symmetry.dispatch import tensors_in
from nfn_optim.symmetry.live_trace import LiveTrace
from nfn_optim.symmetry.reshaping import split_dim, stack_dims
from nfn_optim.symmetry.unification import concat_dims, fix, unify

LAYERS = {torch.lstm: 4, torch.gru: 3, torch.rnn_tanh: 1, torch.rnn_relu: 1}
CELLS = {torch.lstm_cell: 4, torch.gru_cell: 3, torch.rnn_tanh_cell: 1, torch.rnn_relu_cell: 1}
"""Function -> its number of gates, each with all hidden neurons."""


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
        """Run a function; a recurrent one out of sight of the trace, which is told the axes of its results."""
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
    if trace.follows:
        trace.follow(inputs, outs)
    key = trace.key_of(func, inputs, {}, False)
    if key is not None and trace.recall(key, outs):
        return
    batch, features = trace.lookup(args[0])
    states = [_entries(trace, state, 1)[0] for state in tensors_in(args[1])]
    params = [trace.lookup(p) for p in tensors_in(args[2:])]
    axes = _step(trace, CELLS[func], (batch, features), states, params)
    for out, axis in zip(outs, axes, strict=False):
        trace.give(out, trace.interned((batch, axis)))  # so that the calls of later time steps are repetitions
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
    given, params, _, layers, _, _, bidirectional, *order = rest
    if trace.follows:
        trace.follow(tensors_in((inputs, given, params)), result)
    dims = trace.lookup(inputs)
    time, batch_first = dims[0], bool(order and order[0])
    batch = dims[1] if not packed else fresh([result[1].shape[1]], fixed=True)[0]
    if batch_first:
        time, batch = batch, time
    fix(time)
    directions = 2 if bidirectional else 1
    count = layers * directions
    states = [_entries(trace, state, count) for state in tensors_in(given)]
    every = [trace.lookup(p) for p in params]
    size = len(every) // count
    features, finals = dims[-1], list[tuple[Dim, Dim]]()
    for first in range(0, count, directions):
        ends = [
            _step(
                trace, LAYERS[func], (batch, features), [state[i] for state in states], every[size * i : size * (i + 1)]
            )
            for i in range(first, first + directions)
        ]
        features, finals = concat_dims([end[0] for end in ends]), [*finals, *ends]
        trace.index_spaces.append((*dims[:-1], features))
    trace.give(result[0], (*dims[:-1], features))
    for k, final in enumerate(result[1:]):
        index, stacked = stack_dims([(batch, end[k]) for end in finals])
        trace.give(final, ((index,), *stacked))
        trace.index_spaces.append(((index,), *stacked))


def _entries(trace: LiveTrace, states: Tensor, count: int) -> list[Dims]:
    """The states of every layer and direction `(batch, neurons)`, from `([count], batch, neurons)`."""
    if trace.is_filled(states):
        return [fresh(tuple(states.shape[-2:])) for _ in range(count)]
    dims = trace.lookup(states)
    pieces = split_dim(dims[0], [1] * count) if len(dims) > 2 else None  # noqa: PLR2004 - the shape above
    return [dims[-2:]] * count if pieces is None else [piece.localise(dims[-2:]) for piece in pieces]


def _step(
    trace: LiveTrace, gates: int, inputs: Dims, states: Sequence[Dims], params: Sequence[Dims]
) -> tuple[Dim, Dim]:
    """Relate the axes of one layer and direction.

    Args:
        trace: The trace.
        gates: Number of gates.
        inputs: `(batch, features)`.
        states: The outputs, and the cells of an LSTM, `(batch, neurons)`.
        params: Weights, biases, projection, as far as there are any.

    Returns:
        The neurons of the outputs and of the cells.
    """
    (rows, columns), (state_rows, outputs), *others = params
    biases = [bias for bias in others if len(bias) == 1]
    hidden = fresh([size_of(rows) // gates])[0]
    projected = len(others) > len(biases)
    out = outputs if projected else hidden
    unify(rows, concat_dims([hidden] * gates))
    unify(columns, inputs[1])
    unify(
        state_rows, concat_dims([hidden] * gates) if gates == CELLS[torch.gru_cell] else rows
    )  # a GRU's are not added
    for (bias,), weight_rows in zip(biases, (rows, state_rows), strict=False):
        unify(bias, weight_rows)
    unify(outputs, out)
    if projected:
        unify(others[-1][0], out)
        unify(others[-1][1], hidden)
        trace.index_spaces.append((inputs[0], out, hidden))
    for state, neurons in zip(states, (out, hidden), strict=False):
        unify(state[0], inputs[0])
        unify(state[1], neurons)
    trace.count += 1
    trace.index_spaces += [(*inputs, rows), (inputs[0], state_rows, outputs), (inputs[0], hidden), (inputs[0], out)]
    return out, hidden
