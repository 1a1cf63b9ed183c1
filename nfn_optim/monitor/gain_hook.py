"""Hearing the gains that a rule gives, by a forward hook that is there for one step at a time.

The gain of a weight is the product of the factors that its row, its column, its taps and its tensor get. Logarithms are
kept, so that it is a sum; `N`, `A` and `T` count rows, neurons and tensors as in `nfn_optim.layers.incidence`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nfn_optim.layers import Incidence
from nfn_optim.monitor.sampling import Sample, plain
from nfn_optim.monitor.writer import Array
from nfn_optim.rule import UpdateRule
from nfn_optim.symmetry import Symmetry


class Ear:
    """Listens to a rule during steps, and remembers what was said at the last one at which something was.

    Args:
        rule: The rule. One without a learned part says nothing: all its gains are 1.
    """

    def __init__(self, rule: UpdateRule) -> None:
        self._incidences: list[Incidence] = []  # of every device in turn
        self._factors: list[tuple[Tensor, Tensor]] = []  # of rows `(N,)` and tensors `(T,)`
        self._rule, self._new = rule, True
        self._handles: list[RemovableHandle] = []

    def _hear(self, _: nn.Module, args: tuple[Any, ...], factors: tuple[Tensor, Tensor]) -> None:
        """Hook behind the gains."""
        if self._new:
            self._incidences, self._factors, self._new = [], [], False
        self._incidences.append(args[-1])
        self._factors.append((factors[0].detach(), factors[1].detach()))

    def begin_step(self) -> None:
        """Listen, until `end_step`; what is said at this step takes the place of what was said before."""
        self.end_step()
        self._new = True
        self._handles = [self._rule.gains.register_forward_hook(self._hear)] if self._rule.learns else []

    def end_step(self) -> None:
        """Listen no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def _logs(self) -> list[tuple[Tensor, Tensor]]:
        """Logarithms of the factors."""
        return [(plain(rows).log(), plain(tensors).log()) for rows, tensors in self._factors]

    @property
    def _heard(self) -> list[tuple[Incidence, Array, Array]]:
        """Incidence and logarithms, where they can be read."""
        return [
            (incidence, rows.cpu().numpy(), tensors.cpu().numpy())
            for incidence, (rows, tensors) in zip(self._incidences, self._logs, strict=True)
        ]

    def by_tensor(self, names: Sequence[str]) -> Array:
        """Mean of the logarithm of the gain over the weights of every tensor, `(T,)`; 0 where nothing was said."""
        found: dict[str, float] = {}
        for incidence, rows, tensors in self._heard:
            for name, segments, tensor in zip(incidence.names, incidence.segments, tensors, strict=True):
                found[name] = tensor + sum(rows[s.start : s.start + s.length].mean() for s in segments)
        return np.array([found.get(name, 0.0) for name in names])

    def by_weight(self, places: Mapping[str, int], sample: Sample) -> Array:
        """Logarithm of the gain of every entry of a sample.

        Args:
            places: Name -> number of the tensor in the sample.
            sample: The sample.

        Returns:
            As from `sample.take`.
        """
        gains = np.zeros((len(sample.counts), max(sample.counts, default=0)))
        for incidence, rows, tensors in self._heard:
            for name, segments, tensor in zip(incidence.names, incidence.segments, tensors, strict=True):
                if name in places and len(index := sample.coordinates[places[name]]) == len(segments):
                    row = gains[places[name], : sample.counts[places[name]]]
                    row += tensor
                    for segment, entries in zip(segments, index, strict=True):
                        row += rows[segment.start + entries]
        return gains

    def by_neuron(self, symmetry: Symmetry) -> dict[str, Array]:
        """Logarithm of what the gains of a neuron's rows have in common, their mean.

        Args:
            symmetry: Of all tensors.

        Returns:
            Free axis -> one value for every neuron.
        """
        found = {}
        for incidence, (rows, _) in zip(self._incidences, self._logs, strict=True):
            neurons: Array = incidence.rows_to_neurons(rows[:, None])[:, 0].cpu().numpy()  # (A,)
            found.update({axis: neurons[span] for axis, span in _spans(symmetry, incidence.names).items()})
        return found


@lru_cache(maxsize=16)
def _spans(symmetry: Symmetry, names: tuple[str, ...]) -> dict[str, slice]:
    """Where the neurons of every free axis are among those of some tensors."""
    part, spans, start = symmetry.restrict(names), {}, 0
    for axis, size in part.sizes.items():
        end = start + part.copies_of(axis) * size
        if axis in part.free:
            spans[axis] = slice(start, end)
        start = end
    return spans
