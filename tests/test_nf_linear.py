"""NFLinear: equivariant, not more than that, and complete, on everything that a symmetry can say."""

from __future__ import annotations

import math
from collections.abc import Callable

import oracle
import pytest
import torch
from nf_networks import ALL, FEWER, SMALL, ZOO_HNP, Features, assert_close, features_of, permuted
from torch import Tensor

from nfn_optim.layers import DeepSets, NFLinear, Pointwise, ends_of, free_ends
from nfn_optim.symmetry import Symmetry

LAYERS: dict[str, Callable[[Symmetry], torch.nn.Module]] = {
    "NFLinear": lambda s: NFLinear(s, 2, 3),
    "NFLinear, pointwise start": lambda s: NFLinear(s, 2, 3, pointwise=True),
    "Pointwise": lambda s: Pointwise(s, 2, 3),
    "DeepSets": lambda s: DeepSets(s, 2, 3),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layer", LAYERS)
def test_equivariant(name: str, layer: str) -> None:
    torch.manual_seed(0)
    symmetry, features = ALL[name], features_of(ALL[name], 2, 2)
    made = LAYERS[layer](symmetry).double()
    permutations = symmetry.random_permutations(torch.Generator().manual_seed(1))
    assert_close(made(permuted(symmetry, features, permutations)), permuted(symmetry, made(features), permutations))


def maps_of(layer: NFLinear, symmetry: Symmetry) -> Tensor:
    """The linear map of a layer of one channel, `(entries, entries)`."""
    sizes = [math.prod(symmetry.shape_of(name)) for name in symmetry.dims]
    parts = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
    units = {
        name: part.reshape(-1, *symmetry.shape_of(name), 1) for name, part in zip(symmetry.dims, parts, strict=True)
    }
    with torch.no_grad():
        out = layer(units)
    return torch.cat([out[name].flatten(1) for name in symmetry.dims], 1).T


@pytest.mark.parametrize("name", {**SMALL, **FEWER})
def test_complete(name: str) -> None:
    """As many independent maps between any two tensors as the group leaves, and all of them constant on its orbits."""
    symmetry = {**SMALL, **FEWER}[name]
    orbits = oracle.pair_orbits_of(symmetry)
    sizes = [math.prod(symmetry.shape_of(name)) for name in symmetry.dims]
    blocks = [block for rows in orbits.split(sizes) for block in rows.split(sizes, 1)]
    wanted = [len(block.unique()) for block in blocks]
    torch.manual_seed(0)
    layer = NFLinear(symmetry, 1, 1, bias=False).double()
    first = torch.zeros(int(orbits.max()) + 1, dtype=torch.int64)
    first[orbits.reshape(-1)] = torch.arange(orbits.numel())  # one pair of every orbit
    drawn = []
    for _ in range(max(wanted) + 2):
        layer.reset_parameters()
        whole = maps_of(layer, symmetry).reshape(-1)
        drawn.append(whole[first])
    torch.testing.assert_close(whole[first][orbits.reshape(-1)], whole)
    values = torch.stack(drawn)  # (draws, orbits)
    for block, count in zip(blocks, wanted, strict=True):
        assert int(torch.linalg.matrix_rank(values[:, block.unique()])) == count


@pytest.mark.parametrize("name", {**SMALL, **FEWER})
def test_biases_are_complete(name: str) -> None:
    symmetry = {**SMALL, **FEWER}[name]
    orbits = oracle.orbits_of(symmetry)
    layer = NFLinear(symmetry, 1, 1).double()
    drawn = []
    with torch.no_grad():
        for _ in range(int(orbits.max()) + 3):
            layer.reset_parameters()
            out = layer({n: torch.zeros_like(x) for n, x in features_of(symmetry, 1, 1).items()})
            drawn.append(torch.cat([x.reshape(-1) for x in out.values()]))
    assert int(torch.linalg.matrix_rank(torch.stack(drawn))) == int(orbits.max()) + 1


def test_there_is_no_coefficient_too_many() -> None:
    """Where axes are longer than they occur often, the coefficients are a basis: none can be spared."""
    for symmetry in (ZOO_HNP["deep_mlp"], ZOO_HNP["reused"], free_ends(ZOO_HNP["reused"])):
        orbits = oracle.pair_orbits_of(symmetry)
        count = sum(p.numel() for p in NFLinear(symmetry, 1, 1, bias=False).parameters())
        assert count == int(orbits.max()) + 1


@pytest.mark.parametrize("name", ALL)
def test_sensitive_to_permuting_one_tensor_alone(name: str) -> None:
    """Permuting a shared axis in one of its tensors only is no symmetry, and the layer sees it."""
    torch.manual_seed(0)
    symmetry, features = ALL[name], features_of(ALL[name], 2, 1)
    layer = NFLinear(symmetry, 2, 3).double()
    for axis in symmetry.free:
        carriers = [n for n in symmetry.dims if axis in symmetry.axes_of(n)]
        if len(carriers) < 2 or symmetry.sizes[axis] < 2:
            continue
        outer = [symmetry.sizes[parent] for parent in symmetry.nested.get(axis, ())]
        turn = {axis: torch.arange(symmetry.sizes[axis]).roll(1).expand(*outer, -1)}
        moved = permuted(symmetry, features, turn)
        expected = permuted(symmetry, layer(features), turn)
        found = layer({**moved, carriers[0]: features[carriers[0]]})
        others = [n for n in carriers if n != carriers[0]]
        assert max(float((found[n] - expected[n]).detach().abs().max()) for n in others) > 1e-6


def test_pointwise_start_is_pointwise() -> None:
    torch.manual_seed(0)
    symmetry = ZOO_HNP["fused_qkv"]
    layer = NFLinear(symmetry, 1, 1, pointwise=True, bias=False).double()
    found = maps_of(layer, symmetry)
    assert torch.equal(found, found.diag().diag())
    assert (found.diag() != 0).all()


def test_coefficients_are_what_the_layer_uses() -> None:
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
    with pytest.raises(ValueError, match=r"expected one way for '0\.bias'"):
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
    one = layer({name: x[1, 2] for name, x in features.items()})
    assert_close({name: x[1, 2] for name, x in layer(features).items()}, one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"0.weight": f["0.weight"]}, "missing"),
        (lambda f: {**f, "x": f["0.bias"]}, "not in the symmetry"),
        (lambda f: {**f, "0.bias": f["0.bias"][:, 1:]}, "expected '0.bias' of shape"),
        (lambda f: {**f, "0.bias": f["0.bias"][1:]}, "the same batch"),
    ],
)
def test_misfits_are_named(change: Callable[[Features], Features], message: str) -> None:
    symmetry = ZOO_HNP["mlp"]
    with pytest.raises(ValueError, match=message):
        NFLinear(symmetry, 2, 2).double()(change(features_of(symmetry, 2, 3)))


def test_an_ambiguous_parent_is_refused() -> None:
    symmetry = Symmetry({"w": ("h", "h", "d")}, {"h": 2, "d": 2}, nested={"d": ("h",)})
    with pytest.raises(ValueError, match="expected 'h', which 'd' is nested in, once"):
        NFLinear(symmetry, 1, 1)
