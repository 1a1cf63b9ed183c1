"""The two passes over the weights: all of a step whose cost grows with the number of weights.

    first     reads p, g and the moments, and sums products of raw channels over rows and over columns
    second    reads the same and what was said to the weights since; yields the update and the new moments

Both see a tensor as an array `(*batch, rows, rest)`: its first dimension, and all others. What follows from the sums
for the weights of one row comes as one vector, `heard` `(*batch, rows or 1, heard channels)`, and what follows for
columns and taps as one factor, `gain` `(*batch, 1, rest)`:

    update = gain (h_0 f_0 + h_1 f_1 + h_2 f_2 + h_3 p + h_4 clip(h_5 m^) + D) + h_6 p             form "linear"
    update = gain h_0 (f_0 + h_3 sum_j a_j tanh(w_j . f' + b_j + h_4+j)) + h_-1 p                  form "network"

with f the raw channels of `nfn_optim.rule.features` and f' the channels, their units h_1 and h_2, and D what of the
orthogonal direction is not in f_0, if there is any (`nfn_optim.rule.orthogonal`). `take`, `sums_of` and
`answer` are that mathematics. The rule calls them as they are where it is pure; `look` and `move_`, made of them, work
in place, remember nothing from one pass to the next, and may be compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nfn_optim.engine.moments import BETA1, BETA2, BETA_SLOW, CLIP, EPS, ROW_CHANNELS, TINY
from nfn_optim.engine.stochastic_rounding import rounded, widened

Network = tuple[Tensor, Tensor, Tensor]
"""The network per weight: `(*batch, hidden, CHANNELS)`, `(*batch, hidden)`, `(*batch, 1, hidden)`, batch or none."""


def advance(g: Tensor, moments: Sequence[Tensor]) -> list[Tensor]:
    """Take a gradient into the moments m, v and, if there is a third, M. All of one shape."""
    m, v, *slow = moments
    g = g.to(m.dtype)
    return [
        torch.lerp(m, g, 1 - BETA1),
        torch.addcmul(v * BETA2, g, g, value=1 - BETA2),
        *(torch.lerp(x, g, 1 - BETA_SLOW) for x in slow),
    ]


def see(p: Tensor, g: Tensor, moments: Sequence[Tensor], corrections: Tensor) -> list[Tensor]:
    """The raw channels of every weight.

    Args:
        p: Parameters `(*batch, rows, rest)`.
        g: Gradients, the same shape.
        moments: What `advance` returned for `g`.
        corrections: Of the bias of m, v and M, `(*batch, rows or 1, 4)`: 1 / (1 - .9^t), 1 / sqrt(1 - .999^t) and
            1 / (1 - .99^t); and t, for `store`.

    Returns:
        `CHANNELS` tensors `(*batch, rows, rest)`; the first one only where there is no M.
    """
    m, v, *slow = moments
    correct_m, correct_v, correct_slow, _ = corrections.unsqueeze(-2).unbind(-1)
    inverse = 1 / ((v + TINY).sqrt() * correct_v + EPS)
    fast = m * correct_m
    nominal = fast * inverse
    if not slow:
        return [nominal]
    newest = (g.to(m.dtype) * inverse).clamp(-CLIP, CLIP)
    return [nominal, slow[0] * correct_slow * inverse, newest, p.to(m.dtype), fast]


def products_of(raw: Sequence[Tensor]) -> list[Tensor]:
    """What is summed over rows and columns: `ROW_CHANNELS` products, squares first."""
    return [*(x * x for x in raw), raw[1] * raw[2]]


def take(p: Tensor, g: Tensor, moments: Sequence[Tensor], corrections: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """New moments and the raw channels with them: `see` after `advance`."""
    new = advance(g, widened(moments, corrections))
    return new, see(p, g, new, corrections)


def sums_of(raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of products over rows, `(*batch, rows, ROW_CHANNELS)`, and over columns, `(*batch, rest, ROW_CHANNELS)`."""
    products = torch.stack(products_of(raw), -3)  # (*batch, ROW_CHANNELS, rows, rest)
    return products.sum(-1).mT, products.sum(-2).mT


def direction(p: Tensor, g: Tensor, moments: Sequence[Tensor], corrections: Tensor) -> tuple[Tensor, Tensor]:
    """Raw channel 0 alone, of this step, `(*batch, rows, rest)`, and the sum of its squares, `(*batch,)`.

    Arguments as for `take`. Not differentiable at zero.
    """
    x = take(p, g, moments[:2], corrections)[1][0]
    return x, torch.linalg.vector_norm(x, dim=(-2, -1)).square()


def answer(
    raw: Sequence[Tensor],
    p: Tensor,
    heard: Tensor,
    gain: Tensor | None,
    network: Network | None,
    ahead: Tensor | None = None,
) -> Tensor:
    """The update.

    Args:
        raw: As `see` returns them.
        p: Parameters `(*batch, rows, rest)`.
        heard: What rows and tensors say, `(*batch, rows or 1, heard channels)`; without M the first and the last alone.
        gain: What columns and taps say, `(*batch, 1, rest)`.
        network: The network per weight, if the form has one.
        ahead: D, `(*batch, rows, rest)`.

    Returns:
        `(*batch, rows, rest)` in the precision of the moments.
    """
    first, *said, decay = heard.unsqueeze(-2).unbind(-1)  # (*batch, rows or 1, 1) each
    update = raw[0] * first
    if network is not None:
        relative, unit, activity, *said = said
        channels = [*raw[:3], raw[3] * relative, (raw[4] * unit).clamp(-CLIP, CLIP)]
        update = update + first * activity * _network(channels, said, network)
    elif said:
        *coefficients, unit = said
        for x, c in zip([*raw[1:4], (raw[4] * unit).clamp(-CLIP, CLIP)], coefficients, strict=True):
            update = torch.addcmul(update, x, c)
    if ahead is not None:
        update = update + ahead
    if gain is not None:
        update = update * gain
    return torch.addcmul(update, p.to(update.dtype), decay)


def look(
    p: Tensor, g: Tensor, moments: Sequence[Tensor], corrections: Tensor, together: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """The first pass over some rows of an array, but for additions that `collect` makes.

    Args:
        p: Parameters `(rows, rest)`.
        g: Gradients, the same shape.
        moments: Of the last step.
        corrections: As in `see`, of this step.
        together: So many rows are added up before anything is stored; divides their number.

    Returns:
        For each of the `ROW_CHANNELS` products what is to be summed over columns, `(rows / together, rest)`; and sums
        over rows, for every row of `together` of each product, `(rows / together,)`.
    """
    arrays = [torch.unflatten(x, -2, (-1, together)).unbind(-2) for x in (p, g, *moments)]
    found = []
    for now_p, now_g, *now_moments in zip(*arrays, strict=True):  # (rows / together, rest)
        found.append(products_of(take(now_p, now_g, now_moments, corrections)[1]))
    columns = [sum(x[1:], x[0]) for x in zip(*found, strict=True)]  # before rows: the compiler fuses in this order only
    return columns, [x.sum(-1) for products in found for x in products]


def collect(columns: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sums over rows `(rows, ROW_CHANNELS)` and over columns `(rest, ROW_CHANNELS)`, of what `look` returns."""
    by_row = torch.stack(list(rows), -1)  # (rows / together, together ROW_CHANNELS)
    ones = by_row.new_ones(1, len(by_row))
    by_column = torch.cat([ones @ x for x in columns])  # a product is twice as fast as a sum
    return by_row.reshape(-1, ROW_CHANNELS), by_column.mT


def move_(  # noqa: PLR0913, PLR0917 - as many as the two functions it is made of
    p: Tensor,
    g: Tensor,
    moments: Sequence[Tensor],
    corrections: Tensor,
    heard: Tensor,
    gain: Tensor | None,
    network: Network | None,
    ahead: Tensor | None,
    still: bool,
    usable: Tensor | None = None,
) -> None:
    """The second pass over some rows of an array, in place.

    Args:
        p: Parameters `(rows, rest)`, moved unless `still`.
        g: Gradients, the same shape.
        moments: Of the last step; become those of this one.
        corrections: As in `see`, of this step.
        heard: As in `answer`; so are `gain` and `network`.
        gain: See there.
        network: See there.
        ahead: See there.
        still: Leave parameters as they are.
        usable: Whether to change anything, 0-d; None if so.
    """
    new, raw = take(p, g, moments, corrections)
    store(p, g, moments, corrections, None if still else answer(raw, p, heard, gain, network, ahead), new, usable)


def store(
    p: Tensor,
    g: Tensor,
    moments: Sequence[Tensor],
    corrections: Tensor,
    update: Tensor | None,
    new: Sequence[Tensor],
    usable: Tensor | None = None,
) -> None:
    """Write what a step has found: an update of the parameters, if any, and the new moments, as they are kept."""
    if update is not None:
        p.copy_(chosen(usable, p + update, p))
    for old, value in zip(moments, rounded(new, moments, g, corrections[..., 3]), strict=True):
        old.copy_(chosen(usable, value, old))


def chosen(usable: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """The new value, or the old one if the step is not to change anything; `usable` as in `move_`."""
    return new if usable is None else torch.where(usable, new, old)


def _network(channels: Sequence[Tensor], heard: Sequence[Tensor], network: Network) -> Tensor:
    """The network per weight, one hidden unit after the other so that all of them are one loop over the weights.

    Args:
        channels: `CHANNELS` tensors `(*batch, rows, rest)`.
        heard: For every hidden unit `(*batch, rows or 1, 1)`.
        network: Its tensors.
    """
    weight, bias, answer = (x[..., None, None] for x in network)  # each a number for an array
    units = [
        a * torch.tanh(sum((x * w for x, w in zip(channels, row.unbind(-3), strict=True)), h + b))
        for row, b, a, h in zip(weight.unbind(-4), bias.unbind(-3), answer.squeeze(-4).unbind(-3), heard, strict=True)
    ]
    return sum(units[1:], units[0])
