"""How the two passes over the weights run: pure or in place, eager or compiled; the functions are the same.

In place a pass goes over a tensor in bands of rows. That bounds what it holds at a time whatever the size of the
tensor, and keeps it in the processor's cache. Compiled, each pass over a band is one loop over its weights: a few
graphs for each kind of array (matrices, vectors, an odd last band) and precision, whatever the shapes. The options below
keep the compiler from storing what is cheaper computed again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nfn_optim.passes import Network, look, move, move_, sums_of

OPTIONS: dict[str, Any] = {
    "realize_reads_threshold": 10**5,
    "realize_opcount_threshold": 10**5,
    "realize_acc_reads_threshold": 10**5,
    "max_fusion_size": 10**5,
}
TOGETHER = 2  # rows that are added up in registers before their sum is stored; divides the size of bands
_broken: list[str] = []  # why compilation failed in this process


@dataclass(frozen=True)
class Kernel:
    """How the passes run.

    Args:
        compiled: Compile them with `torch.compile`, at their first use; needs a C++ compiler on a CPU. Where it fails,
            one warning, and all goes on uncompiled.
        in_place: Change parameters and moments in place; else pure, and differentiable.
        band: Weights that a pass in place takes at a time. It holds some 20 numbers for each.
    """

    compiled: bool = False
    in_place: bool = False
    band: int = 2**19

    def look(self, p: Tensor, g: Tensor, moments: Sequence[Tensor], corrections: Tensor) -> tuple[Tensor, Tensor]:
        """The first pass, see `passes.look`: sums `(*batch, rows, ROW_CHANNELS)` and `(*batch, rest, ROW_CHANNELS)`."""
        if not self.in_place:
            by_row, by_column = self._run(_sums, p, g, moments, corrections)
            return by_row, by_column
        row_sums, column_sums = [], []
        for part in self._bands(p):
            even = (part.stop - part.start) % TOGETHER == 0 and len(corrections) == 1
            together = TOGETHER if self.compiled and even else 1
            arrays = [x[part] for x in (p, g, *moments)]
            found = self._run(look, *arrays[:2], arrays[2:], _rows(corrections, part), together)
            rows, columns = sums_of(*found)
            row_sums.append(rows)
            column_sums.append(columns)
        return torch.cat(row_sums), sum(column_sums[1:], column_sums[0])

    def move(self, p: Tensor, g: Tensor, moments: Sequence[Tensor], corrections: Tensor, *said: Any) -> Any:
        """The second pass, pure: see `passes.move`."""
        return self._run(move, p, g, moments, corrections, *said)

    def move_(  # noqa: PLR0913 - as `passes.move`
        self,
        p: Tensor,
        g: Tensor,
        moments: Sequence[Tensor],
        corrections: Tensor,
        heard: Tensor,
        gain: Tensor | None,
        network: Network | None,
        *,
        still: bool,
    ) -> None:
        """The second pass in place: see `passes.move_`. No batch."""
        for part in self._bands(p):
            arrays = [x[part] for x in (p, g, *moments)]
            said = (_rows(corrections, part), _rows(heard, part), gain, network)
            self._run(move_, *arrays[:2], arrays[2:], *said, still=still)

    def _bands(self, p: Tensor) -> Iterator[slice]:
        """Parts of the rows of an array, of `TOGETHER` rows at least."""
        rows, rest = p.shape
        step = max(self.band // max(rest, 1) // TOGETHER, 1) * TOGETHER
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function, compiled if that is wanted and possible."""
        if not self.compiled or _broken:
            return function(*args, **kwargs)
        import torch._dynamo.exc  # noqa: PLC0415 - heavy, and only for those who compile

        try:
            return _compiled(function)(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            _broken.append(str(error))
            warnings.warn(
                f"the update rule could not be compiled and goes on uncompiled, which is slower: {str(error)[:500]}; "
                f"install a C++ compiler, or say compile=False to silence this",
                stacklevel=2,
            )
            return function(*args, **kwargs)


PURE = Kernel()


def _sums(p: Tensor, g: Tensor, moments: Sequence[Tensor], corrections: Tensor) -> tuple[Tensor, Tensor]:
    """All of the first pass."""
    return sums_of(*look(p, g, moments, corrections))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function, for all shapes."""
    return torch.compile(function, dynamic=True, options=OPTIONS)


def _rows(value: Tensor, part: slice) -> Tensor:
    """Some rows of `(rows or 1, channels)`; one row is for all."""
    return value[part] if len(value) > 1 else value
