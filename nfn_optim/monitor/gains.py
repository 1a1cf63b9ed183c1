"""Gains of tensors, weights and neurons at the last step, from the optimizer's state.

    gain of the weight [i, j, ...] = tensor_gain * row_gain[i] * column_gains[j] * ...

Logarithms of the factors are used throughout, so that a gain is a sum. `T` counts tensors, `N` rows of any dimension
(`nfn_optim.layers.incidence`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfn_optim.engine.form import Form
from nfn_optim.layers import Incidence
from nfn_optim.monitor.sampling import Sample, local_real_view
from nfn_optim.monitor.writer import Array
from nfn_optim.optimizer import NFNOptimizer
from nfn_optim.optimizer.state import entries_of
from nfn_optim.rule.members import forms_of
from nfn_optim.symmetry import Symmetry

GAINS = "gains"  # in the state of a parameter: of the tensor, of its rows, and of every further dimension
MemberGains = tuple[float, list[Array]]
"""Log gain of a tensor, and those of the entries of its dimensions."""


class LogGains:
    """Logarithms of the gains at the last step, of all tensors with a gradient.

    Args:
        optimizer: The optimizer, after the step. All gains of a rule without a learned part are 1.
    """

    def __init__(self, optimizer: NFNOptimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        forms = {} if optimizer.symmetry is None else forms_of(optimizer.symmetry)
        named = {
            name: (p, state)
            for name, p in zip(optimizer.names, params, strict=True)
            if p.grad is not None and p.numel() > 0 and GAINS in (state := entries_of(optimizer.state.get(p, {})))
        }
        self._shapes = {name: (*p.shape, 2) if p.is_complex() else tuple(p.shape) for name, (p, _) in named.items()}
        self._tensor: dict[str, float] = {}
        self._by_dim: dict[str, list[Array]] = {}  # factors of the entries of every dimension
        self._members: dict[str, tuple[Form, list[MemberGains]]] = {}
        for device in dict.fromkeys(p.device for p, _ in named.values()):
            here = {name: state for name, (p, state) in named.items() if p.device == device}
            members = {name: self._members_of(name, here[name][GAINS].numel(), forms.get(name)) for name in here}
            lengths = [n for shapes in members.values() for shape in shapes for n in (1, *(shape or (1,)))]
            flat = torch.cat([local_real_view(state[GAINS]) for state in here.values()])
            logs = iter(torch.split(flat.log().cpu(), lengths))  # one synchronization for each device
            for name in here:
                of_members = [
                    (next(logs).item(), [next(logs).numpy() for _ in shape or (1,)][: len(shape)])
                    for shape in members[name]  # the row gain of a scalar is 1
                ]
                form = forms[name] if len(of_members) > 1 else Form()
                self._members[name] = form, of_members
                self._tensor[name], self._by_dim[name] = _merged(form, of_members)

    def _members_of(self, name: str, gains: int, form: Form | None) -> list[tuple[int, ...]]:
        """The shapes of the members of a tensor, of which there are so many gains."""
        shape = self._shapes[name]
        if form is None or gains == 1 + sum(shape or (1,)):
            return [shape]
        return [tuple(x.shape) for x in form.members_of(torch.empty(shape, device="meta"))]

    def by_tensor(self, names: Sequence[str]) -> Array:
        """Mean log gain over the weights of each of these tensors, `(T,)`."""
        gains = {name: self._tensor[name] + sum(x.mean() for x in by_dim) for name, by_dim in self._by_dim.items()}
        return np.array([gains.get(name, 0.0) for name in names])

    def by_weight(self, names: Sequence[str], sample: Sample) -> Array:
        """Log gain of every sampled weight.

        Args:
            names: Of the sampled tensors.
            sample: The sample.

        Returns:
            In the layout of `sample.take`. 0 for parts of sharded tensors: their coordinates are those of the part.
        """
        gains = np.zeros((len(names), max(sample.counts, default=0)))
        for row, name, shape, count, coordinates in zip(
            gains, names, sample.shapes, sample.counts, sample.coordinates, strict=True
        ):
            if self._shapes.get(name) == shape:
                row[:count] = _of_weights(*self._members[name], coordinates, count)
        return gains

    def by_neuron(self, symmetry: Symmetry) -> dict[str, Array]:
        """Mean log gain over the rows of every neuron, without the gains of whole tensors.

        Args:
            symmetry: Of all tensors.

        Returns:
            Free axis -> one value for every neuron.
        """
        names = tuple(name for name in symmetry.dims if name in self._by_dim)
        if not names:
            return {}
        incidence, spans = _neurons_of(symmetry, names)
        rows = torch.zeros(incidence.rows, 1, dtype=torch.float64)
        for name, segments in zip(names, incidence.segments, strict=True):
            for s in segments:
                rows[s.start : s.start + s.length, 0] = torch.from_numpy(self._by_dim[name][s.dim])
        neurons: Tensor = incidence.rows_to_neurons(rows)[:, 0]
        return {axis: neurons[span].numpy() for axis, span in spans.items()}


def _of_weights(form: Form, members: Sequence[MemberGains], coordinates: Iterable[Any], count: int) -> Array:
    """Log gains of so many weights of a tensor, from their coordinates in it."""
    local, number = [np.asarray(x) for x in coordinates], np.zeros(count, dtype=np.int64)
    if form.stack is not None:
        number = local.pop(form.stack[0]).astype(np.int64)
    if form.parts is not None:
        dim, sizes = form.parts
        starts = np.cumsum([0, *sizes[:-1]])
        part = np.searchsorted(starts, local[dim], side="right") - 1
        local[dim] = local[dim] - starts[part]
        number = number * len(sizes) + part
    gains = np.zeros(count)
    for member in np.unique(number):
        (at,) = np.nonzero(number == member)
        whole, by_dim = members[member]
        gains[at] = whole + sum(entries[x[at]] for entries, x in zip(by_dim, local, strict=True))
    return gains


def _merged(form: Form, members: list[MemberGains]) -> MemberGains:
    """Log gains of a tensor, and of the entries of its dimensions: means over its members."""
    if form.parts is not None:
        dim, n = form.parts[0], len(form.parts[1])
        groups = [members[i : i + n] for i in range(0, len(members), n)]
        members = []
        for group in groups:
            whole, by_dim = _mean(group)
            by_dim[dim] = np.concatenate([entries[dim] + (gain - whole) for gain, entries in group])
            members.append((whole, by_dim))
    if form.stack is None:
        return members[0]
    whole, by_dim = _mean(members)
    by_dim.insert(form.stack[0], np.array([gain - whole for gain, _ in members]))
    return whole, by_dim


def _mean(members: Sequence[MemberGains]) -> MemberGains:
    """Means over members; of dimensions of different lengths those of the first."""
    gains, dims = zip(*members, strict=True)
    alike = [[x for x in same if len(x) == len(same[0])] for same in zip(*dims, strict=True)]
    return float(np.mean(gains)), [np.mean(same, 0) for same in alike]


@lru_cache(maxsize=16)
def _neurons_of(symmetry: Symmetry, names: tuple[str, ...]) -> tuple[Incidence, dict[str, slice]]:
    """The incidence of some tensors, and the slice of its neurons for every free axis."""
    part, spans, start = symmetry.restrict(names), {}, 0
    for axis, size in part.sizes.items():
        end = start + part.copies_of(axis) * size
        if axis in part.free:
            spans[axis] = slice(start, end)
        start = end
    return Incidence(part), spans
