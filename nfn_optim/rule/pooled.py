"""Statistics of all rows and tensors of a network: means over what is active.

A row (one entry of one dimension) or a tensor is *active* if any of its entries has features other than zero, that is,
if it ever had a gradient. Means are over active rows and columns only, and so are sizes: a tensor is described as if it
consisted of these alone. Thus tokens that never occurred, inputs that are always zero and experts without tokens have
no influence on the step of the others, however many they are.

    mean over a row of a matrix  =  sum over the row / active columns

Gradients may be sparse in time too: in the table of a large vocabulary almost all rows have a direction X, but few one
that counts. Sizes that enter the direction of a matrix therefore count rows softly by their energy e, the sum of the
squares of X over the row,

    count  =  sum of  (1 + SOFTNESS) e / (e + SOFTNESS e')          e' = sum of e^2 / sum of e

which is the number of rows if all have the same energy, and to which rows without energy contribute nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nfn_optim.engine.blocks import Sums
from nfn_optim.engine.executor import Executor
from nfn_optim.engine.moments import SQRT_EPS
from nfn_optim.engine.sharding import Shards
from nfn_optim.layers import Incidence

SOFTNESS = 0.01  # a row of this fraction of the typical energy counts half


@dataclass(frozen=True)
class Pooled:
    """The result of the first pass over the weights.

    Attributes:
        rows: `Statistics` of the rows in the order of `incidence`, packed, `(*batch, N, STATISTICS)`.
        leading: The same of the leading rows, `(*batch, F, STATISTICS)`.
        tensors: The same of the tensors, `(*batch, T, STATISTICS)`.
        active_rows: 1 where active, else 0; `(*batch, N)`.
        active_leading: Likewise, `(*batch, F)`.
        active_tensors: Likewise, `(*batch, T)`.
        counts: Number of active rows of every dimension, at least 1; `(*batch, T, max_ndim)`.
        incidence: Of the network.
    """

    rows: Tensor
    leading: Tensor
    tensors: Tensor
    active_rows: Tensor
    active_leading: Tensor
    active_tensors: Tensor
    counts: Tensor
    incidence: Incidence

    @classmethod
    def of(cls, executor: Executor, incidence: Incidence, shards: Shards | None) -> Pooled:
        """Reduce all tensors, whole ones where they are sharded."""
        by_index: dict[int, Sums] = {}
        for index, block in enumerate(executor.blocks):
            by_index |= block.layout.sums(*executor.sums(index))
        sums = [by_index[i] for i in range(len(incidence.names))]
        return cls.of_sums(sums if shards is None else shards.reduce_sums(incidence.names, sums), incidence)

    @classmethod
    def of_sums(cls, sums: Sequence[Sums], incidence: Incidence) -> Pooled:
        """Means from the sums over every tensor."""
        tensors = torch.stack([whole for _, whole in sums], -2)  # (*batch, T, STATISTICS)
        index = incidence.at(tensors)
        rows = torch.cat([tensors[..., :0, :], *(x for by_dim, _ in sums for x in by_dim)], -2)
        rows = rows.index_select(-2, index["gathered"])
        leading = torch.cat([by_dim[0] if by_dim else whole.unsqueeze(-2) for by_dim, whole in sums], -2)
        active_rows = _active(rows)
        counts = incidence.counts_of(active_rows).clamp(min=1)  # (*batch, T, max_ndim)
        entries = counts.prod(-1)  # (*batch, T)
        others = entries.unsqueeze(-1) / counts
        of_leading = others[..., 0].index_select(-1, index["tensor_of_leading"])
        return cls(
            rows=rows / incidence.of_segments(others).unsqueeze(-1),
            leading=leading / of_leading.unsqueeze(-1),
            tensors=tensors / entries.unsqueeze(-1),
            active_rows=active_rows,
            active_leading=_active(leading),
            active_tensors=_active(tensors),
            counts=counts,
            incidence=incidence,
        )

    @property
    def entries(self) -> Tensor:
        """Number of entries in active rows and columns, `(*batch, T)`."""
        return self.counts.prod(-1) * self.active_tensors

    def leading_by_tensor(self) -> dict[int, Tensor]:
        """`Statistics` of the leading rows of every tensor, packed, by its index."""
        return dict(enumerate(torch.split(self.leading, self.incidence.lengths, -2)))

    def columns(self) -> Tensor:
        """Soft count of the columns of every tensor, all dimensions but the first together; `(*batch, T)`."""
        energy, incidence = self.rows[..., 0], self.incidence
        typical = incidence.counts_of(energy.square()) / (incidence.counts_of(energy) + SQRT_EPS)
        counts = incidence.counts_of(_weight(energy, incidence.of_segments(typical)))
        return counts[..., 1:].prod(-1)


def soft_count(energy: Tensor) -> Tensor:
    """The number of rows that count, from the energy of each; `(*batch, rows) -> (*batch,)`."""
    typical = energy.square().sum(-1, keepdim=True) / (energy.sum(-1, keepdim=True) + SQRT_EPS)
    return _weight(energy, typical).sum(-1)


def _weight(energy: Tensor, typical: Tensor) -> Tensor:
    """The weight of a row in the soft count."""
    return (1 + SOFTNESS) * energy / (energy + SOFTNESS * typical + SQRT_EPS)


def _active(statistics: Tensor) -> Tensor:
    """1 where any of the sums of squares is not zero, else 0. `(..., STATISTICS) -> (...)`."""
    return (statistics[..., :-1].detach().sum(-1) != 0).to(statistics.dtype)
