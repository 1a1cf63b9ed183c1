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


class AdamFeature(NamedTuple):
    """The only feature without a slow moment."""

    adam: Tensor


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


def features_of(p: Tensor, g: Tensor, moments: Sequence[Tensor], constants: Tensor) -> WeightFeatures | AdamFeature:
    """The features of every weight.

    Args:
        p: Parameters `(*batch, rows, rest)`.
        g: Gradients, the same shape.
        moments: After `update_moments` with `g`.
        constants: `(*batch, rows or 1, 6)`, see `moments.moment_constants`.

    Returns:
        Tensors `(*batch, rows, rest)`.
    """
    m, v, *slow = moments
    correct_m, correct_v, correct_slow = constants[..., :3].unsqueeze(-2).unbind(-1)
    active = v.sign()
    inverse = active / ((v + SQRT_EPS).sqrt() * correct_v + EPS)
    momentum = m * correct_m
    adam = momentum * inverse
    if not slow:
        return AdamFeature(adam)
    gradient = (g.to(m.dtype) * inverse).clamp(-CLIP, CLIP)
    return WeightFeatures(adam, slow[0] * correct_slow * inverse, gradient, p.to(m.dtype) * active, momentum * active)


def products_of(features: WeightFeatures) -> list[Tensor]:
    """The products whose means are `Statistics`, in its order."""
    return [*(x * x for x in features), features.slow * features.gradient]
