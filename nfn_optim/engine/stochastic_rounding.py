"""Moments in bfloat16 with stochastic rounding, so that increments smaller than one digit accumulate all the same.

A bfloat16 number consists of the upper 16 of the 32 bits of a float32 number x. With L the lower 16 bits,

    bits of rounded(x) = (bits of x + n) with the lower 16 cleared,    n in 0 ... 65535: up with probability L / 65536

so that the mean of rounded(x) is x. With rounding to nearest, v <- .999 v + .001 g^2 would stand still wherever it
changes by less than half a digit, 1/512 to 1/256 of v. There is no random number generator: the noise n of a weight is
a hash of its own numbers, modulo 2^32,

    h <- 32 bits of g  xor  16 bits of the old v
    h <- h A + t B                                    t is the step: weights without a gradient must decay too
    h <- h xor (h >> 15),  h <- h C,  h <- h xor (h >> 13)
    h <- h D_k,            n_k = h >> 16              another constant for each moment k

A run can therefore be repeated bit for bit; sharding, stacking and compilation make no difference; and permuted neurons
take their noise with them. All inputs of the hash are exact (g as it arrives, v as it is stored): where two ways to
compute x differ in its last bit, n does not, and the rounded numbers differ about once in ten thousand. Weights with
the same g and v have the same noise: each is unbiased, but they are not independent of each other.

References:
    Deep Learning with Limited Numerical Precision (Gupta et al., 2015), Sec. 3, arXiv:1502.02551
    Revisiting BFloat16 Training (Zamirai et al., 2020), arXiv:2010.06192: where rounding to nearest stands still
    Hash Functions for Integers (Wellons, 2018), Prospecting for Hash Functions: alternating shifts and multiplications
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HASH_A, HASH_B, HASH_C = 0x2C1B3C6D, -0x61C88647, 0x297A2D39  # odd, about half of their bits 1
HASH_D = (0x3504F333, 0x2127599B, 0x5BD1E995)  # of m, v and M
LOWER_BITS = 0xFFFF  # of float32, which bfloat16 lacks


def is_bfloat16(moment: Tensor) -> bool:
    """Whether a moment is stored in bfloat16."""
    return moment.dtype == torch.bfloat16


def to_compute_dtype(moments: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Moments to compute with: bfloat16 ones in the dtype of `like`, others as they are."""
    return [x.to(like.dtype) if is_bfloat16(x) else x for x in moments]


def round_moments(new_moments: Sequence[Tensor], moments: Sequence[Tensor], g: Tensor, steps: Tensor) -> list[Tensor]:
    """Round new moments to the dtype in which they are stored; may change `new_moments` in place.

    Args:
        new_moments: In full precision, `(*batch, rows, rest)` each.
        moments: Of the last step, in the dtype in which the new ones will be stored; the same shapes.
        g: Gradients, the same shape.
        steps: Steps taken, this one included, `(*batch, rows or 1)`.

    Returns:
        `new_moments`, or float32 tensors of values that bfloat16 represents, where moments are stored in bfloat16.
    """
    if not is_bfloat16(moments[0]):
        return list(new_moments)
    h = _hash(g, moments[1], steps.unsqueeze(-1))
    rounded = []
    for x, constant in zip(new_moments, HASH_D, strict=False):  # without a slow moment there are two
        h = h.mul_(constant)
        noise = (h >> 16).bitwise_and_(LOWER_BITS)  # the shift copies the sign
        short = x.to(torch.float32)
        short.view(torch.int32).add_(noise).bitwise_and_(~LOWER_BITS)
        rounded.append(short)
    return rounded


def _hash(g: Tensor, v: Tensor, steps: Tensor) -> Tensor:
    """The noise h that all moments share, `(*batch, rows, rest)`; steps `(*batch, rows or 1, 1)`."""
    h = v.to(torch.float32).view(torch.int32)  # a view as int16 would keep the compiler from using vectors
    h = h.bitwise_right_shift_(16).bitwise_xor_(g.to(torch.float32).view(torch.int32))
    h = h.mul_(HASH_A).add_(steps.to(torch.int32) * HASH_B)
    h = h.bitwise_xor_(h >> 15).mul_(HASH_C)
    return h.bitwise_xor_(h >> 13)
