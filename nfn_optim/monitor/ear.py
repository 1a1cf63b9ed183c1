"""Hearing the gains that a rule gives, by forward hooks that are there for one step.

The gain of a weight is the product of the factors that its row, its column, its taps and its tensor get. Logarithms are
kept, so that it is a sum; `N`, `A` and `T` count rows, neurons and tensors as in `nfn_optim.layers.incidence`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from torch import Tensor, nn

from nfn_optim.layers import Incidence
from nfn_optim.monitor.journal import Array
from nfn_optim.monitor.sample import Sample, plain
from nfn_optim.rule import UpdateRule
from nfn_optim.symmetry import Symmetry


class Ear:
    """Listens to a rule until it is closed.

    Args:
        rule: The rule. One without a learned part says nothing: all its gains are 1.
    """

    def __init__(self, rule: UpdateRule) -> None:
        self._incidences: list[Incidence] = []  # of every device in turn
        self._logs: list[tuple[Tensor, Tensor]] = []  # of the factors of rows `(N,)` and tensors `(T,)`
        incidences, logs = self._incidences, self._logs

        def hear(_: nn.Module, args: tuple[Any, ...], factors: tuple[Tensor, Tensor]) -> None:
            incidences.append(args[-1])
            logs.append((plain(factors[0].detach()).log(), plain(factors[1].detach()).log()))

        self._handles = [rule.gains.register_forward_hook(hear)] if rule.learns else []

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    @cached_property
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
                index = sample.coordinates[places[name]]
                if len(index) == len(segments):
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
