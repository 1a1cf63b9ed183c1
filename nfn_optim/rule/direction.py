"""Base directions of an update: Adam's (`adam`), the orthogonal one (`orthogonal`), and those to come.

A direction is a linear combination of `terms` terms, the first of which is Adam's X = m^ / (sqrt(v^) + eps). Its class
defines, each in one place,

    state         `init_state`, `StepDirection.next_state`    what it remembers of a tensor, and how that changes
    reductions    `prepare`                                   the sums over the weights that it needs at a step
    combination   `terms_of`, `StepDirection.combine`         from its coefficient to those of its terms
    bound         `rms_bound`                                 on its size, by which updates out of range are recognised

To add one, write its class in a file of its own and name it in `nfn_optim.rule.config.DIRECTIONS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from nfn_optim.engine.executor import Executor, LowRank
from nfn_optim.engine.moments import State
from nfn_optim.engine.sharding import Shards
from nfn_optim.rule.pooled import Pooled


class StepDirection:
    """A direction at one step; this one is Adam's."""

    def combine(self, index: int, coefficients: Tensor) -> tuple[Tensor, LowRank | None]:
        """Coefficients of a block for the update pass.

        Args:
            index: Of the block.
            coefficients: Of the terms and, behind them, of everything else, `(*batch, rows or 1, terms + others)`;
                learning rate and row gains included.

        Returns:
            The coefficients with one for X in the place of those of the terms, `(*batch, rows or 1, 1 + others)`; and
            what of the direction is not proportional to X, as factors, if there is anything.
        """
        del index
        return coefficients, None

    def next_state(self, row_means: Mapping[int, Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """State for the steps to come, computed at a refresh.

        Args:
            row_means: Index of a tensor -> `Statistics` over each row of the whole tensor, packed,
                `(*batch, shape[0], STATISTICS)`.

        Returns:
            Index of a tensor, and the entries of its state that change.
        """
        del row_means
        return iter(())


class Direction(nn.Module, ABC):
    """A base direction; see the module's documentation. What it learns are its parameters."""

    terms: ClassVar[int]  # of which it is a combination, Adam's first

    def init_state(self, p: Tensor, batch_dims: int) -> dict[str, Tensor]:
        """State of a tensor `(*batch, *shape)` before the first step."""
        del p, batch_dims
        return {}

    @abstractmethod
    def terms_of(self, coefficient: Tensor, enabled: Tensor) -> Sequence[Tensor]:
        """Coefficients of the terms.

        Args:
            coefficient: Of the direction, `(*batch, F)`.
            enabled: 1 for rows of matrices whose update is in range, else 0: there the direction must be Adam's.

        Returns:
            `terms` tensors `(*batch, F)`.
        """

    @abstractmethod
    def rms_bound(self, adam_rms: Tensor, is_matrix: Tensor) -> Tensor:
        """A bound on the direction's root mean square in a row, over active columns.

        Args:
            adam_rms: That of X, `(*batch, F)`.
            is_matrix: 1 for rows of matrices, else 0; `(F,)`.

        Returns:
            `(*batch, F)`.
        """

    def prepare(
        self,
        executor: Executor,
        names: Sequence[str],
        state: State,
        batch_dims: int,
        shards: Shards | None,
        pooled: Pooled | None,
    ) -> StepDirection:
        """The reductions over the weights that a step needs.

        Args:
            executor: Of the step.
            names: Of all tensors, in the order of their indices.
            state: By name.
            batch_dims: How many leading dimensions are batch.
            shards: Which parts of the tensors are local; None if all are whole.
            pooled: Statistics of rows and tensors; None between two refreshes.
        """
        del executor, names, state, batch_dims, shards, pooled
        return StepDirection()

    @torch.no_grad()
    def zero_(self) -> None:
        """Make it Adam's, in place."""
        for value in self.parameters():
            value.zero_()
