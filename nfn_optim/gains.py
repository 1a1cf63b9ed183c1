"""The factors of the gain, from what rows and tensors say."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nfn_optim.layers import Incidence

GAIN_RANGE = 3.0  # no part of a exceeds this in size


class Gains(nn.Module):
    """The factors of the gain; a module without parameters, so that they can be heard by a forward hook."""

    def forward(self, by_row: Tensor, by_tensor: Tensor, units: Tensor, incidence: Incidence) -> tuple[Tensor, Tensor]:
        """Turn what was said into factors, each of what was said between exp(-GAIN_RANGE) and exp(GAIN_RANGE).

        Args:
            by_row: What every row says, `(*batch, N)`.
            by_tensor: What every tensor says, `(*batch, T)`.
            units: What a tensor's updates are measured in, over that of a typical one, `(*batch, T)`.
            incidence: Whose rows and tensors these are; for those who listen.

        Returns:
            The factors of the rows `(*batch, N)` and of the tensors `(*batch, T)`.
        """
        return _gain(by_row), units * _gain(by_tensor)


def _gain(said: Tensor) -> Tensor:
    """A factor of the gain, between exp(-GAIN_RANGE) and exp(GAIN_RANGE)."""
    return torch.exp(GAIN_RANGE * torch.tanh(said / GAIN_RANGE))
