"""Features of a weight, by name; their statistics over rows, columns and tensors carry the same names.

    adam        m^ / sqrt(v^)       Adam's direction
    slow        M^ / sqrt(v^)       the same from the slow moment
    gradient    g / sqrt(v^)        the newest gradient, clipped at CLIP
    weight      p                   the weight itself
    momentum    m^                  the direction of SGD with momentum

All of them are exactly zero where v is: an entry that never had a gradient does not move, and has no part in any
statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from nfn_optim.engine.moments import EPS, SQRT_EPS

CLIP = 5.0  # of `gradient`, and of `momentum` in units of its root mean square


class WeightFeatures(NamedTuple):
    """One value for each feature: the features of weights, their units or their coefficients, all of one shape."""

    adam: Tensor
    slow: Tensor
    gradient: Tensor
    weight: Tensor
    momentum: Tensor


class Statistics(NamedTuple):
    """Means over some weights: of the square of each feature, and of slow times gradient; all of one shape."""

    adam: Tensor
    slow: Tensor
    gradient: Tensor
    weight: Tensor
    momentum: Tensor
    slow_gradient: Tensor

    @classmethod
    def unpack(cls, pooled: Tensor) -> Statistics:
        """From one tensor `(..., STATISTICS)`."""
        return cls(*pooled.unbind(-1))


FEATURES = len(WeightFeatures._fields)
STATISTICS = len(Statistics._fields)


class Features:
    """The features of weights, each computed when it is first asked for: tensors `(*batch, rows, rest)`.

    Args:
        p: Parameters `(*batch, rows, rest)`.
        g: Gradients, the same shape.
        moments: After `update_moments` with `g`; the third may be missing where `slow` is not asked for.
        constants: `(*batch, rows or 1, 6)`, see `moments.moment_constants`.
    """

    def __init__(self, p: Tensor, g: Tensor, moments: Sequence[Tensor], constants: Tensor) -> None:
        self._p, self._g, self._moments = p, g, moments
        self._corrections = constants[..., :3].unsqueeze(-2).unbind(-1)

    @cached_property
    def active(self) -> Tensor:
        """1 where there has been a gradient, else 0."""
        return self._moments[1].sign()

    @cached_property
    def _inverse(self) -> Tensor:
        """1 / (sqrt(v^) + eps), 0 where v is."""
        return self.active / ((self._moments[1] + SQRT_EPS).sqrt() * self._corrections[1] + EPS)

    @cached_property
    def _mean(self) -> Tensor:
        """m^."""
        return self._moments[0] * self._corrections[0]

    @cached_property
    def adam(self) -> Tensor:
        """m^ / (sqrt(v^) + eps)."""
        return self._mean * self._inverse

    @cached_property
    def slow(self) -> Tensor:
        """M^ / (sqrt(v^) + eps)."""
        return self._moments[2] * self._corrections[2] * self._inverse

    @cached_property
    def gradient(self) -> Tensor:
        """The newest gradient / (sqrt(v^) + eps), clipped."""
        return (self._g.to(self._inverse.dtype) * self._inverse).clamp(-CLIP, CLIP)

    @cached_property
    def weight(self) -> Tensor:
        """The weight itself."""
        return self._p.to(self.active.dtype) * self.active

    @cached_property
    def momentum(self) -> Tensor:
        """m^."""
        return self._mean * self.active

    def all(self) -> WeightFeatures:
        """All of them."""
        return WeightFeatures(self.adam, self.slow, self.gradient, self.weight, self.momentum)


def products_of(features: WeightFeatures) -> list[Tensor]:
    """The products whose means are `Statistics`, in its order."""
    return [*(x * x for x in features), features.slow * features.gradient]
