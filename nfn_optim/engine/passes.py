"""The passes over the weights: every part of a step whose cost grows with the number of weights.

    reduce     reads p, g and the moments; sums products of features over rows and over columns
    update     reads the same and the coefficients; yields the update and the new moments

Both see a tensor as an array `(*batch, rows, rest)`: its first dimension, and all others. The coefficients of a row are
one vector, `RowCoefficients` `(*batch, rows or 1, 7)`; the gains of columns and taps are one factor `(*batch, 1,
rest)`:

    update = gain (adam a + slow s + gradient n + weight w + clip(u momentum) k + D) [v > 0] + decay p

with D the part of the direction that is not a combination of features, if there is one (`nfn_optim.rule.direction`).
Features whose coefficient is zero in all rows are left out: `Terms` names the others.
`moments_and_features`, `sums_of` and `compute_update` are that mathematics and pure. `reduce_pass` and `apply_` are
made of them, work in place on a tile of rows, remember nothing from one pass to the next, and may be compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nfn_optim.engine.moments import update_moments
from nfn_optim.engine.stochastic_rounding import is_bfloat16, round_moments, to_compute_dtype
from nfn_optim.engine.weight_features import (
    CLIP,
    STATISTICS,
    Features,
    WeightFeatures,
    products_of,
)

Terms = frozenset[str]
"""Names of the features whose coefficients may differ from zero, and COLUMNS where gains of columns may from one."""

COLUMNS = "columns"
ALL_TERMS: Terms = frozenset({*WeightFeatures._fields, COLUMNS})


class RowCoefficients(NamedTuple):
    """Coefficients of a row's features in `compute_update`, learning rate and gains of the row included."""

    adam: Tensor
    slow: Tensor
    gradient: Tensor
    weight: Tensor
    momentum: Tensor
    momentum_unit: Tensor  # u; no learning rate
    decay: Tensor


SUMMED = RowCoefficients._fields[:4]  # whose coefficient multiplies the feature of that name


def moments_and_features(
    p: Tensor, g: Tensor, moments: Sequence[Tensor], constants: Tensor, *, in_place: bool = False
) -> tuple[list[Tensor], Features]:
    """The moments after a gradient, and the features with them; arguments as of `Features`, moments before it."""
    new = update_moments(g, to_compute_dtype(moments, constants), constants, in_place=in_place)
    return new, Features(p, g, new, constants)


def sums_of(features: WeightFeatures) -> tuple[Tensor, Tensor]:
    """Sums of `Statistics` over rows, `(*batch, rows, STATISTICS)`, and over columns, `(*batch, rest, STATISTICS)`."""
    products = products_of(features)
    return torch.stack([x.sum(-1) for x in products], -1), torch.stack([x.sum(-2) for x in products], -1)


def mix(features: Features, mixture: Tensor | None, terms: Terms = ALL_TERMS) -> Tensor:
    """The direction X, a mixture of Adam's, the slow one and the newest gradient, `(*batch, rows, rest)`.

    Args:
        features: Of the weights.
        mixture: Parts of the slow direction and of the newest gradient, `(*batch, rows or 1, 2)`; None for Adam's.
        terms: Of which it is made.
    """
    if mixture is None:
        return features.adam
    slow, gradient = mixture.unsqueeze(-2).unbind(-1)
    x = torch.lerp(features.adam, features.gradient, gradient) if "gradient" in terms else features.adam
    return torch.addcmul(x, features.slow, slow) if "slow" in terms else x


def mix_momentum(features: Features, g: Tensor, mixture: Tensor | None) -> Tensor:
    """The momentum with the newest gradient mixed in as in X, `(*batch, rows, rest)`; arguments as of `mix`."""
    momentum = features.momentum
    return momentum if mixture is None else torch.lerp(momentum, g.to(momentum.dtype), mixture[..., 1:])


def mixed_direction(
    p: Tensor,
    g: Tensor,
    moments: Sequence[Tensor],
    constants: Tensor,
    mixture: Tensor | None,
    momentum: bool,
    terms: Terms = ALL_TERMS,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The direction X at this step, `(*batch, rows, rest)`, and the sums of its squares by row, `(*batch, rows)`.

    Arguments as of `moments_and_features` and `mix`; with `momentum` the third result is `mix_momentum`, else None. Not
    differentiable at zero.
    """
    needed = moments if mixture is not None and "slow" in terms else moments[:2]
    features = moments_and_features(p, g, needed, constants)[1]
    x = mix(features, mixture, terms)
    squares = torch.linalg.vector_norm(x, dim=-1).square()
    return x, squares, mix_momentum(features, g, mixture) if momentum else None


def compute_update(
    features: Features,
    p: Tensor,
    row_coeffs: Tensor,
    column_gain: Tensor | None,
    direction: Tensor | None = None,
    terms: Terms = ALL_TERMS,
) -> Tensor:
    """The update of every weight.

    Args:
        features: Of the weights; where there has been no gradient nothing but weight decay moves a weight.
        p: Parameters `(*batch, rows, rest)`.
        row_coeffs: `RowCoefficients` packed, `(*batch, rows or 1, 7)`; for Adam's direction alone only adam and decay,
            `(..., 2)`.
        column_gain: Product of the gains of columns and taps, `(*batch, 1, rest)`.
        direction: D, `(*batch, rows, rest)`.
        terms: Of which it is made.

    Returns:
        `(*batch, rows, rest)` in the dtype of the moments.
    """
    columns = row_coeffs.unsqueeze(-2).unbind(-1)  # (*batch, rows or 1, 1) each
    c = RowCoefficients(*columns) if len(columns) == len(RowCoefficients._fields) else None
    if direction is not None and c is not None and "weight" in terms:  # both count where there has been a gradient
        direction = torch.addcmul(direction, p.to(direction.dtype), c.weight)
        terms -= {"weight"}
    summed = zip(SUMMED, columns[:-1], strict=False)
    added = [(getattr(features, name), coefficient) for name, coefficient in summed if name in terms]
    if "momentum" in terms and c is not None:
        added.append(((features.momentum * c.momentum_unit).clamp(-CLIP, CLIP), c.momentum))
    if direction is not None:
        added.append((direction, features.active))  # all features are zero already
    update = added[0][0] * added[0][1]
    for value, coefficient in added[1:]:
        update = torch.addcmul(update, value, coefficient)
    if column_gain is not None and COLUMNS in terms:
        update = update * column_gain
    return torch.addcmul(update, p.to(update.dtype), columns[-1])


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
        products.append(products_of(moments_and_features(row_p, row_g, row_moments, constants)[1].all()))
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
    terms: Terms = ALL_TERMS,
    grads_finite: Tensor | None = None,
    in_place: bool = False,
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
        terms: As of `compute_update`.
        grads_finite: 0-d; where False nothing changes. None: True.
        in_place: Change moments where they are, if nothing is rounded or undone: fewer calls where nothing is compiled.
    """
    in_place = in_place and grads_finite is None and not any(is_bfloat16(x) for x in moments)
    new, features = moments_and_features(p, g, moments, constants, in_place=in_place)
    update = None if frozen else compute_update(features, p, row_coeffs, column_gain, direction, terms)
    if not in_place:
        store_(p, g, moments, constants, update, new, grads_finite)
    elif update is not None:
        p.add_(update)


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
