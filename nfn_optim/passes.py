"""The two passes over the weights: all of a step whose cost grows with the number of weights.

    look    reads p, g and the moments, and sums products of raw channels over rows and over columns
    move    reads the same and what was said to the weights since; writes p and the moments

Both see a tensor as an array `(*batch, rows, rest)`: its first dimension, and all others. Both bring the moments up to
date for themselves, which costs less than to write them in one pass and read them in the next, so that the first pass
changes nothing. What follows from its sums for the weights of one row comes as one vector, `heard` `(*batch, rows or 1,
heard channels)`, and what follows for columns and taps as one factor, `gain` `(*batch, 1, rest)`:

    update = gain (h_0 f_0 + h_1 f_1 + h_2 f_2 + h_3 p + h_4 clip(h_5 m^)) + h_6 p          form "linear"
    update = gain h_0 (f_0 + h_1 n(f; h_5 ...)) + h_4 p                                    form "network"

with f the raw channels of `nfn_optim.features`. The functions are the same whether they are compiled or not, whether
arrays are tensors or some rows of one, and whether what they return is written in place or differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nfn_optim.features import BETA1, BETA2, BETA_SLOW, CHANNELS, CLIP, EPS, ROW_CHANNELS, TINY

LINEAR = CHANNELS + 2  # heard channels of form "linear"
NETWORK = 5  # of form "network", before those of its hidden units
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
        corrections: Of the bias of m, v and M, `(*batch, rows or 1, 3)`: 1 / (1 - .9^t), 1 / sqrt(1 - .999^t) and
            1 / (1 - .99^t).

    Returns:
        `CHANNELS` tensors `(*batch, rows, rest)`; the first one only where there is no M.
    """
    m, v, *slow = moments
    correct_m, correct_v, correct_slow = corrections.unsqueeze(-2).unbind(-1)
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


def look(
    p: Tensor, g: Tensor, moments: Sequence[Tensor], corrections: Tensor, together: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """The first pass, but for additions that `sums_of` makes.

    Args:
        p: Parameters `(*batch, rows, rest)`.
        g: Gradients, the same shape.
        moments: Of the last step.
        corrections: As in `see`, of this step.
        together: So many rows are added up before anything is stored; divides their number.

    Returns:
        For each of the `ROW_CHANNELS` products what is to be summed over columns, `(*batch, rows / together, rest)`;
        and sums over rows, for every row of `together` of each product, `(*batch, rows / together)`.
    """
    arrays = [torch.unflatten(x, -2, (-1, together)).unbind(-2) for x in (p, g, *moments)]
    found = []
    for now_p, now_g, *now_moments in zip(*arrays, strict=True):  # (*batch, rows / together, rest)
        new = advance(now_g, now_moments)
        found.append(products_of(see(now_p, now_g, new, corrections)))
    columns = [
        sum(same[1:], same[0]) for same in zip(*found, strict=True)
    ]  # first: a compiler fuses in this order only
    return columns, [x.sum(-1) for products in found for x in products]


def sums_of(columns: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put the sums of the first pass together.

    Args:
        columns: As `look` returns them.
        rows: As `look` returns them.

    Returns:
        Over rows `(*batch, rows, ROW_CHANNELS)` and over columns `(*batch, rest, ROW_CHANNELS)`.
    """
    by_row = torch.unflatten(torch.stack(list(rows), -1), -1, (-1, ROW_CHANNELS)).flatten(-3, -2)
    return by_row, torch.stack([x.sum(-2) for x in columns], -1)


def move(
    p: Tensor,
    g: Tensor,
    moments: Sequence[Tensor],
    corrections: Tensor,
    heard: Tensor,
    gain: Tensor | None = None,
    network: Network | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The second pass.

    Args:
        p: Parameters `(*batch, rows, rest)`.
        g: Gradients, the same shape.
        moments: Of the last step.
        corrections: As in `see`, of this step.
        heard: What rows and tensors say, `(*batch, rows or 1, heard channels)`; two where there is no M: h_0 and decay.
        gain: What columns and taps say, `(*batch, 1, rest)`.
        network: The network per weight, if the form has one.

    Returns:
        Update and new moments, in the precision of the moments.
    """
    new = advance(g, moments)
    raw = see(p, g, new, corrections)
    first, *said, decay = heard.unsqueeze(-2).unbind(-1)  # (*batch, rows or 1, 1) each
    update = raw[0] * first
    if network is not None:
        units, activity, said = said[:2], said[2], said[3:]
        update = update + first * activity * _answer([*_scaled(raw, *units)], said, network)
    elif said:
        *coefficients, unit = said
        channels = [*raw[1:4], (raw[4] * unit).clamp(-CLIP, CLIP)]
        for x, c in zip(channels, coefficients, strict=True):
            update = update + x * c
    if gain is not None:
        update = update * gain
    return update + p.to(update.dtype) * decay, new


def move_(p: Tensor, g: Tensor, moments: Sequence[Tensor], *said: Any, still: bool = False) -> None:
    """The second pass in place.

    Args:
        p: Parameters, moved unless `still`.
        g: As in `move`.
        moments: Of the last step; become those of this one.
        said: The other arguments of `move`.
        still: Leave parameters as they are.
    """
    update, new = move(p, g, moments, *said)
    if not still:
        p.copy_(p + update)
    for old, value in zip(moments, new, strict=True):
        old.copy_(value)


def _scaled(raw: Sequence[Tensor], relative: Tensor, shared: Tensor) -> list[Tensor]:
    """Raw channels times their units."""
    return [*raw[:3], raw[3] * relative, (raw[4] * shared).clamp(-CLIP, CLIP)]


def _answer(channels: Sequence[Tensor], heard: Sequence[Tensor], network: Network) -> Tensor:
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
