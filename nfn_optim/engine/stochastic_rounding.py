"""Moments in bfloat16, rounded up or down by chance, so that what is too small for a digit adds up all the same.

A bfloat16 number has the upper 16 of the 32 bits of a float32 number x; it is x rounded if the lower ones, L, decide
with what probability it is the next one away from zero,

    bits of rounded(x) = (bits of x + n) with the lower 16 set to 0,    n in 0 ... 65535: so up with chance L / 65536

Then the mean of rounded(x) is x. Rounding to nearest instead, v <- .999 v + .001 g^2 stands still wherever it would
change by less than half a digit, 1/512 to 1/256 of v. There is no generator of random numbers. The noise n of a weight
is what is left of its own numbers when they have been mixed beyond recognition, modulo 2^32:

    h <- 32 bits of g  xor  16 bits of the old v      what this weight has come to
    h <- h A + t B                                    the step, since weights without a gradient must forget too
    h <- h xor (h >> 15),  h <- h C,  h <- h xor (h >> 13)
    h <- h D_k,            n_k = h >> 16              for each moment k another constant

So a run can be repeated bit for bit, how tensors are divided, stacked or compiled makes no difference, and neurons that
are renamed take their noise with them. All that goes in is exact, g as it comes and v as it is kept: where two ways to
compute x differ in its last bit, n does not, and the rounded numbers differ once in some ten thousand times. Weights
with the same g and v have the same noise; each is right on average, but not independent of the others.

References:
    Deep Learning with Limited Numerical Precision (Gupta et al., 2015), Sec. 3, arXiv:1502.02551
    Revisiting BFloat16 Training (Zamirai et al., 2020), arXiv:2010.06192: where rounding to nearest stands still
    Hash Functions for Integers (Wellons, 2018), Prospecting for Hash Functions: shifts and multiplications in turn
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SPREAD, STEP, AGAIN = 0x2C1B3C6D, -0x61C88647, 0x297A2D39  # A, B and C: odd, about half of their bits 1
EACH = (0x3504F333, 0x2127599B, 0x5BD1E995)  # D, of m, v and M
LOWER = 0xFFFF  # the bits of a float32 number that a bfloat16 number has not


def is_short(moment: Tensor) -> bool:
    """Whether a moment is kept in bfloat16."""
    return moment.dtype == torch.bfloat16


def widened(moments: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Moments to compute with: those in bfloat16 in the precision of `like`, others as they are."""
    return [x.to(like.dtype) if is_short(x) else x for x in moments]


def rounded(new: Sequence[Tensor], moments: Sequence[Tensor], g: Tensor, steps: Tensor) -> list[Tensor]:
    """New moments as they are to be kept; may change `new` in place where that is so.

    Args:
        new: In full precision, `(*batch, rows, rest)` each.
        moments: Those of the last step, in the precision in which these will be kept; the same shapes.
        g: Gradients, the same shape.
        steps: Steps taken, this one included, `(*batch, rows or 1)`.

    Returns:
        `new`, or where moments are kept in bfloat16 float32 numbers that bfloat16 has too.
    """
    if not is_short(moments[0]):
        return list(new)
    h = _mixed(g, moments[1], steps.unsqueeze(-1))
    found = []
    for x, constant in zip(new, EACH, strict=False):  # without a slow moment there are two
        h = h.mul_(constant)
        noise = (h >> 16).bitwise_and_(LOWER)  # the shift copies the sign
        short = x.to(torch.float32)
        short.view(torch.int32).add_(noise).bitwise_and_(~LOWER)
        found.append(short)
    return found


def _mixed(g: Tensor, v: Tensor, steps: Tensor) -> Tensor:
    """The noise h before it is that of one moment, `(*batch, rows, rest)`; steps `(*batch, rows or 1, 1)`."""
    h = v.to(torch.float32).view(torch.int32)  # a view as int16 would keep the compiler from using vectors
    h = h.bitwise_right_shift_(16).bitwise_xor_(g.to(torch.float32).view(torch.int32))
    h = h.mul_(SPREAD).add_(steps.to(torch.int32) * STEP)
    h = h.bitwise_xor_(h >> 15).mul_(AGAIN)
    return h.bitwise_xor_(h >> 13)
