"""The passes over all arrays of a network at one step: pure, or in place by a kernel.

Where a step is pure, and for small arrays that are not compiled, new moments and raw channels are found once and kept
to the end of the step. A kernel finds those of the others again in every pass, and holds no more than a band of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nfn_optim.engine import passes
from nfn_optim.engine.blocks import Block
from nfn_optim.engine.executor import Kernel
from nfn_optim.engine.passes import Network

Factors = tuple[Tensor, Tensor]
"""What of the orthogonal direction is in the subspace, `(*batch, rows, k)` times `(*batch, k, rest)`."""


class Sweep:
    """The passes of one step.

    Args:
        blocks: All arrays of the network.
        kernel: Who runs the passes in place; None for a pure step.
    """

    def __init__(self, blocks: Sequence[Block], kernel: Kernel | None) -> None:
        self.blocks = blocks
        self._kernel = kernel
        kept = range(len(blocks)) if kernel is None else kernel.kept([block.arrays[0] for block in blocks])
        self._seen = {place: passes.take(*blocks[place].arrays) for place in kept}

    def sums(self, place: int) -> tuple[Tensor, Tensor]:
        """Sums of products of raw channels over rows and over columns, see `passes.sums_of`."""
        if place in self._seen:
            return passes.sums_of(self._seen[place][1])
        assert self._kernel is not None
        return self._kernel.look(*self.blocks[place].arrays)

    def project(self, place: int, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Adam's direction X as seen from a subspace, X basis, `(*batch, rows, k)`, and the sum of its squares."""
        if place in self._seen:
            x = self._seen[place][1][0]
            return x @ basis, x.square().sum((-2, -1))
        assert self._kernel is not None
        return self._kernel.project(*self.blocks[place].arrays, basis)

    def image(self, place: int, polar: Tensor) -> Tensor:
        """X^T polar, `(*batch, rest, k)`."""
        if place in self._seen:
            return self._seen[place][1][0].mT @ polar
        assert self._kernel is not None
        return self._kernel.image(*self.blocks[place].arrays, polar)

    def answer(
        self, place: int, heard: Tensor, gain: Tensor | None, network: Network | None, ahead: Factors | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The update and the new moments of an array whose channels are kept; arguments as in `passes.answer`."""
        moments, raw = self._seen[place]
        inside = None if ahead is None else ahead[0] @ ahead[1]
        return passes.answer(raw, self.blocks[place].arrays[0], heard, gain, network, inside), moments

    def move_(
        self,
        place: int,
        heard: Tensor,
        gain: Tensor | None,
        network: Network | None,
        ahead: Factors | None,
        still: bool,
    ) -> None:
        """Change an array in place; leave parameters as they are if `still`."""
        assert self._kernel is not None
        p, g, moments, corrections = self.blocks[place].arrays
        if place in self._seen:
            update = None if still else self.answer(place, heard, gain, network, ahead)[0]
            passes.store(p, g, moments, corrections, update, self._seen[place][0], self._kernel.usable)
        else:
            self._kernel.move_(*self.blocks[place].arrays, heard, gain, network, ahead, still)
