"""Slow, obviously correct versions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from nfn_optim.layers import Incidence
from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry import expression as dimension
from nfn_optim.symmetry.expression import Expression, Product

Place = tuple[tuple[str, int, tuple[int, ...]], ...]
"""For every axis that an entry of a dimension belongs to: the axis, its entry, and where it stands."""


def places_of(expression: Expression, sizes: Mapping[str, int], path: tuple[int, ...] = ()) -> list[Place]:
    """Every entry of a dimension, in order."""
    if isinstance(expression, str):
        return [((expression, entry, path),) for entry in range(sizes[expression])]
    if isinstance(expression, Product):
        factors = [places_of(factor, sizes, (*path, n)) for n, factor in enumerate(expression.factors)]
        return [sum(place, ()) for place in itertools.product(*factors)]
    return [place for n, part in enumerate(expression.parts) for place in places_of(part, sizes, (*path, n))]


Neuron = tuple[tuple[str, int], ...]
"""An entry of an axis, after the entries of what it is nested in."""


def rows_of_neurons(symmetry: Symmetry, incidence: Incidence) -> dict[Neuron, list[tuple[int, float]]]:
    """For every neuron the rows that it meets, with their weight in the mean: index by index.

    Each occurrence of the axis in a dimension weighs the same, and within it each of its rows. A dimension that lacks
    what its axes are nested in is left out.
    """
    found: dict[Neuron, dict[object, list[int]]] = {}
    for axis, size in symmetry.sizes.items():
        outer = [[(above, entry) for entry in range(symmetry.sizes[above])] for above in symmetry.nested.get(axis, ())]
        found |= {(*place, (axis, entry)): {} for place in itertools.product(*outer) for entry in range(size)}
    for t, name in enumerate(incidence.names):
        for segment in incidence.segments[t]:
            expression = symmetry.expressions_of(name)[segment.dim]
            axes = list(dimension.axes_of(expression))
            if any(set(symmetry.nested.get(axis, ())) - set(axes) for axis in axes):
                continue
            for row, place in enumerate(places_of(expression, symmetry.sizes)):
                entries = {axis: entry for axis, entry, _ in place}
                for axis, entry, path in place:
                    neuron = (*((above, entries[above]) for above in symmetry.nested.get(axis, ())), (axis, entry))
                    found[neuron].setdefault((t, segment.dim, path), []).append(segment.start + row)
    return {
        neuron: [(row, 1 / len(rows) / len(carriers)) for rows in carriers.values() for row in rows]
        for neuron, carriers in found.items()
    }


def rows_to_neurons(rows: Tensor, symmetry: Symmetry, incidence: Incidence) -> Tensor:
    """Mean over the rows of every neuron, one at a time. `(N, C) -> (A, C)`."""
    return torch.stack(
        [
            sum((share * rows[row] for row, share in of_neuron), torch.zeros_like(rows[0]))
            for of_neuron in rows_of_neurons(symmetry, incidence).values()
        ]
    )


def neurons_to_rows(neurons: Tensor, symmetry: Symmetry, incidence: Incidence) -> Tensor:
    """Sum over the neurons of every row, one at a time. `(A, C) -> (N, C)`."""
    rows = neurons.new_zeros(incidence.rows, neurons.shape[-1])
    for number, of_neuron in enumerate(rows_of_neurons(symmetry, incidence).values()):
        for row, _ in of_neuron:
            rows[row] += neurons[number]
    return rows


def generators_of(symmetry: Symmetry) -> list[Tensor]:
    """Permutations of all the entries of all the tensors, in order, that generate the group.

    Of every free axis, and of a nested one for every entry of what it is nested in: a swap and a turn.
    """
    count = sum(math.prod(symmetry.shape_of(name)) for name in symmetry.dims)
    flat = torch.arange(count).split([math.prod(symmetry.shape_of(name)) for name in symmetry.dims])
    entries = {name: part.reshape(symmetry.shape_of(name)) for name, part in zip(symmetry.dims, flat, strict=True)}
    found = []
    for axis in symmetry.free:
        size, outer = symmetry.sizes[axis], [symmetry.sizes[parent] for parent in symmetry.nested.get(axis, ())]
        swap = torch.tensor([1, 0, *range(2, size)][:size] if size > 1 else [0])
        for copy in range(math.prod(outer)):
            for moved in (swap, torch.arange(size).roll(1)):
                permutation = torch.arange(size).repeat(math.prod(outer), 1)
                permutation[copy] = moved
                permuted = symmetry.permute(entries, {axis: permutation.reshape(*outer, size)})
                found.append(torch.cat([permuted[name].reshape(-1) for name in symmetry.dims]))
    return found


def orbits_of(symmetry: Symmetry) -> Tensor:
    """Which orbit every entry belongs to, `(entries,)`; as many as there are independent invariant linear maps."""
    generators = generators_of(symmetry)
    count = sum(math.prod(symmetry.shape_of(name)) for name in symmetry.dims)
    return _components(count, [(torch.arange(count), g) for g in generators])


def pair_orbits_of(symmetry: Symmetry) -> Tensor:
    """Which orbit every pair of entries belongs to, `(entries, entries)`.

    Averaging a linear map over the group makes it constant on each of them, and changes nothing if it is already: there
    are as many independent equivariant maps as orbits.
    """
    count = sum(math.prod(symmetry.shape_of(name)) for name in symmetry.dims)
    pairs = torch.arange(count * count)
    moved = [(g[:, None] * count + g).reshape(-1) for g in generators_of(symmetry)]
    return _components(count * count, [(pairs, m) for m in moved]).reshape(count, count)


def _components(count: int, edges: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Number the connected components of a graph: `(count,)`."""
    rows = torch.cat([torch.zeros(0, dtype=torch.int64), *(a for a, _ in edges)]).numpy()
    columns = torch.cat([torch.zeros(0, dtype=torch.int64), *(b for _, b in edges)]).numpy()
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(count, count))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


def adam_direction(grads: list[Tensor]) -> Tensor:
    """Adam's bias-corrected direction after a list of gradients, from the definition."""
    m = v = torch.zeros_like(grads[0])
    for g in grads:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    steps = len(grads)
    return (m / (1 - 0.9**steps)) / ((v / (1 - 0.999**steps)).sqrt() + 1e-8)
