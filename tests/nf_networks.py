"""Symmetries for NF-layers: small ones that have it all, and those of the zoo with fewer fixed positions."""

from __future__ import annotations

import torch
from test_layers import SYMMETRIES
from torch import Tensor
from zoo import ZOO

from nfn_optim.layers import free_ends
from nfn_optim.symmetry import Symmetry

Features = dict[str, Tensor]


def fewer(symmetry: Symmetry) -> Symmetry:
    """At most three fixed axes of two entries, the other fixed ones of one, and free ones of three at most."""
    sizes = dict(symmetry.sizes)
    for number, axis in enumerate(a for a in sizes if a in symmetry.fixed):
        sizes[axis] = min(sizes[axis], 2 if number < 3 else 1)
    sizes = {axis: size if axis in symmetry.fixed else min(size, 3) for axis, size in sizes.items()}
    return Symmetry(symmetry.dims, sizes, symmetry.fixed, symmetry.nested)


NESTED = {
    "nested in fixed": Symmetry(
        {"up": ("g", "in", "h"), "down": ("(g > h)", "out"), "gate": ("g",)},
        {"g": 2, "in": 2, "h": 3, "out": 1},
        frozenset({"g", "in", "out"}),
        {"h": ("g",)},
    ),
    "two of a kind": Symmetry(
        {"qkv": ("((h > d) + (h > d))", "(h > d)"), "b": ("(h > d)",), "pair": ("h", "h", "h")},
        {"h": 2, "d": 2},
        frozenset(),
        {"d": ("h",)},
    ),
}
SMALL = {**SYMMETRIES, **NESTED}
ZOO_HNP = {network.name: network.expected() for network in ZOO}
ZOO_NP = {f"{name}, NP": free_ends(symmetry) for name, symmetry in ZOO_HNP.items()}
FEWER = {name: fewer(symmetry) for name, symmetry in {**ZOO_HNP, **ZOO_NP}.items()}
ALL = {**SMALL, **ZOO_HNP, **ZOO_NP}


def features_of(symmetry: Symmetry, channels: int, *batch: int, seed: int = 0) -> Features:
    """Normal features in float64, `(*batch, *shape, channels)`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*batch, *symmetry.shape_of(name), channels, generator=generator, dtype=torch.float64)
        for name in symmetry.dims
    }


def permuted(symmetry: Symmetry, features: Features, permutations: dict[str, Tensor]) -> Features:
    """The features after renaming neurons; one batch dimension."""
    first = {name: x.movedim(-1, 0) for name, x in features.items()}  # (C, N, *shape)
    return {name: x.movedim(0, -1) for name, x in symmetry.permute(first, permutations, 2).items()}


def assert_close(found: Features, expected: Features, rounding: float = 1e-10) -> None:
    assert list(found) == list(expected)
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=rounding, atol=rounding)
