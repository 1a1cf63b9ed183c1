r"""Vectors of neurons, propagated through the weights of a network as activations are.

Every neuron j of axis a is a vector h_j. A tensor W with dimensions (a, b, taps) sends messages from b to a, each
multiplied by the weights that it comes along, and a perceptron f combines what arrives with the vectors of the axis
(biases, gains):

    m_k = (sum_j W_kjt h_j, for every tap t)
    h_k = f(m_k, b_k)                 f is one perceptron for each tensor or run of tensors of an axis
    h_k = h_k + f(m_k, b_k)           if the axis has vectors already (residual stream)

Tensors count in the order of the symmetry, which is that of the module. Inputs, fixed axes that nothing was sent to,
are told apart: what comes from them are the weights themselves; a free axis sends the sum of its weights. Axes that no
tensor reads from, the outputs, keep what arrives.

A linear NF-layer averages features over neurons; here a weight multiplies what passes through it, as in the network
that it belongs to: to run that on some inputs is the special case of f(m, b) = relu(m + b). So weights should have the
scale at which activations neither vanish nor explode, and signs of neurons that make no difference there should be
canonical (`nfn_optim.layers.canonical`).

References:
    Graph Neural Networks for Learning Equivariant Representations of Neural Networks (Kofinas et al., 2024),
    arXiv:2403.12143, which modulates messages by weights
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfn_optim.layers.block import batch_shape_of
from nfn_optim.symmetry import Symmetry


@dataclass
class _Stage:
    """Consecutive tensors whose first dimension is one axis.

    Attributes:
        axis: The axis that messages arrive at.
        matrices: Tensor -> the axis that its messages come from.
        vectors: Tensors with no other dimension.
    """

    axis: str
    matrices: dict[str, str] = field(default_factory=dict)
    vectors: list[str] = field(default_factory=list)


class Propagation(nn.Module):
    r"""From the weights of a network to a vector for each neuron, computed in the order of its layers.

    Args:
        symmetry: The tensors and their axes.
        channels: Length of the vectors of hidden neurons.
        in_channels: Of the features; 1 for weights.
        activation: Of the perceptrons, which have two layers. With an odd one and without biases, the vectors change
            sign with the weights of a neuron: no sign of a hidden neuron makes a difference to the outputs.
        bias: Whether the perceptrons have biases.

    Attributes:
        out_channels: Axis -> length of its vectors.

    Raises:
        ValueError: A tensor is a scalar, has a dimension of several axes or a free axis after the second dimension, or
            reads from a hidden axis that no tensor before it writes to.

    Example:
        >>> s = Symmetry.parse("0.weight h in\n0.bias h\n2.weight out h\n2.bias out\nfree h=8\nfixed in=4 out=2")
        >>> features = {name: torch.randn(5, *s.shape_of(name), 1) for name in s.dims}
        >>> vectors = Propagation(s, 16)(features)
        >>> {axis: tuple(x.shape) for axis, x in vectors.items()}
        {'h': (5, 8, 16), 'out': (5, 2, 17)}
    """

    def __init__(
        self,
        symmetry: Symmetry,
        channels: int,
        *,
        in_channels: int = 1,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.in_channels, self.activation = channels, in_channels, activation
        self._shapes = {name: (*symmetry.shape_of(name), in_channels) for name in symmetry.dims}
        self._stages, self._fixed = _stages_of(symmetry), symmetry.fixed
        self._ends = {stage.axis for stage in self._stages} - {
            source for stage in self._stages for source in stage.matrices.values()
        }
        self.out_channels: dict[str, int] = {}
        self.perceptrons = nn.ModuleList()
        for stage in self._stages:
            size = in_channels * len(stage.vectors)
            for name, source in stage.matrices.items():
                alone = symmetry.sizes[source] if source in self._fixed else 1
                size += math.prod(self._shapes[name][2:]) * self.out_channels.get(source, alone)
            if stage.axis in self._ends:
                self.out_channels[stage.axis] = self.out_channels.get(stage.axis, 0) + size
                continue
            self.out_channels[stage.axis] = channels
            sizes = ((size, channels), (channels, channels))
            self.perceptrons.append(nn.ModuleList(nn.Linear(*both, bias=bias) for both in sizes))

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Propagate.

        Args:
            features: Name -> `(*batch, *shape, in_channels)`.

        Returns:
            Axis -> `(*batch, size, out_channels[axis])`, for all axes that tensors start with.

        Raises:
            ValueError: The tensors are not those of the symmetry, or have other channels or different batch shapes.
        """
        batch = batch_shape_of(self._shapes, features)
        vectors: dict[str, Tensor] = {}
        perceptrons = iter(self.perceptrons)
        for stage in self._stages:
            parts = [features[name] for name in stage.vectors]
            for name, source in reversed(stage.matrices.items()):
                weight = features[name].flatten(len(batch) + 2)  # (*batch, size, source, taps * in_channels)
                parts.insert(0, self.messages(weight, source, vectors.get(source)))
            arriving, known = torch.cat(parts, -1), vectors.get(stage.axis)
            if stage.axis in self._ends:
                vectors[stage.axis] = arriving if known is None else torch.cat([known, arriving], -1)
                continue
            for linear in next(perceptrons):  # type: ignore[attr-defined]
                arriving = self.activation(linear(arriving))
            vectors[stage.axis] = arriving if known is None else known + arriving
        return vectors

    def messages(self, weight: Tensor, source: str, vectors: Tensor | None) -> Tensor:
        """What arrives at the neurons of an axis, `(*batch, size, length)`.

        Args:
            weight: `(*batch, size, source, T)`.
            source: The axis that messages come from.
            vectors: Its vectors `(*batch, source, C)`; None if it is an input.
        """
        if vectors is not None:
            return torch.einsum("...kjt,...jc->...ktc", weight, vectors).flatten(-2)
        return weight.flatten(-2) if source in self._fixed else weight.sum(-2)


def _stages_of(symmetry: Symmetry) -> list[_Stage]:
    """The tensors in order, put together by their first dimension."""
    stages: list[_Stage] = []
    targets = {dims[0] for dims in symmetry.dims.values() if dims}
    written: set[str] = set()
    for name, dims in symmetry.dims.items():
        if not dims or not all(axis in symmetry.sizes for axis in dims):
            raise ValueError(
                f"expected one axis for every dimension of {name!r}, found {dims}; leave the tensor out, with "
                f"`symmetry.restrict`"
            )
        if taps := [axis for axis in dims[2:] if axis not in symmetry.fixed]:
            raise ValueError(f"expected fixed axes after the second dimension of {name!r}, found {taps}")
        axis, source = dims[0], dims[1] if len(dims) > 1 else None
        if not stages or stages[-1].axis != axis or source == axis:
            stages.append(_Stage(axis))
        if source is None:
            stages[-1].vectors.append(name)
        elif source in targets and source not in written:
            raise ValueError(
                f"expected tensors in the order of computation, with outputs in the first dimension; {name!r} reads "
                f"from {source!r}, which no tensor before it writes to"
            )
        else:
            stages[-1].matrices[name] = source
        written.add(axis)
    return stages
