"""What networks over weights need to learn: standardised inputs, short encodings, wide pooling, canonical weights."""

from __future__ import annotations

import math

import pytest
import torch
from nf_symmetries import SMALL, ZOO_HNP, assert_close, features_of
from torch import Tensor, nn
from torch.func import stack_module_state

from nfn_optim.layers import (
    Head,
    InvariantPool,
    NFLinear,
    Parallel,
    PositionEncoding,
    Predictor,
    Spectrum,
    Standardise,
    Statistics,
    canonical_scales,
    canonical_signs,
    free_taps,
    function_change,
    random_orbit,
    weight_features,
)
from nfn_optim.symmetry import Symmetry, symmetry_of


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


def networks(activation: type[nn.Module], count: int = 4) -> tuple[nn.Module, Symmetry, dict[str, Tensor]]:
    """An architecture, its symmetry, and a batch of networks in float64."""
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 2)).double()
        for _ in range(count)
    ]
    symmetry = symmetry_of(models[0], torch.zeros(2, 3, dtype=torch.float64))
    return models[0], symmetry, {n: x.detach() for n, x in weight_features(models, symmetry).items()}


def multiplied(features: dict[str, Tensor], factors: Tensor, outgoing: Tensor) -> dict[str, Tensor]:
    """The first hidden layer's rows and biases by `factors`, its columns by `outgoing`; `(size,)` each."""
    return {
        **features,
        "0.weight": features["0.weight"] * factors[:, None, None],
        "0.bias": features["0.bias"] * factors[:, None],
        "2.weight": features["2.weight"] * outgoing[:, None],
    }


INPUTS = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", [nn.Tanh, Sine])
def test_canonical_signs_keep_the_function_and_undo_flips(activation: type[nn.Module]) -> None:
    model, symmetry, features = networks(activation)
    half = math.pi / 30 if activation is Sine else None
    canonical = canonical_signs(features, symmetry, half_period=half)
    assert function_change(model, features, canonical, INPUTS).max() < 1e-9
    assert all((canonical[f"{layer}.bias"] >= 0).all() for layer in (0, 2))
    signs = torch.tensor([1.0, -1, -1, 1, -1], dtype=torch.float64)
    flipped = multiplied(features, signs, signs)
    assert_close(canonical_signs(flipped, symmetry, half_period=half), canonical)
    if half is not None:
        assert all((canonical[f"{layer}.bias"] <= half / 2 + 1e-12).all() for layer in (0, 2))
        shifted = multiplied(features, torch.ones_like(signs), signs)
        shifted["0.bias"] = shifted["0.bias"] + half * (signs < 0).double()[:, None]
        assert function_change(model, features, shifted, INPUTS).max() < 1e-9
        assert_close(canonical_signs(shifted, symmetry, half_period=half), canonical)


def test_canonical_scales_keep_the_function_and_undo_scaling() -> None:
    model, symmetry, features = networks(nn.ReLU)
    canonical = canonical_scales(features, symmetry)
    assert function_change(model, features, canonical, INPUTS).max() < 1e-9
    factors = torch.tensor([0.1, 1.0, 7.0, 30.0, 2.0], dtype=torch.float64)
    scaled = multiplied(features, factors, 1 / factors)
    assert_close(canonical_scales(scaled, symmetry), canonical, 1e-6)
    norms = [sum(x.square().sum() for x in weights.values()) for weights in (canonical, features, scaled)]
    assert norms[0] < norms[1] < norms[2]


def test_the_certificate_finds_a_map_that_changes_the_function() -> None:
    """Signs of a network with ReLU; and a phase cannot be shifted without a bias."""
    model, symmetry, features = networks(nn.ReLU)
    assert function_change(model, features, canonical_signs(features, symmetry), INPUTS).min() > 1e-2
    bare = Symmetry({"w": ("h", "in"), "v": ("out", "h")}, {"h": 3, "in": 2, "out": 1}, frozenset({"in", "out"}))
    with pytest.raises(ValueError, match="expected a bias for axis 'h'"):
        canonical_signs(features_of(bare, 1, 2), bare, half_period=1.0)
    with pytest.raises(ValueError, match="expected free axes"):
        canonical_scales(features_of(bare, 1, 2), bare, axes=["in"])


@pytest.mark.parametrize("name", [*SMALL, "mlp", "cnn_flatten", "attention"])
def test_every_network_gets_a_permutation_of_its_own(name: str) -> None:
    """Invariant networks see no difference; networks that were equal become different."""
    symmetry = {**SMALL, **ZOO_HNP}[name]
    one = features_of(symmetry, 1, 1)
    features = {n: x.repeat(6, *(1,) * (x.dim() - 1)) for n, x in one.items()}
    moved = random_orbit(features, symmetry, torch.Generator().manual_seed(0))
    network = nn.Sequential(NFLinear(symmetry, 1, 3), InvariantPool(symmetry, 3, moments=2)).double()
    torch.testing.assert_close(network(moved), network(features))
    if any(symmetry.sizes[axis] > 2 for axis in symmetry.free):
        assert any(len(x.flatten(1).unique(dim=0)) > 1 for x in moved.values())


def test_a_network_is_put_into_another_order_as_a_whole() -> None:
    model, symmetry, features = networks(nn.ReLU)
    assert function_change(model, features, random_orbit(features, symmetry), INPUTS).max() < 1e-9


def test_standardised_features_have_unit_moments_and_diverged_networks_are_clipped() -> None:
    symmetry = ZOO_HNP["mlp"]
    features = {n: 3 + 0.01 * x for n, x in features_of(symmetry, 2, 50).items()}
    out = Standardise(symmetry, 2).double().fit(features)(features)
    for x in out.values():
        torch.testing.assert_close(x.flatten(0, -2).mean(0), torch.zeros(2, dtype=x.dtype), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            x.flatten(0, -2).std(0, correction=0), torch.ones(2, dtype=x.dtype), rtol=1e-4, atol=0
        )
    layer = Standardise(symmetry, 2, positions=True).double().fit(features)
    weight = layer({n: 1e9 * x for n, x in features.items()})["0.weight"]
    assert weight.abs().max() == 10
    by_position = layer(features)["0.weight"]
    assert by_position.mean((0, 1)).abs().max() < 1e-6
    with pytest.raises(ValueError, match="all finite: False"):
        layer.fit({n: x / 0 for n, x in features.items()})
    with pytest.raises(ValueError, match="networks first"):
        layer.fit({n: x[0] for n, x in features.items()})


def test_an_encoding_is_as_long_as_one_standardised_channel() -> None:
    symmetry = ZOO_HNP["cnn_flatten"]
    for scale in (1.0, 0.3):
        encoded = PositionEncoding(symmetry, scale=scale).double()(features_of(symmetry, 1, 1))
        for x in encoded.values():
            length = x[..., 1:].square().sum(-1).mean().sqrt().item()
            assert length == pytest.approx(scale, rel=1e-5)


def test_second_moments_are_pooled_beside_means() -> None:
    symmetry = ZOO_HNP["mlp"]
    features = features_of(symmetry, 1, 3)
    pool = InvariantPool(symmetry, 1, moments=2)
    both = Parallel(pool, Statistics(symmetry, 1)).double()(features)
    assert both.shape == (3, pool.out_features + Statistics(symmetry, 1).out_features)
    expected = features["0.weight"].square().mean(1).sqrt()  # (N, in, 1)
    columns = both[:, : pool.out_features]
    assert all((columns - x).abs().min() < 1e-9 for x in expected.flatten())
    with pytest.raises(ValueError, match="Statistics has quantiles"):
        InvariantPool(symmetry, 1, moments=3)
    assert Head(both.shape[1], 2).double()(both).shape == (3, 2)


def test_features_are_laid_side_by_side() -> None:
    symmetry = ZOO_HNP["mlp"]
    features = features_of(symmetry, 1, 2)
    out = Parallel(nn.Identity(), NFLinear(symmetry, 1, 3).double())(features)
    assert {x.shape[-1] for x in out.values()} == {4}


def test_stacked_dicts_are_networks() -> None:
    models = [nn.Linear(2, 3) for _ in range(4)]
    symmetry = symmetry_of(models[0], torch.zeros(1, 2))
    stacked, _ = stack_module_state(models)
    assert_close(weight_features(stacked, symmetry), weight_features(models, symmetry), 0.0)
    with pytest.raises(ValueError, match="expected 'weight' of shape"):
        weight_features({**stacked, "bias": stacked["bias"][:2]}, symmetry)


def test_freed_taps_cost_few_coefficients() -> None:
    symmetry = ZOO_HNP["cnn_batch_norm"]
    counts = [sum(p.numel() for p in NFLinear(s, 4, 4).parameters()) for s in (free_taps(symmetry), symmetry)]
    assert counts[0] < counts[1] / 5


def test_spectra_are_those_of_all_consecutive_products() -> None:
    _, symmetry, features = networks(nn.ReLU)
    spectrum = Spectrum(symmetry, count=2)
    assert spectrum.products == [
        ("0.weight", "2.weight"),
        ("2.weight", "4.weight"),
        ("0.weight", "2.weight", "4.weight"),
    ]
    found = spectrum(features)
    first, second, third = (features[f"{n}.weight"][..., 0] for n in (0, 2, 4))
    expected = []
    for matrix in (first, second, third, second @ first, third @ second, third @ second @ first):
        values = torch.linalg.svdvals(matrix)
        expected += [values[:, :2], values.square().sum(1, keepdim=True).sqrt()]
    torch.testing.assert_close(found, torch.cat(expected, 1).log())


@pytest.mark.parametrize("name", [*SMALL, "cnn_flatten", "attention"])
def test_predictors_are_invariant(name: str) -> None:
    symmetry = {**SMALL, **ZOO_HNP}[name]
    features = features_of(symmetry, 1, 3)
    torch.manual_seed(0)
    predictor = Predictor(symmetry, 2).double().fit(features).eval()
    moved = random_orbit(features, symmetry, torch.Generator().manual_seed(0))
    torch.testing.assert_close(predictor(moved), predictor(features))
