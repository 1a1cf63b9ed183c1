"""Symmetries for tests of NF-layers: small ones with every kind of dimension, and those of the zoo."""

from __future__ import annotations

import torch
from symmetries import SYMMETRIES
from torch import Tensor
from zoo import ZOO

from nfn_optim.layers import free_ends
from nfn_optim.symmetry import Symmetry

Features = dict[str, Tensor]


def shrunk(symmetry: Symmetry) -> Symmetry:
    """Sizes reduced for the oracle: three fixed axes at most 2, other fixed axes 1, free axes at most 3."""
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
    "repeated axis with a nested one": Symmetry(
        {"qkv": ("((h > d) + (h > d))", "(h > d)"), "b": ("(h > d)",), "pair": ("h", "h", "h")},
        {"h": 2, "d": 2},
        frozenset(),
        {"d": ("h",)},
    ),
}
SMALL = {**SYMMETRIES, **NESTED}
ZOO_HNP = {network.name: network.expected() for network in ZOO}
ZOO_NP = {f"{name}, NP": free_ends(symmetry) for name, symmetry in ZOO_HNP.items()}
SHRUNK = {name: shrunk(symmetry) for name, symmetry in {**ZOO_HNP, **ZOO_NP}.items()}
ALL = {**SMALL, **ZOO_HNP, **ZOO_NP}


def features_of(symmetry: Symmetry, channels: int, *batch: int, seed: int = 0) -> Features:
    """Normal features in float64, `(*batch, *shape, channels)`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*batch, *symmetry.shape_of(name), channels, generator=generator, dtype=torch.float64)
        for name in symmetry.dims
    }


def permuted(symmetry: Symmetry, features: Features, permutations: dict[str, Tensor]) -> Features:
    """The features with permuted neurons; one batch dimension."""
    channels_first = {name: x.movedim(-1, 0) for name, x in features.items()}  # (C, N, *shape)
    return {name: x.movedim(0, -1) for name, x in symmetry.permute(channels_first, permutations, 2).items()}


def assert_close(actual: Features, expected: Features, tolerance: float = 1e-10) -> None:
    assert list(actual) == list(expected)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], rtol=tolerance, atol=tolerance)
