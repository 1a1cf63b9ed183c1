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


def most_of(by_row: Tensor, incidence: Incidence) -> Tensor:
    """The most that columns and taps multiply a weight with, from the factors of rows: `(*batch, N) -> (*batch, T)`."""
    most = []
    for segments in incidence.segments:
        value = torch.ones_like(by_row[..., 0]) if segments else by_row.new_ones(by_row.shape[:-1])
        for s in segments[1:]:
            value = value * by_row[..., s.start : s.start + s.length].detach().amax(-1)
        most.append(value)
    return torch.stack(most, -1)


def _gain(said: Tensor) -> Tensor:
    """A factor of the gain, between exp(-GAIN_RANGE) and exp(GAIN_RANGE)."""
    return torch.exp(GAIN_RANGE * torch.tanh(said / GAIN_RANGE))
