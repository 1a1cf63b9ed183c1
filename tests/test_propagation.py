"""Vectors of neurons, propagated through weights: equivariant, and as expressive as running the network."""

from __future__ import annotations

import pytest
import torch
from nf_symmetries import ZOO_HNP, features_of, permuted
from torch import nn

from nfn_optim import symmetry_of
from nfn_optim.layers import MessageEditor, Propagation, canonical_signs, free_ends, weight_features
from nfn_optim.symmetry import Symmetry

NAMES = ("mlp", "deep_mlp", "residual_mlp", "token_mlp_layer_norm", "depthwise_separable", "conv3d", "reused")
NETWORKS = {name: ZOO_HNP[name] for name in (*NAMES, "tied_autoencoder", "embedding_bag", "attention")}
NETWORKS |= {f"{name}, NP": free_ends(symmetry) for name, symmetry in NETWORKS.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_vectors_are_permuted_with_their_neurons(name: str) -> None:
    torch.manual_seed(0)
    symmetry, features = NETWORKS[name], features_of(NETWORKS[name], 2, 3)
    layer = Propagation(symmetry, 5, in_channels=2).double()
    vectors = layer(features)
    assert {axis: x.shape for axis, x in vectors.items()} == {
        axis: (3, symmetry.sizes[axis], channels) for axis, channels in layer.out_channels.items()
    }
    permutations = symmetry.random_permutations(torch.Generator().manual_seed(1))
    moved = layer(permuted(symmetry, features, permutations))
    for axis, x in vectors.items():
        assert x.std() > 1e-4
        expected = x[:, permutations[axis]] if axis in permutations else x
        torch.testing.assert_close(moved[axis], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_changes_of_weights_are_permuted_with_their_neurons(name: str) -> None:
    torch.manual_seed(0)
    symmetry, features = NETWORKS[name], features_of(NETWORKS[name], 1, 3)
    layer = MessageEditor(symmetry, channels=5, outputs=2).fit(features).double()
    edited = layer(features)
    permutations = symmetry.random_permutations(torch.Generator().manual_seed(1))
    moved, expected = layer(permuted(symmetry, features, permutations)), permuted(symmetry, edited, permutations)
    for tensor, x in features.items():
        assert edited[tensor].shape == (*x.shape[:-1], 2)
        assert (edited[tensor] - x).std() > 1e-5
        torch.testing.assert_close(moved[tensor], expected[tensor], rtol=1e-9, atol=1e-9)


def test_the_change_of_a_weight_depends_on_layers_before_and_after_it() -> None:
    torch.manual_seed(0)
    symmetry, features = NETWORKS["deep_mlp"], features_of(NETWORKS["deep_mlp"], 1, 1)
    layer = MessageEditor(symmetry, channels=5).fit(features).double()
    first, *_, last = names = [name for name in symmetry.dims if name.endswith("weight")]
    assert len(names) > 2
    before = layer(features)
    for other in (first, last):
        changed = layer(features | {other: 1.1 * features[other]})
        for name in set(names) - {other}:
            assert not torch.allclose(changed[name], before[name], rtol=1e-9)


def test_running_a_network_is_a_special_case() -> None:
    """One channel for every example: the first map puts the inputs on the weights, all others pass activations on."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(4, 3)
    symmetry = symmetry_of(model, x)
    layer = Propagation(symmetry, 4, activation=torch.relu, bias=False)
    with torch.no_grad():
        for first, second in layer.perceptrons:
            first.weight.copy_(torch.cat([x if first.weight.shape[1] == 4 else torch.eye(4), torch.ones(4, 1)], 1))
            second.weight.copy_(torch.eye(4))
    found = layer(weight_features(model, symmetry))[symmetry.dims["4.weight"][0]][0]  # (outputs, examples and bias)
    torch.testing.assert_close(found[:, :4] + found[:, 4:], model(x).T)


@pytest.mark.parametrize("odd", [False, True])
def test_signs_of_neurons_make_no_difference_to_outputs_if_the_perceptrons_are_odd(odd: bool) -> None:
    torch.manual_seed(0)
    symmetry, features = NETWORKS["mlp"], features_of(NETWORKS["mlp"], 1, 3)
    layer = Propagation(symmetry, 5, activation=torch.sin if odd else torch.relu, bias=not odd).double()
    signed = canonical_signs(features, symmetry)
    assert not torch.equal(signed["0.weight"], features["0.weight"])
    (output,) = set(layer.out_channels) & symmetry.fixed
    assert torch.allclose(layer(signed)[output], layer(features)[output]) == odd


def test_a_recurrent_matrix_sends_messages_to_its_own_axis() -> None:
    symmetry = Symmetry.parse("into h in\nagain h h\nout out h\nfree h=4\nfixed in=3 out=2")
    torch.manual_seed(0)
    layer, features = Propagation(symmetry, 5).double(), features_of(symmetry, 1, 2)
    vectors = layer({**features, "again": torch.zeros_like(features["again"])})["out"]
    assert not torch.allclose(layer(features)["out"], vectors)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w h in\ns\nfree h=2\nfixed in=3", "expected one axis for every dimension of 's', found"),
        ("w h in\nv out (h t)\nfree h=2\nfixed in=3 out=1 t=2", r"every dimension of 'v', found \('out', '\(h t\)'\)"),
        ("w h in t\nfree h=2 t=2\nfixed in=3", r"expected fixed axes after the second dimension of 'w', found \['t'\]"),
        ("v out h\nw h in\nfree h=2\nfixed in=3 out=1", "'v' reads from 'h', which no tensor before it writes to"),
        ("w h h\nfree h=2", "'w' reads from 'h', which no tensor before it writes to"),
    ],
)
def test_networks_without_an_order_of_computation_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Propagation(Symmetry.parse(text), 4)


def test_other_features_are_refused() -> None:
    symmetry = NETWORKS["mlp"]
    layer, features = Propagation(symmetry, 4), features_of(symmetry, 1, 2)
    with pytest.raises(ValueError, match=r"expected '0\.weight' of shape \(\*batch, 5, 3, 1\)"):
        layer(features_of(symmetry, 2, 2))
    with pytest.raises(ValueError, match=r"missing \['0\.bias'\]"):
        layer({name: x for name, x in features.items() if name != "0.bias"})
