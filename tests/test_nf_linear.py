"""NFLinear: equivariant, complete and not over-symmetric, for every kind of symmetry."""

from __future__ import annotations

import math
from collections.abc import Callable

import oracle
import pytest
import torch
from nf_symmetries import ALL, SHRUNK, SMALL, ZOO_HNP, Features, assert_close, features_of, permuted
from torch import Tensor

from nfn_optim.layers import DeepSets, NFLinear, Pointwise, ends_of, free_ends
from nfn_optim.symmetry import Symmetry

SMALL_AND_SHRUNK = {**SMALL, **SHRUNK}
LAYERS: dict[str, Callable[[Symmetry], torch.nn.Module]] = {
    "NFLinear": lambda s: NFLinear(s, 2, 3),
    "NFLinear, pointwise": lambda s: NFLinear(s, 2, 3, pointwise=True),
    "Pointwise": lambda s: Pointwise(s, 2, 3),
    "DeepSets": lambda s: DeepSets(s, 2, 3),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layer", LAYERS)
def test_equivariant(name: str, layer: str) -> None:
    torch.manual_seed(0)
    symmetry, features = ALL[name], features_of(ALL[name], 2, 2)
    module = LAYERS[layer](symmetry).double()
    permutations = symmetry.random_permutations(torch.Generator().manual_seed(1))
    assert_close(module(permuted(symmetry, features, permutations)), permuted(symmetry, module(features), permutations))


def matrix_of(layer: NFLinear, symmetry: Symmetry) -> Tensor:
    """The matrix of a layer of one channel, `(entries, entries)`."""
    sizes = [math.prod(symmetry.shape_of(name)) for name in symmetry.dims]
    parts = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
    units = {
        name: part.reshape(-1, *symmetry.shape_of(name), 1) for name, part in zip(symmetry.dims, parts, strict=True)
    }
    with torch.no_grad():
        out = layer(units)
    return torch.cat([out[name].flatten(1) for name in symmetry.dims], 1).T


@pytest.mark.parametrize("name", SMALL_AND_SHRUNK)
def test_complete(name: str) -> None:
    """For any two tensors, as many independent maps as orbits of pairs of entries, each constant on the orbits."""
    symmetry = SMALL_AND_SHRUNK[name]
    orbits = oracle.pair_orbits_of(symmetry)
    sizes = [math.prod(symmetry.shape_of(name)) for name in symmetry.dims]
    blocks = [block for rows in orbits.split(sizes) for block in rows.split(sizes, 1)]
    counts = [len(block.unique()) for block in blocks]
    torch.manual_seed(0)
    layer = NFLinear(symmetry, 1, 1, bias=False).double()
    representative = torch.zeros(int(orbits.max()) + 1, dtype=torch.int64)
    representative[orbits.reshape(-1)] = torch.arange(orbits.numel())  # one pair of every orbit
    draws = []
    for _ in range(max(counts) + 2):
        layer.reset_parameters()
        matrix = matrix_of(layer, symmetry).reshape(-1)
        draws.append(matrix[representative])
    torch.testing.assert_close(matrix[representative][orbits.reshape(-1)], matrix)
    values = torch.stack(draws)  # (draws, orbits)
    for block, count in zip(blocks, counts, strict=True):
        assert int(torch.linalg.matrix_rank(values[:, block.unique()])) == count


@pytest.mark.parametrize("name", SMALL_AND_SHRUNK)
def test_biases_are_complete(name: str) -> None:
    symmetry = SMALL_AND_SHRUNK[name]
    orbits = oracle.orbits_of(symmetry)
    layer = NFLinear(symmetry, 1, 1).double()
    draws = []
    with torch.no_grad():
        for _ in range(int(orbits.max()) + 3):
            layer.reset_parameters()
            out = layer({n: torch.zeros_like(x) for n, x in features_of(symmetry, 1, 1).items()})
            draws.append(torch.cat([x.reshape(-1) for x in out.values()]))
    assert int(torch.linalg.matrix_rank(torch.stack(draws))) == int(orbits.max()) + 1


def test_no_coefficient_is_redundant() -> None:
    """The coefficients are a basis if no axis is shorter than the number of its occurrences in a pair of tensors."""
    for symmetry in (ZOO_HNP["deep_mlp"], ZOO_HNP["reused"], free_ends(ZOO_HNP["reused"])):
        orbits = oracle.pair_orbits_of(symmetry)
        count = sum(p.numel() for p in NFLinear(symmetry, 1, 1, bias=False).parameters())
        assert count == int(orbits.max()) + 1


@pytest.mark.parametrize("name", ALL)
def test_sensitive_to_permuting_one_tensor_only(name: str) -> None:
    """A permutation of a shared axis in one of its tensors is no symmetry."""
    torch.manual_seed(0)
    symmetry, features = ALL[name], features_of(ALL[name], 2, 1)
    layer = NFLinear(symmetry, 2, 3).double()
    for axis in symmetry.free:
        carriers = [n for n in symmetry.dims if axis in symmetry.axes_of(n)]
        if len(carriers) < 2 or symmetry.sizes[axis] < 2:
            continue
        parents = [symmetry.sizes[parent] for parent in symmetry.nested.get(axis, ())]
        shift = {axis: torch.arange(symmetry.sizes[axis]).roll(1).expand(*parents, -1)}
        shifted = permuted(symmetry, features, shift)
        expected = permuted(symmetry, layer(features), shift)
        actual = layer({**shifted, carriers[0]: features[carriers[0]]})
        others = [n for n in carriers if n != carriers[0]]
        assert max(float((actual[n] - expected[n]).detach().abs().max()) for n in others) > 1e-6


def test_pointwise_initialisation_maps_entries_to_themselves() -> None:
    torch.manual_seed(0)
    symmetry = ZOO_HNP["fused_qkv"]
    layer = NFLinear(symmetry, 1, 1, pointwise=True, bias=False).double()
    matrix = matrix_of(layer, symmetry)
    assert torch.equal(matrix, matrix.diag().diag())
    assert (matrix.diag() != 0).all()


def test_coefficients_are_views_of_the_parameters() -> None:
    symmetry = ZOO_HNP["mlp"]
    layer = NFLinear(symmetry, 1, 1).double()
    features = features_of(symmetry, 1, 2)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.coefficients("0.bias", "2.weight", ("h",)).copy_(torch.tensor([[0.0, 2.0]]))
    expected: Features = {name: torch.zeros_like(x) for name, x in features.items()}
    expected["0.bias"] = 2 * features["2.weight"][:, 1]
    assert_close(layer(features), expected)
    with pytest.raises(ValueError, match=r"expected one map from '2\.bias' to '0\.bias'"):
        layer.coefficients("0.bias", "2.bias", ("h",))


def test_the_ends_are_the_inputs_and_outputs() -> None:
    assert ends_of(ZOO_HNP["cnn_flatten"]) == ("in", "out")
    assert ends_of(ZOO_HNP["lstm"]) == ("in", "out")
    assert free_ends(ZOO_HNP["mlp"]).fixed == frozenset()
    with pytest.raises(ValueError, match=r"expected fixed axes.*\['h'\]"):
        free_ends(ZOO_HNP["mlp"], ["h"])


def test_any_number_of_batch_dimensions() -> None:
    symmetry = ZOO_HNP["attention"]
    layer, features = NFLinear(symmetry, 2, 3).double(), features_of(symmetry, 2, 2, 3)
    expected = layer({name: x[1, 2] for name, x in features.items()})
    assert_close({name: x[1, 2] for name, x in layer(features).items()}, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"0.weight": f["0.weight"]}, "missing"),
        (lambda f: {**f, "x": f["0.bias"]}, "not in the symmetry"),
        (lambda f: {**f, "0.bias": f["0.bias"][:, 1:]}, "expected '0.bias' of shape"),
        (lambda f: {**f, "0.bias": f["0.bias"][1:]}, "the same batch"),
        (lambda f: {n: x[..., :1] for n, x in f.items()}, r"expected '0.weight' of shape \(\*batch, .*, 2\)"),
    ],
)
def test_features_that_do_not_fit_are_refused(change: Callable[[Features], Features], message: str) -> None:
    symmetry = ZOO_HNP["mlp"]
    with pytest.raises(ValueError, match=message):
        NFLinear(symmetry, 2, 2).double()(change(features_of(symmetry, 2, 3)))


def test_an_ambiguous_parent_is_refused() -> None:
    symmetry = Symmetry({"w": ("h", "h", "d")}, {"h": 2, "d": 2}, nested={"d": ("h",)})
    with pytest.raises(ValueError, match="expected one occurrence of 'h', in which 'd' is nested"):
        NFLinear(symmetry, 1, 1)
