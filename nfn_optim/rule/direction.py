"""Base directions of an update: Adam's (`adam`), the orthogonal one (`orthogonal`), and those to come.

A direction is a linear combination of `terms` terms, the first of which is

    X = ((1 - a) m^ + a g + b M^) / (sqrt(v^) + eps)

Adam's direction with the newest gradient and the slow moment mixed in; the *mixture* a, b of every row is a coefficient
of the rule. Its class defines, each in one place,

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

from nfn_optim.engine.executor import Executor, LowRank, Mixture
from nfn_optim.engine.sharding import Shards
from nfn_optim.rule.coefficients import FeatureCoefficients
from nfn_optim.rule.pooled import Pooled
from nfn_optim.rule.step import Step


def mixed(coefficients: Tensor) -> Tensor:
    """Coefficients of the features, from those of X and everything else.

    Args:
        coefficients: Of X, `FeatureCoefficients` and of weight decay, `(*batch, rows or 1, 9)`; without a learned part
            of X and of weight decay only.

    Returns:
        `passes.RowCoefficients` packed, `(*batch, rows or 1, 7)`; without a learned part unchanged.
    """
    x, *others, decay = coefficients.unbind(-1)
    if not others:
        return coefficients
    c = FeatureCoefficients(*others)
    slow, gradient = c.slow + c.slow_part * x, c.gradient + c.gradient_part * x
    return torch.stack([x - c.gradient_part * x, slow, gradient, c.weight, c.momentum, c.momentum_unit, decay], -1)


class StepDirection:
    """A direction at one step; this one is X."""

    def combine(self, index: int, coefficients: Tensor) -> tuple[Tensor, LowRank | None]:
        """Coefficients of a block for the update pass.

        Args:
            index: Of the block.
            coefficients: Of the terms and, behind them, of everything else, `(*batch, rows or 1, terms + others)`;
                learning rate and row gains included.

        Returns:
            `passes.RowCoefficients` packed; and what else there is of the direction, as factors: without X, or with it
            and a zero coefficient of X where the second factor is the identity.
        """
        del index
        return mixed(coefficients), None

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
    def rms_bound(self, rms: Tensor, is_matrix: Tensor) -> Tensor:
        """A bound on the direction's root mean square in a row, over active columns.

        Args:
            rms: A bound on that of X, `(*batch, F)`.
            is_matrix: 1 for rows of matrices, else 0; `(F,)`.

        Returns:
            `(*batch, F)`.
        """

    def prepare(
        self,
        executor: Executor,
        step: Step,
        shards: Shards | None,
        pooled: Pooled | None,
        mixture: Mixture,
    ) -> StepDirection:
        """The reductions over the weights that a step needs.

        Args:
            executor: Of the step.
            step: The step.
            shards: Which parts of the tensors are local; None if all are whole.
            pooled: Statistics of rows and tensors; None between two refreshes.
            mixture: Of which X is made, by index of the block; without an entry it is Adam's.
        """
        del executor, step, shards, pooled, mixture
        return StepDirection()

    @torch.no_grad()
    def zero_(self) -> None:
        """Make it Adam's, in place."""
        for value in self.parameters():
            value.zero_()
