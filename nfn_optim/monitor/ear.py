"""Hearing the gains that a rule gives, by forward hooks that are there for one step.

The gain of a weight is the product of the factors that its row, its column, its taps and its tensor get. Logarithms are
kept, so that it is a sum; `N`, `A` and `T` count rows, neurons and tensors as in `nfn_optim.layers.incidence`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from nfn_optim.layers import Incidence
from nfn_optim.monitor.sample import Sample
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

        def hear_who(_: nn.Module, args: tuple[Tensor, Tensor, Incidence], __: object) -> None:
            incidences.append(args[2])

        def hear_what(_: nn.Module, __: object, factors: tuple[Tensor, Tensor]) -> None:
            logs.append((factors[0].detach().log(), factors[1].detach().log()))

        self._handles = (
            [rule.stack.register_forward_hook(hear_who), rule.gains.register_forward_hook(hear_what)]
            if rule.learns
            else []
        )

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def by_tensor(self, names: Sequence[str]) -> list[Tensor]:
        """Mean of the logarithm of the gain over the weights of every tensor; 0 where nothing was said."""
        found: dict[str, Tensor] = {}
        for incidence, (rows, tensors) in zip(self._incidences, self._logs, strict=True):
            dims = torch.tensor(incidence.ndims, device=rows.device)
            means = tensors + dims * incidence.rows_to_tensors(rows[:, None])[:, 0]
            found.update(zip(incidence.names, means, strict=True))
        return [found.get(name, torch.zeros(())) for name in names]

    def by_weight(self, places: Mapping[str, int], sample: Sample) -> Tensor:
        """Logarithm of the gain of every entry of a sample.

        Args:
            places: Name -> number of the tensor in the sample.
            sample: The sample.

        Returns:
            As from `sample.take`.
        """
        gains = sample.take([None] * len(sample.counts))
        for incidence, (rows, tensors) in zip(self._incidences, self._logs, strict=True):
            for name, segments, tensor in zip(incidence.names, incidence.segments, tensors, strict=True):
                index = sample.coordinates[places[name]]
                if len(index) == len(segments):
                    factors = [rows[s.start + entries] for s, entries in zip(segments, index, strict=True)]
                    gains[places[name], : sample.counts[places[name]]] = sum(factors, start=tensor)
        return gains

    def by_neuron(self, symmetry: Symmetry) -> dict[str, Tensor]:
        """Logarithm of what the gain of a neuron's rows has in common, their mean.

        Args:
            symmetry: Of all tensors.

        Returns:
            Free axis -> one value for every neuron.
        """
        found = {}
        for incidence, (rows, _) in zip(self._incidences, self._logs, strict=True):
            neurons = incidence.rows_to_neurons(rows[:, None])[:, 0]  # (A,)
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
