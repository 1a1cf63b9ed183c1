"""Adam's direction X, with what is mixed into it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from nfn_optim.rule.direction import Direction


class AdamDirection(Direction):
    """Adam's direction, for tensors of any shape."""

    terms: ClassVar[int] = 1

    def terms_of(self, coefficient: Tensor, enabled: Tensor) -> list[Tensor]:
        """See `Direction`."""
        del enabled
        return [coefficient]

    def rms_bound(self, rms: Tensor, is_matrix: Tensor) -> Tensor:
        """See `Direction`."""
        del is_matrix
        return rms
