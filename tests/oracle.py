"""Slow reference implementations, one entry at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nfn_optim.layers import Incidence
from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.expression import Expression, Product, axes_of

Membership = tuple[tuple[str, int, tuple[int, ...]], ...]
"""For every axis that an entry of a dimension belongs to: the axis, its entry, and its path in the expression."""


def memberships_of(expression: Expression, sizes: Mapping[str, int], path: tuple[int, ...] = ()) -> list[Membership]:
    """The axes of every entry of a dimension, in order."""
    if isinstance(expression, str):
        return [((expression, entry, path),) for entry in range(sizes[expression])]
    if isinstance(expression, Product):
        factors = [memberships_of(factor, sizes, (*path, i)) for i, factor in enumerate(expression.factors)]
        return [sum(combination, ()) for combination in itertools.product(*factors)]
    return [entry for i, part in enumerate(expression.parts) for entry in memberships_of(part, sizes, (*path, i))]


Neuron = tuple[tuple[str, int], ...]
"""An entry of an axis, after the entries of the axes that it is nested in."""


def rows_of_neurons(
    symmetry: Symmetry, incidence: Incidence, active: Tensor | None = None
) -> dict[Neuron, list[tuple[int, float]]]:
    """The rows of every neuron, with their weights in the mean.

    All occurrences of an axis in dimensions have equal weight, as do all rows of one occurrence. Dimensions in which an
    axis occurs without the axes that it is nested in are left out, and rows that are not active, `(N,)`.
    """
    rows_of: dict[Neuron, dict[object, list[int]]] = {}
    for axis, size in symmetry.sizes.items():
        outer = [[(above, entry) for entry in range(symmetry.sizes[above])] for above in symmetry.nested.get(axis, ())]
        rows_of |= {(*parents, (axis, entry)): {} for parents in itertools.product(*outer) for entry in range(size)}
    for t, name in enumerate(incidence.names):
        for segment in incidence.segments[t]:
            expression = symmetry.expressions_of(name)[segment.dim]
            axes = list(axes_of(expression))
            if any(set(symmetry.nested.get(axis, ())) - set(axes) for axis in axes):
                continue
            for row, membership in enumerate(memberships_of(expression, symmetry.sizes)):
                entries = {axis: entry for axis, entry, _ in membership}
                if active is not None and not active[segment.start + row]:
                    continue
                for axis, entry, path in membership:
                    neuron = (*((above, entries[above]) for above in symmetry.nested.get(axis, ())), (axis, entry))
                    rows_of[neuron].setdefault((t, segment.dim, path), []).append(segment.start + row)
    return {
        neuron: [(row, 1 / len(rows) / len(occurrences)) for rows in occurrences.values() for row in rows]
        for neuron, occurrences in rows_of.items()
    }


def rows_to_neurons(rows: Tensor, symmetry: Symmetry, incidence: Incidence, active: Tensor | None = None) -> Tensor:
    """Weighted mean over the rows of every neuron, or over those that are active: `(N, C) -> (A, C)`."""
    active = torch.ones(len(rows)) if active is None else active
    return torch.stack(
        [
            sum((weight * rows[row] for row, weight in weighted_rows), torch.zeros_like(rows[0]))
            for weighted_rows in rows_of_neurons(symmetry, incidence, active).values()
        ]
    )


def neurons_to_rows(neurons: Tensor, symmetry: Symmetry, incidence: Incidence) -> Tensor:
    """Sum over the neurons of every row: `(A, C) -> (N, C)`."""
    rows = neurons.new_zeros(incidence.rows, neurons.shape[-1])
    for index, weighted_rows in enumerate(rows_of_neurons(symmetry, incidence).values()):
        for row, _ in weighted_rows:
            rows[row] += neurons[index]
    return rows


def generators_of(symmetry: Symmetry) -> list[Tensor]:
    """Generators of the group, as permutations of all entries of all tensors in order, `(entries,)` each.

    For every free axis a transposition and a cyclic shift; for a nested axis these two for each of its copies.
    """
    count = sum(math.prod(symmetry.shape_of(name)) for name in symmetry.dims)
    flat = torch.arange(count).split([math.prod(symmetry.shape_of(name)) for name in symmetry.dims])
    entries = {name: part.reshape(symmetry.shape_of(name)) for name, part in zip(symmetry.dims, flat, strict=True)}
    generators = []
    for axis in symmetry.free:
        size, outer = symmetry.sizes[axis], [symmetry.sizes[parent] for parent in symmetry.nested.get(axis, ())]
        swap = torch.tensor([1, 0, *range(2, size)][:size] if size > 1 else [0])
        for copy in range(math.prod(outer)):
            for order in (swap, torch.arange(size).roll(1)):
                permutation = torch.arange(size).repeat(math.prod(outer), 1)
                permutation[copy] = order
                permuted = symmetry.permute(entries, {axis: permutation.reshape(*outer, size)})
                generators.append(torch.cat([permuted[name].reshape(-1) for name in symmetry.dims]))
    return generators


def orbits_of(symmetry: Symmetry) -> Tensor:
    """The orbit of every entry, `(entries,)`; there are as many orbits as independent invariant linear maps."""
    generators = generators_of(symmetry)
    count = sum(math.prod(symmetry.shape_of(name)) for name in symmetry.dims)
    return _components(count, [(torch.arange(count), g) for g in generators])


def pair_orbits_of(symmetry: Symmetry) -> Tensor:
    """The orbit of every pair of entries, `(entries, entries)`.

    A linear map is equivariant exactly if it is constant on each orbit of pairs, so that there are as many independent
    equivariant linear maps as orbits.
    """
    count = sum(math.prod(symmetry.shape_of(name)) for name in symmetry.dims)
    pairs = torch.arange(count * count)
    images = [(g[:, None] * count + g).reshape(-1) for g in generators_of(symmetry)]
    return _components(count * count, [(pairs, image) for image in images]).reshape(count, count)


def _components(count: int, edges: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The index of the connected component of every node of a graph, `(count,)`."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = torch.cat([torch.zeros(0, dtype=torch.int64), *(a for a, _ in edges)]).numpy()
    columns = torch.cat([torch.zeros(0, dtype=torch.int64), *(b for _, b in edges)]).numpy()
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(count, count))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


def adam_direction(grads: list[Tensor]) -> Tensor:
    """Adam's bias-corrected direction after a sequence of gradients, by its definition."""
    m = v = torch.zeros_like(grads[0])
    for g in grads:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    steps = len(grads)
    return (m / (1 - 0.9**steps)) / ((v / (1 - 0.999**steps)).sqrt() + 1e-8)
