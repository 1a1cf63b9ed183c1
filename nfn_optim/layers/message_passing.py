"""NF-layers tied by role: neurons talk, weights listen.

The coefficients of this stack belong to *roles* (the only dimension of a vector; the rows, the columns, the taps of a
matrix or kernel), never to layer numbers, so that one set of them serves every architecture, depth and width.

    h0     = R_role(pooled rows) + T(tensor features)          one embedding for every row
    h      = tanh(h0 + U neurons + V tensors)                  a row hears its neurons and its tensor ...
    neurons = mean of h over the rows of the neuron            ... which hear all the rows that they have
    tensors = tanh(z0 + W mean of h + G mean of tensors)       ... in every tensor of the network

after `rounds` of which a readout per role gives every row and every tensor its coefficients. The last of them, which
the update rule makes its gain of, is also linear in what the embedding was made of: so a handful of numbers says the
plain things, such as smaller steps for older networks. A weight then listens to
the sum of what its row, its column, its taps and its tensor say: the cheap form of a stack of equivariant layers, since
messages cost O(neurons) and not O(weights). It commutes with permuting any axis, free or fixed.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2, arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfn_optim.layers.incidence import ROLES, Incidence


class SharedLinear(nn.Linear):
    """A linear map of rows, whose tensors may be given leading dimensions: one map for each member of a batch."""

    def forward(self, rows: Tensor) -> Tensor:
        """Apply it. `(*batch, N, C) -> (*batch, N, D)`; weight `(*batch, D, C)` or `(D, C)`, bias likewise."""
        if self.weight.dim() == 2:  # noqa: PLR2004 - one map for all: the same in fewer operations
            return super().forward(rows)
        mapped = rows @ self.weight.mT
        return mapped if self.bias is None else mapped + self.bias.unsqueeze(-2)


class TiedStack(nn.Module):
    """From pooled rows and tensor features to coefficients for rows and tensors.

    Args:
        row_channels: Channels of the pooled rows.
        tensor_channels: Channels of the tensor features.
        hidden: Channels of the embeddings.
        out_channels: Coefficients that every row and every tensor gets.
        rounds: Rounds of messages. With 0 rounds no neuron hears of another tensor.

    Its parameters may be given leading dimensions that are those of the batch (`torch.func.functional_call`): every
    member of the batch then has a stack of its own.
    """

    def __init__(self, row_channels: int, tensor_channels: int, hidden: int, out_channels: int, rounds: int) -> None:
        super().__init__()
        self.embed_rows = nn.ModuleDict({role: SharedLinear(row_channels, hidden) for role in ROLES})
        self.embed_tensors = SharedLinear(tensor_channels, hidden)
        self.hear_neurons = nn.ModuleList(SharedLinear(hidden, hidden, bias=False) for _ in range(rounds))
        self.hear_tensors = nn.ModuleList(SharedLinear(hidden, hidden, bias=False) for _ in range(rounds))
        self.gather_rows = nn.ModuleList(SharedLinear(hidden, hidden, bias=False) for _ in range(rounds + 1))
        self.gather_all = nn.ModuleList(SharedLinear(hidden, hidden, bias=False) for _ in range(rounds + 1))
        self.read_rows = nn.ModuleDict({role: SharedLinear(hidden, out_channels, bias=False) for role in ROLES})
        self.read_tensors = SharedLinear(hidden, out_channels)
        self.bypass_rows = nn.ModuleDict({role: SharedLinear(row_channels, 1, bias=False) for role in ROLES})
        self.bypass_tensors = SharedLinear(tensor_channels, 1, bias=False)
        for value in self.readouts():
            nn.init.zeros_(value)

    def readouts(self) -> Iterator[nn.Parameter]:
        """The parameters without which every coefficient is zero."""
        for readout in (self.read_rows, self.read_tensors, self.bypass_rows, self.bypass_tensors):
            yield from readout.parameters()

    @property
    def silent(self) -> bool:
        """Whether nothing is read out of the embeddings, so that all is said by the bypass and the constant part."""
        return not any(bool(weight.any()) for weight in (*self.read_rows.parameters(), self.read_tensors.weight))

    def forward(self, rows: Tensor, tensors: Tensor, incidence: Incidence) -> tuple[Tensor, Tensor]:
        """Exchange messages and read the coefficients out.

        Args:
            rows: Pooled features, `(*batch, N, row_channels)`, rows of one role contiguous as in `incidence`.
            tensors: `(*batch, T, tensor_channels)`.
            incidence: Where rows, neurons and tensors meet.

        Returns:
            Coefficients of the rows `(*batch, N, out_channels)` and of the tensors `(*batch, T, out_channels)`.
        """
        z0 = self.embed_tensors(tensors)  # (*batch, T, hidden)
        h0 = self._by_role(self.embed_rows, rows, incidence) + incidence.tensors_to_rows(z0)  # (*batch, N, hidden)
        h, z = torch.tanh(h0), torch.tanh(z0)
        for number in range(len(self.gather_rows)):
            if number > 0:
                neurons = self.hear_neurons[number - 1](incidence.rows_to_neurons(h))  # fewer than rows
                heard = incidence.neurons_to_rows(neurons)
                heard = heard + incidence.tensors_to_rows(self.hear_tensors[number - 1](z))
                h = torch.tanh(h0 + heard)
            everyone = self.gather_all[number](z.mean(-2, keepdim=True))  # (*batch, 1, hidden)
            z = torch.tanh(z0 + self.gather_rows[number](incidence.rows_to_tensors(h)) + everyone)
        by_row, by_tensor = self._by_role(self.read_rows, h, incidence), self.read_tensors(z)
        plainly = self._by_role(self.bypass_rows, rows, incidence), self.bypass_tensors(tensors)
        return _add_to_last(by_row, plainly[0]), _add_to_last(by_tensor, plainly[1])

    @staticmethod
    def _by_role(linears: nn.ModuleDict, rows: Tensor, incidence: Incidence) -> Tensor:
        """Apply to every row the map of its role. `(*batch, N, C) -> (*batch, N, D)`."""
        spans = [(role, span) for role, span in incidence.role_spans.items() if span[1] > span[0]]
        spans = spans or [("vector", (0, 0))]  # a network of scalars only
        return torch.cat([linears[role](rows[..., first:last, :]) for role, (first, last) in spans], -2)


def _add_to_last(values: Tensor, more: Tensor) -> Tensor:
    """Add `(..., 1)` to the last channel of `(..., C)`."""
    return values + F.pad(more, (values.shape[-1] - 1, 0))
