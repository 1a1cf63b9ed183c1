"""The passes over the weights: every part of a step whose cost grows with the number of weights.

    reduce     reads p, g and the moments; sums products of features over rows and over columns
    update     reads the same and the coefficients; yields the update and the new moments

Both see a tensor as an array `(*batch, rows, rest)`: its first dimension, and all others. The coefficients of a row are
one vector, `RowCoefficients` `(*batch, rows or 1, 7)`; the gains of columns and taps are one factor `(*batch, 1,
rest)`:

    update = gain (adam a + slow s + gradient n + weight w + clip(u momentum) k + D) [v > 0] + decay p

with D the part of the direction that is not proportional to Adam's, if there is one (`nfn_optim.rule.direction`).
`moments_and_features`, `sums_of` and `compute_update` are that mathematics and pure. `reduce_pass` and `apply_` are
made of them, work in place on a tile of rows, remember nothing from one pass to the next, and may be compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nfn_optim.engine.moments import update_moments
from nfn_optim.engine.stochastic_rounding import round_moments, to_compute_dtype
from nfn_optim.engine.weight_features import (
    CLIP,
    STATISTICS,
    AdamFeature,
    WeightFeatures,
    features_of,
    products_of,
)


class RowCoefficients(NamedTuple):
    """Coefficients of a row's features in `compute_update`, learning rate and gains of the row included."""

    adam: Tensor
    slow: Tensor
    gradient: Tensor
    weight: Tensor
    momentum: Tensor
    momentum_unit: Tensor  # u; no learning rate
    decay: Tensor


def moments_and_features(
    p: Tensor, g: Tensor, moments: Sequence[Tensor], constants: Tensor
) -> tuple[list[Tensor], WeightFeatures | AdamFeature]:
    """The moments after a gradient, and the features with them; arguments as of `features_of`, moments before it."""
    new = update_moments(g, to_compute_dtype(moments, constants), constants)
    return new, features_of(p, g, new, constants)


def sums_of(features: WeightFeatures) -> tuple[Tensor, Tensor]:
    """Sums of `Statistics` over rows, `(*batch, rows, STATISTICS)`, and over columns, `(*batch, rest, STATISTICS)`."""
    products = torch.stack(products_of(features), -3)  # (*batch, STATISTICS, rows, rest)
    return products.sum(-1).mT, products.sum(-2).mT


def mix(features: WeightFeatures | AdamFeature, mixture: Tensor | None) -> Tensor:
    """The direction X, a mixture of Adam's, the slow one and the newest gradient, `(*batch, rows, rest)`.

    Args:
        features: Of the weights.
        mixture: Parts of the slow direction and of the newest gradient, `(*batch, rows or 1, 2)`; None for Adam's.
    """
    if mixture is None:
        return features.adam
    assert isinstance(features, WeightFeatures)
    slow, gradient = mixture.unsqueeze(-2).unbind(-1)
    return torch.addcmul(torch.lerp(features.adam, features.gradient, gradient), features.slow, slow)


def mix_momentum(features: WeightFeatures | AdamFeature, g: Tensor, mixture: Tensor | None) -> Tensor:
    """The momentum with the newest gradient mixed in as in X, `(*batch, rows, rest)`; arguments as of `mix`."""
    assert isinstance(features, WeightFeatures)
    momentum = features.momentum
    return momentum if mixture is None else torch.lerp(momentum, g.to(momentum.dtype), mixture[..., 1:])


def mixed_direction(
    p: Tensor,
    g: Tensor,
    moments: Sequence[Tensor],
    constants: Tensor,
    mixture: Tensor | None,
    momentum: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The direction X at this step, `(*batch, rows, rest)`, and the sums of its squares by row, `(*batch, rows)`.

    Arguments as of `moments_and_features` and `mix`; with `momentum` the third result is `mix_momentum`, else None. Not
    differentiable at zero.
    """
    needed = moments if momentum or mixture is not None else moments[:2]
    features = moments_and_features(p, g, needed, constants)[1]
    x = mix(features, mixture)
    squares = torch.linalg.vector_norm(x, dim=-1).square()
    return x, squares, mix_momentum(features, g, mixture) if momentum else None


def compute_update(
    features: WeightFeatures | AdamFeature,
    p: Tensor,
    v: Tensor,
    row_coeffs: Tensor,
    column_gain: Tensor | None,
    direction: Tensor | None = None,
) -> Tensor:
    """The update of every weight.

    Args:
        features: See `features_of`.
        p: Parameters `(*batch, rows, rest)`.
        v: Their second moments after this gradient; where it is zero nothing but weight decay moves a weight.
        row_coeffs: `RowCoefficients` packed, `(*batch, rows or 1, 7)`; with `AdamFeature` only adam and decay, `(...,
        2)`.
        column_gain: Product of the gains of columns and taps, `(*batch, 1, rest)`.
        direction: D, `(*batch, rows, rest)`.

    Returns:
        `(*batch, rows, rest)` in the dtype of the moments.
    """
    columns = row_coeffs.unsqueeze(-2).unbind(-1)  # (*batch, rows or 1, 1) each
    update, decay = features.adam * columns[0], columns[-1]
    if isinstance(features, WeightFeatures):
        c = RowCoefficients(*columns)
        update = torch.addcmul(update, features.slow, c.slow)
        update = torch.addcmul(update, features.gradient, c.gradient)
        update = torch.addcmul(update, features.weight, c.weight)
        update = torch.addcmul(update, (features.momentum * c.momentum_unit).clamp(-CLIP, CLIP), c.momentum)
    if direction is not None:
        update = torch.addcmul(update, direction, v.sign())  # all features are zero already
    if column_gain is not None:
        update = update * column_gain
    return torch.addcmul(update, p.to(update.dtype), decay)


def reduce_pass(
    p: Tensor, g: Tensor, moments: Sequence[Tensor], constants: Tensor, row_unroll: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """The first pass over a tile of rows, but for the additions that `finish_sums` makes.

    Args:
        p: Parameters `(rows, rest)`.
        g: Gradients, the same shape.
        moments: Of the last step.
        constants: Moment constants of this step.
        row_unroll: Number of rows added up before anything is stored; divides the number of rows.

    Returns:
        For each of the `STATISTICS` products partial sums over columns, `(rows / row_unroll, rest)`; and sums over
        rows, for every unrolled row of each product, `(rows / row_unroll,)`.
    """
    arrays = [torch.unflatten(x, -2, (-1, row_unroll)).unbind(-2) for x in (p, g, *moments)]
    products = []
    for row_p, row_g, *row_moments in zip(*arrays, strict=True):  # (rows / row_unroll, rest)
        features = moments_and_features(row_p, row_g, row_moments, constants)[1]
        assert isinstance(features, WeightFeatures)
        products.append(products_of(features))
    columns = [sum(x[1:], x[0]) for x in zip(*products, strict=True)]  # before rows: inductor fuses in this order only
    return columns, [x.sum(-1) for row in products for x in row]


def finish_sums(columns: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums over rows `(rows, STATISTICS)` and over columns `(rest, STATISTICS)` from the results of `reduce_pass`."""
    by_row = torch.stack(list(rows), -1)  # (rows / row_unroll, row_unroll STATISTICS)
    ones = by_row.new_ones(1, len(by_row))
    by_column = torch.cat([ones @ x for x in columns])  # a product is twice as fast as a sum
    return by_row.reshape(-1, STATISTICS), by_column.mT


def apply_(  # noqa: PLR0913, PLR0917 - as many as the two functions it is made of
    p: Tensor,
    g: Tensor,
    moments: Sequence[Tensor],
    constants: Tensor,
    row_coeffs: Tensor,
    column_gain: Tensor | None,
    direction: Tensor | None,
    frozen: bool,
    grads_finite: Tensor | None = None,
) -> None:
    """The second pass over a tile of rows, in place.

    Args:
        p: Parameters `(rows, rest)`, updated unless `frozen`.
        g: Gradients, the same shape.
        moments: Of the last step; become those of this one.
        constants: Moment constants of this step.
        row_coeffs: As of `compute_update`; so are `column_gain` and `direction`.
        column_gain: See there.
        direction: See there.
        frozen: Leave the parameters as they are.
        grads_finite: 0-d; where False nothing changes. None: True.
    """
    new, features = moments_and_features(p, g, moments, constants)
    update = None if frozen else compute_update(features, p, new[1], row_coeffs, column_gain, direction)
    store_(p, g, moments, constants, update, new, grads_finite)


def store_(
    p: Tensor,
    g: Tensor,
    moments: Sequence[Tensor],
    constants: Tensor,
    update: Tensor | None,
    new_moments: Sequence[Tensor],
    grads_finite: Tensor | None = None,
) -> None:
    """Add an update to the parameters, if there is one, and store the new moments in the dtype of the old ones."""
    if update is not None:
        p.copy_(where_finite(grads_finite, p + update, p))
    for old, value in zip(moments, round_moments(new_moments, moments, g, constants[..., 3]), strict=True):
        old.copy_(where_finite(grads_finite, value, old))


def where_finite(grads_finite: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """The new value, or the old one where the gradients are not finite; None means that they are."""
    return new if grads_finite is None else torch.where(grads_finite, new, old)
