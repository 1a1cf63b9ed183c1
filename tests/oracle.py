"""Slow, obviously correct versions."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nfn_optim.layers import Incidence
from nfn_optim.symmetry import Symmetry, factors_of


def rows_of_neurons(symmetry: Symmetry, incidence: Incidence) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """For every entry of every axis the rows that it meets, with their weight in the mean: index by index.

    Each dimension that carries the axis weighs the same, and within it each of its rows; an axis that occurs more than
    once in a dimension meets it as often.
    """
    found: dict[tuple[str, int], list[tuple[int, float]]] = {
        (axis, entry): [] for axis, size in symmetry.sizes.items() for entry in range(size)
    }
    carriers = dict.fromkeys(symmetry.sizes, 0)
    for t, name in enumerate(incidence.names):
        for segment in incidence.segments[t]:
            axes = factors_of(symmetry.dims[name][segment.dim])
            for axis in axes:
                carriers[axis] += 1
            places = itertools.product(*(range(symmetry.sizes[axis]) for axis in axes))
            for row, place in enumerate(places):
                for axis, entry in zip(axes, place, strict=True):
                    found[axis, entry].append((segment.start + row, symmetry.sizes[axis] / segment.length))
    return {key: [(row, share / carriers[key[0]]) for row, share in rows] for key, rows in found.items()}


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


def adam_direction(grads: list[Tensor]) -> Tensor:
    """Adam's bias-corrected direction after a list of gradients, from the definition."""
    m = v = torch.zeros_like(grads[0])
    for g in grads:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    steps = len(grads)
    return (m / (1 - 0.9**steps)) / ((v / (1 - 0.999**steps)).sqrt() + 1e-8)
