"""The two passes over the weights in place, eager or compiled; the functions are the same.

A pass goes over a tensor in bands of rows. That bounds what it holds at a time whatever the size of the
tensor, and keeps it in the processor's cache. Compiled, each pass over a band is one loop over its weights: a few
graphs for each kind of array (matrices, vectors, an odd last band) and precision, whatever the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nfn_optim.engine.inductor import run
from nfn_optim.engine.passes import Network, collect, direction, look, move_, sums_of, take

TOGETHER = 2  # rows that are added up in registers before their sum is stored; divides the size of bands


@dataclass(frozen=True)
class Kernel:
    """The passes in place, over arrays without batch dimensions.

    Small matrices may come in stacks, `(count, rows, rest)` instead of `(rows, rest)` and likewise everywhere.

    Args:
        compiled: Compile them at their first use; needs a C++ compiler on a CPU. Where it fails, one warning, and all
            goes on uncompiled.
        band: Weights that are taken at a time, some 20 numbers held for each.
        least: Arrays of fewer weights are not compiled, since their cost is that of calling anything at all; those of
            one shape come in stacks.
        usable: Whether the step is to change anything, 0-d; None if it is.
    """

    compiled: bool = False
    band: int = 2**18
    least: int = 2**14
    usable: Tensor | None = None

    def kept(self, params: Sequence[Tensor]) -> list[int]:
        """Arrays, by place, whose channels had better be kept than found again: as many as one band holds.

        Args:
            params: Parameters `(rows, rest)`.
        """
        found, weights = [], 0
        for place in sorted(range(len(params)), key=lambda place: params[place].numel()):
            weights += params[place].numel()
            if weights > self.band or self._compiles(params[place]):
                break
            found.append(place)
        return found

    def look(self, p: Tensor, g: Tensor, moments: Sequence[Tensor], corrections: Tensor) -> tuple[Tensor, Tensor]:
        """The first pass: sums `(rows, ROW_CHANNELS)` and `(rest, ROW_CHANNELS)`."""
        by_row, by_column = [], []
        for part in self._bands(p):
            now_p, now_g, *now = (x[part] for x in (p, g, *moments))
            correction = _rows(corrections, part)
            if self._compiles(p):
                together = TOGETHER if len(now_p) % TOGETHER == 0 and len(corrections) == 1 else 1
                rows, columns = collect(*run(look, now_p, _dense(now_g), now, correction, together))
            else:
                rows, columns = sums_of(take(now_p, now_g, now, correction)[1])
            by_row.append(rows)
            by_column.append(columns)
        return by_row[0] if len(by_row) == 1 else torch.cat(by_row), sum(by_column[1:], by_column[0])

    def project(
        self, p: Tensor, g: Tensor, moments: Sequence[Tensor], corrections: Tensor, basis: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Raw channel 0 of this step, X, as seen from a subspace.

        Args:
            p: Parameters `(rows, rest)`.
            g: Gradients, the same shape.
            moments: Of the last step.
            corrections: As in `passes.see`, of this step.
            basis: `(rest, k)`.

        Returns:
            X basis, `(rows, k)`, and the sum of the squares of X, 0-d.
        """
        seen = corrections.new_empty((*p.shape[:-1], basis.shape[-1]))
        energy = corrections.new_zeros(p.shape[:-2])
        for part, x, size in self._directions(p, g, moments, corrections):
            torch.matmul(x, basis, out=seen[part])
            energy += size
        return seen, energy

    def image(self, p: Tensor, g: Tensor, moments: Sequence[Tensor], corrections: Tensor, polar: Tensor) -> Tensor:
        """X^T polar, `(rest, k)`; polar `(rows, k)`, otherwise as `project`."""
        found = polar.new_zeros((*p.shape[:-2], p.shape[-1], polar.shape[-1]))
        for part, x, _ in self._directions(p, g, moments, corrections):
            found += (polar[part].mT @ x).mT  # in this order the product is faster
        return found

    def _directions(
        self, p: Tensor, g: Tensor, moments: Sequence[Tensor], corrections: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """X band by band: which rows, theirs, and the sum of their squares."""
        compiles = self._compiles(p)
        for part in self._bands(p):
            now_p, now_g, *now = (x[part] for x in (p, g, *moments[:2]))
            correction = _rows(corrections, part)
            call = partial(run, direction) if compiles else direction
            yield part, *call(now_p, _dense(now_g) if compiles else now_g, now, correction)

    def move_(  # noqa: PLR0913, PLR0917 - as `passes.move_`
        self,
        p: Tensor,
        g: Tensor,
        moments: Sequence[Tensor],
        corrections: Tensor,
        heard: Tensor,
        gain: Tensor | None,
        network: Network | None,
        ahead: tuple[Tensor, Tensor] | None,
        still: bool,
    ) -> None:
        """The second pass, see `passes.move_`; D is given as the factors `(rows, k)` and `(k, rest)`."""
        compiles = self._compiles(p)
        call = partial(run, move_) if compiles else move_
        bands = [*self._bands(p)] if ahead is not None or not compiles else [slice(None)]  # else nothing is held
        held = corrections.new_empty(p[bands[0]].shape if ahead is not None else 0)  # the first one is the largest
        for part in bands:
            now_p, now_g, *now = (x[part] for x in (p, g, *moments))
            said = _rows(corrections, part), _rows(heard, part)
            inside = None if ahead is None else torch.matmul(ahead[0][part], ahead[1], out=held[: len(now_p)])
            call(now_p, _dense(now_g) if compiles else now_g, now, *said, gain, network, inside, still, self.usable)

    def call(self, function: Callable[..., Any], *args: Any, size: int) -> Any:
        """Call a function of tensors that is no pass, compiled if it goes over so many numbers."""
        return run(function, *args) if self.pays(size) else function(*args)

    def pays(self, size: int) -> bool:
        """Whether what goes over so many numbers is compiled."""
        return self.compiled and size >= self.least

    def _bands(self, p: Tensor) -> Iterator[slice]:
        """Parts of the rows of an array, of `TOGETHER` rows at least; a stack is one."""
        if p.dim() > 2:  # noqa: PLR2004 - rows and rest
            yield slice(None)
            return
        rows, rest = p.shape
        step = max(self.band // max(rest, 1) // TOGETHER, 1) * TOGETHER
        for start in range(0, rows, step) or (0,):  # an empty shard is one empty band
            yield slice(start, min(start + step, rows))

    def _compiles(self, p: Tensor) -> bool:
        """Whether a pass over these weights is compiled."""
        return p.dim() == 2 and self.pays(p.numel())  # noqa: PLR2004 - no stack


def _dense(g: Tensor) -> Tensor:
    """A gradient without holes in memory: that of a sum, for one, is one number for all."""
    return g if g.is_contiguous() else g.contiguous()


def _rows(value: Tensor, part: slice) -> Tensor:
    """Some rows of `(rows or 1, channels)`; one row is for all."""
    return value[part] if len(value) > 1 else value
