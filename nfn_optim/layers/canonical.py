"""Canonical signs and scales: maps of weights that keep the network's function and leave fewer networks to tell apart.

    signs     odd activations (sine, tanh)    s(-z) = -s(z): a neuron's weights may all change sign
    phases    sine                            sin(z + pi) = -sin(z): its bias may be shifted, its outputs negated
    scales    ReLU and its leaky form         r(c z) = c r(z), c > 0: its inputs may grow as its outputs shrink

For a hidden axis, *inputs* of a neuron are its rows and its bias (first dimensions), *outputs* its columns (others).
Neither map looks at activations; `function_change` measures what a map did to the functions of real networks.

References:
    On the Functional Equivalence of Neural Networks (Chen et al., 1993), for signs of odd activations
    Path-SGD (Neyshabur et al., 2015), Sec. 2, arXiv:1506.02617, for scales of ReLU
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.expression import axes_of

SWEEPS = 50
"""Rounds of balancing one axis after the other."""


def canonical_signs(
    features: Mapping[str, Tensor],
    symmetry: Symmetry,
    *,
    half_period: float | None = None,
    axes: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Make the biases of hidden neurons positive; without a bias, the sum of the incoming weights.

    Args:
        features: Weights, name -> `(N, *shape, 1)`.
        symmetry: The tensors and their axes.
        half_period: For sine activations `sin(f (w x + b))`, pi / f: biases are shifted to between 0 and half of it.
        axes: Hidden axes with an odd activation; default all free axes that are not nested.

    Returns:
        Name -> `(N, *shape, 1)`.

    Raises:
        ValueError: `half_period` is given and an axis has no bias.
    """
    out = dict(features)
    for axis in _axes(symmetry, axes):
        bias = _bias_of(symmetry, axis)
        if half_period is not None:
            if bias is None:
                raise ValueError(f"expected a bias for axis {axis!r} to shift its phases, found none: leave it out")
            turns = (out[bias] / half_period).round()  # (N, size, 1)
            out[bias] = out[bias] - turns * half_period
            out = _multiplied(out, symmetry, axis, None, 1 - 2 * turns.remainder(2)[..., 0])
        value = out[bias][..., 0] if bias is not None else _incoming_sum(out, symmetry, axis)  # (N, size)
        signs = torch.where(value < 0, -1.0, 1.0).to(value.dtype)
        out = _multiplied(out, symmetry, axis, signs, signs)
    return out


def canonical_scales(
    features: Mapping[str, Tensor], symmetry: Symmetry, *, axes: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Give inputs and outputs of every hidden neuron the same norm, which makes the sum of squared weights smallest.

    Args:
        features: Weights, name -> `(N, *shape, 1)`.
        symmetry: The tensors and their axes.
        axes: Hidden axes with a ReLU; default all free axes that are not nested.

    Returns:
        Name -> `(N, *shape, 1)`. A neuron without inputs or without outputs stays as it is.
    """
    out = dict(features)
    for _ in range(SWEEPS):
        for axis in _axes(symmetry, axes):
            incoming, outgoing = (_squares(out, symmetry, axis, first=first) for first in (True, False))
            both = (incoming > 0) & (outgoing > 0)
            factor = torch.where(both, (outgoing / incoming.clamp(min=1e-30)).clamp(1e-12, 1e12), 1.0) ** 0.25
            out = _multiplied(out, symmetry, axis, factor, 1 / factor)
    return out


@torch.no_grad()
def function_change(
    module: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *inputs: Any
) -> Tensor:
    """How much the functions of networks changed: the certificate of a map of weights.

    Args:
        module: The architecture; its own parameters are not used.
        before: Weights, name -> `(N, *shape, 1)`.
        after: Weights after the map.
        *inputs: Of the networks.

    Returns:
        Largest change of an output of every network, relative to its largest output, `(N,)`.
    """

    def run(weights: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(module, dict(weights), inputs)
        return out

    first, second = (vmap(run)({name: x[..., 0] for name, x in w.items()}).flatten(1) for w in (before, after))
    return (first - second).abs().amax(1) / first.abs().amax(1).clamp(min=1e-12)


def _axes(symmetry: Symmetry, axes: Sequence[str] | None) -> tuple[str, ...]:
    nested = set(symmetry.nested) | {p for parents in symmetry.nested.values() for p in parents}
    usable = tuple(axis for axis in symmetry.free if axis not in nested)
    if axes is not None and (unknown := [axis for axis in axes if axis not in usable]):
        raise ValueError(f"expected free axes that are not nested, some of {usable}, found {unknown}")
    return usable if axes is None else tuple(axes)


def _bias_of(symmetry: Symmetry, axis: str) -> str | None:
    return next((name for name, dims in symmetry.dims.items() if dims == (axis,)), None)


def _multiplied(
    features: Mapping[str, Tensor], symmetry: Symmetry, axis: str, inputs: Tensor | None, outputs: Tensor
) -> dict[str, Tensor]:
    """Multiply the inputs (first dimensions) and outputs (other dimensions) of every neuron; factors `(N, size)`."""
    out = dict(features)
    for name, x in features.items():
        for d, expression in enumerate(symmetry.expressions_of(name)):
            factors = outputs if d else inputs
            if factors is None or axis not in axes_of(expression):
                continue
            along = torch.ones(len(x), x.shape[d + 1], dtype=x.dtype, device=x.device)
            for o in symmetry.occurrences_of(expression):
                if o.axis == axis:
                    along[:, o.rows] = factors[:, o.entries]
            out[name] = out[name] * along.reshape(len(x), *(1,) * d, -1, *(1,) * (x.dim() - d - 2))
    return out


def _squares(features: Mapping[str, Tensor], symmetry: Symmetry, axis: str, *, first: bool) -> Tensor:
    """Sum of squares of the inputs (`first`) or outputs of every neuron, `(N, size)`."""
    some = next(iter(features.values()))
    total = torch.zeros(len(some), symmetry.sizes[axis], dtype=some.dtype, device=some.device)
    for name, x in features.items():
        for d, expression in enumerate(symmetry.expressions_of(name)):
            if (d == 0) != first or axis not in axes_of(expression):
                continue
            rows = x.movedim(d + 1, 1).flatten(2).square().sum(-1)  # (N, length)
            for o in symmetry.occurrences_of(expression):
                if o.axis == axis:
                    total = total.index_add(1, o.entries, rows[:, o.rows])
    return total


def _incoming_sum(features: Mapping[str, Tensor], symmetry: Symmetry, axis: str) -> Tensor:
    """Sum of the incoming weights of every neuron, `(N, size)`; zero if a tensor does not start with the axis."""
    some = next(iter(features.values()))
    total = torch.zeros(len(some), symmetry.sizes[axis], dtype=some.dtype, device=some.device)
    for name, dims in symmetry.dims.items():
        if dims and dims[0] == axis:
            total = total + features[name].flatten(2).sum(-1)
    return total
