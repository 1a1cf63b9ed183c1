"""Message passing between neurons and tensors, tied by role: neurons talk, weights listen.

Parameters belong to *roles* (the only dimension of a vector; the rows, the columns, the taps of a matrix or kernel),
not to layer numbers, so that one set of them serves every architecture, depth and width:

    h0      = E_role(pooled rows) + E(tensor features)          an embedding for every row
    h       = tanh(h0 + A mean of neurons + B tensor)           neuron_to_row, tensor_to_row
    neuron  = mean of h over the rows of the neuron
    z       = tanh(z0 + C mean of h + D mean of tensors)        row_to_tensor, tensors_to_tensor

After `rounds` rounds a head per role yields the coefficients of every row and every tensor. The last coefficient is
also linear in the inputs themselves, through a skip connection: a handful of numbers expresses the plain dependencies,
such as smaller steps for older networks. Without hidden channels the skip connection and a constant are all there is. A
weight combines the coefficients of its row, its column, its taps and its tensor: the cheap form of a stack of
equivariant layers, since messages cost O(neurons) and not O(weights). It commutes with permuting any axis, free or
fixed.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2, arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfn_optim.layers.incidence import ROLES, Incidence

HIDDEN_PARTS = ("_embedding", "_to_row", "_to_tensor", "_head")
"""In names of parameters that have no effect where the heads are zero."""


class SharedLinear(nn.Linear):
    """A linear map of rows whose tensors may have leading batch dimensions: one map for each member of a batch."""

    def forward(self, rows: Tensor) -> Tensor:
        """Apply it. `(*batch, N, C) -> (*batch, N, D)`; weight `(*batch, D, C)` or `(D, C)`, bias likewise."""
        if self.weight.dim() == 2:  # noqa: PLR2004 - one map for all: the same in fewer operations
            return super().forward(rows)
        mapped = rows @ self.weight.mT
        return mapped if self.bias is None else mapped + self.bias.unsqueeze(-2)


class MessagePassing(nn.Module):
    """From pooled rows and tensor features to coefficients of rows and tensors.

    Its parameters may have the leading dimensions of the batch (`torch.func.functional_call`): every member of the
    batch
    then has parameters of its own.

    Args:
        row_channels: Channels of the pooled rows.
        tensor_channels: Channels of the tensor features.
        hidden: Channels of the embeddings; 0 for the skip connection alone.
        out_channels: Coefficients of every row and every tensor.
        rounds: Rounds of messages. With 0 rounds no information passes between tensors.
    """

    def __init__(self, row_channels: int, tensor_channels: int, hidden: int, out_channels: int, rounds: int) -> None:
        super().__init__()
        self.hidden, self.out_channels = hidden, out_channels
        if hidden:
            self.row_embedding = nn.ModuleDict({role: SharedLinear(row_channels, hidden) for role in ROLES})
            self.tensor_embedding = SharedLinear(tensor_channels, hidden)
            self.neuron_to_row = _square_maps(hidden, rounds)
            self.tensor_to_row = _square_maps(hidden, rounds)
            self.row_to_tensor = _square_maps(hidden, rounds + 1)
            self.tensors_to_tensor = _square_maps(hidden, rounds + 1)
            self.row_head = nn.ModuleDict({role: SharedLinear(hidden, out_channels, bias=False) for role in ROLES})
            self.tensor_head = SharedLinear(hidden, out_channels, bias=False)
        self.tensor_bias = nn.Parameter(torch.empty(out_channels))
        self.row_skip = nn.ModuleDict({role: SharedLinear(row_channels, 1, bias=False) for role in ROLES})
        self.tensor_skip = SharedLinear(tensor_channels, 1, bias=False)
        with torch.no_grad():
            for value in self.output_parameters():
                value.zero_()

    def output_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters without which every coefficient is zero."""
        if self.hidden:
            yield from self.row_head.parameters()
            yield from self.tensor_head.parameters()
        yield self.tensor_bias
        yield from self.row_skip.parameters()
        yield from self.tensor_skip.parameters()

    @property
    def bypass_only(self) -> bool:
        """Whether no coefficient depends on the embeddings, only on the skip connection and the constant."""
        heads = (*self.row_head.parameters(), self.tensor_head.weight) if self.hidden else ()
        return not any(bool(weight.any()) for weight in heads)

    def forward(
        self, rows: Tensor, tensors: Tensor, incidence: Incidence, active: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pass messages and compute coefficients.

        Args:
            rows: Pooled features, `(*batch, N, row_channels)`, rows of one role contiguous as in `incidence`.
            tensors: `(*batch, T, tensor_channels)`.
            incidence: Which rows, neurons and tensors meet.
            active: 1 for rows, `(*batch, N)`, and tensors, `(*batch, T)`, of which messages are sent, else 0; None if
                all are.

        Returns:
            Coefficients of the rows `(*batch, N, out_channels)` and of the tensors `(*batch, T, out_channels)`.
        """
        row_skip, tensor_skip = _by_role(self.row_skip, rows, incidence), self.tensor_skip(tensors)
        bias = self.tensor_bias.unsqueeze(-2)
        if not self.hidden:
            return _as_last(row_skip, self.out_channels), _as_last(tensor_skip, self.out_channels) + bias
        h, z = self._embeddings(rows, tensors, incidence, active)
        by_row = _by_role(self.row_head, h, incidence) + _as_last(row_skip, self.out_channels)
        return by_row, self.tensor_head(z) + bias + _as_last(tensor_skip, self.out_channels)

    def _embeddings(
        self, rows: Tensor, tensors: Tensor, incidence: Incidence, active: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of rows `(*batch, N, hidden)` and tensors `(*batch, T, hidden)` after all rounds."""
        pair_weight, row_weight, tensor_weight = None, None, torch.ones_like(tensors[..., :1])
        if active is not None:
            pair_weight, row_weight = incidence.mean_weights(active[0])
            tensor_weight = active[1].unsqueeze(-1)
        tensor_weight = tensor_weight / tensor_weight.sum(-2, keepdim=True).clamp(min=1)
        z0 = self.tensor_embedding(tensors)  # (*batch, T, hidden)
        h0 = _by_role(self.row_embedding, rows, incidence) + incidence.tensors_to_rows(z0)  # (*batch, N, hidden)
        h, z = torch.tanh(h0), torch.tanh(z0)
        for k in range(len(self.row_to_tensor)):
            if k > 0:
                neurons = self.neuron_to_row[k - 1](incidence.rows_to_neurons(h, pair_weight))  # fewer than rows
                from_tensors = incidence.tensors_to_rows(self.tensor_to_row[k - 1](z))
                h = torch.tanh(h0 + incidence.neurons_to_rows(neurons) + from_tensors)
            from_all = self.tensors_to_tensor[k]((z * tensor_weight).sum(-2, keepdim=True))  # (*batch, 1, hidden)
            z = torch.tanh(z0 + self.row_to_tensor[k](incidence.rows_to_tensors(h, row_weight)) + from_all)
        return h, z


def _square_maps(hidden: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(SharedLinear(hidden, hidden, bias=False) for _ in range(count))


def _by_role(linears: nn.ModuleDict, rows: Tensor, incidence: Incidence) -> Tensor:
    """Apply to every row the map of its role. `(*batch, N, C) -> (*batch, N, D)`."""
    spans = [(role, span) for role, span in incidence.role_spans.items() if span[1] > span[0]]
    spans = spans or [("vector", (0, 0))]  # a network of scalars only
    return torch.cat([linears[role](rows[..., first:last, :]) for role, (first, last) in spans], -2)


def _as_last(values: Tensor, channels: int) -> Tensor:
    """Values `(..., 1)` as the last of some channels, `(..., channels)`; the others are zero."""
    return F.pad(values, (channels - 1, 0))
