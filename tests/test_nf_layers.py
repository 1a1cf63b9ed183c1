"""NF-layers other than NFLinear: equivariant or invariant under every kind of symmetry."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from nf_symmetries import SHRUNK, SMALL, ZOO_HNP, Features, assert_close, features_of, permuted
from rules import perturbed
from torch import nn

from nfn_optim.layers import (
    ChannelDropout,
    ChannelNorm,
    Entrywise,
    FourierValues,
    InvariantPool,
    LatentDecoder,
    LatentEncoder,
    LearnedEncoding,
    NFLinear,
    PositionEncoding,
    Residual,
    Scale,
    SinusoidalValues,
    Statistics,
    TensorNorm,
    WeightAttention,
    free_ends,
)
from nfn_optim.symmetry import Symmetry


class LatentAutoencoder(nn.Module):
    """Encode to latents and decode."""

    def __init__(self, symmetry: Symmetry, channels: int) -> None:
        super().__init__()
        self.encode, self.decode = LatentEncoder(symmetry, channels, 3), LatentDecoder(symmetry, channels)

    def forward(self, features: Features) -> Features:
        out: Features = self.decode(features, self.encode(features))
        return out


EQUIVARIANT: dict[str, Callable[[Symmetry], nn.Module]] = {
    "ChannelNorm": lambda s: ChannelNorm(s, 2),
    "ChannelNorm, positions": lambda s: ChannelNorm(s, 2, positions=True),
    "TensorNorm": lambda s: TensorNorm(s, 2),
    "Scale": lambda s: Scale(s, 0.5),
    "Entrywise": lambda _: Entrywise(nn.GELU()),
    "ChannelDropout": lambda _: ChannelDropout(0.3),
    "SinusoidalValues": lambda _: SinusoidalValues(3),
    "FourierValues": lambda _: FourierValues(2, 3, scale=1.0),
    "PositionEncoding": PositionEncoding,
    "LearnedEncoding": lambda s: LearnedEncoding(s, 2),
    "WeightAttention": lambda s: WeightAttention(s, 2, 2),
    "LatentDecoder": lambda s: LatentAutoencoder(s, 2),
    "Residual": lambda s: Residual(
        NFLinear(s, 2, 2), Entrywise(nn.ReLU()), ChannelNorm(s, 2, positions=True), ChannelDropout(0.3)
    ),
}
INVARIANT: dict[str, Callable[[Symmetry], nn.Module]] = {
    "InvariantPool": lambda s: InvariantPool(s, 2),
    "Statistics": lambda s: Statistics(s, 2),
    "LatentEncoder": lambda s: LatentEncoder(s, 2, 3),
}
SYMMETRIES = {**SMALL, **ZOO_HNP}
SMALL_AND_SHRUNK = {**SMALL, **SHRUNK}


@pytest.mark.parametrize("name", SYMMETRIES)
@pytest.mark.parametrize("layer", EQUIVARIANT)
def test_equivariant(name: str, layer: str) -> None:
    torch.manual_seed(0)
    symmetry, features = SYMMETRIES[name], features_of(SYMMETRIES[name], 2, 2)
    module = perturbed(EQUIVARIANT[layer](symmetry), 0.3).double()
    permutations = symmetry.random_permutations(torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    actual = module(permuted(symmetry, features, permutations))
    torch.manual_seed(1)  # the same dropout
    assert_close(actual, permuted(symmetry, module(features), permutations))


@pytest.mark.parametrize("name", SYMMETRIES)
@pytest.mark.parametrize("layer", INVARIANT)
def test_invariant(name: str, layer: str) -> None:
    torch.manual_seed(0)
    symmetry, features = SYMMETRIES[name], features_of(SYMMETRIES[name], 2, 2)
    module = perturbed(INVARIANT[layer](symmetry), 0.3).double()
    permutations = symmetry.random_permutations(torch.Generator().manual_seed(1))
    actual = module(permuted(symmetry, features, permutations))
    torch.testing.assert_close(actual, module(features), rtol=1e-10, atol=1e-10)
    assert actual.std() > 0


@pytest.mark.parametrize("name", SMALL_AND_SHRUNK)
def test_pooling_is_complete(name: str) -> None:
    """As many linearly independent outputs as orbits of entries."""
    symmetry = SMALL_AND_SHRUNK[name]
    count = len(oracle.orbits_of(symmetry).unique())
    pooled = InvariantPool(symmetry, 1).double()(features_of(symmetry, 1, count + 2))
    assert int(torch.linalg.matrix_rank(pooled)) == count


def test_an_invariant_network_is_sensitive_to_permuting_one_tensor_only() -> None:
    """A permutation of one tensor is no symmetry; NFLinear and pooling detect it, pooling by itself does not."""
    torch.manual_seed(0)
    symmetry = free_ends(ZOO_HNP["deep_mlp"])
    features = features_of(symmetry, 1, 2)
    pool = InvariantPool(symmetry, 3)
    network = nn.Sequential(NFLinear(symmetry, 1, 3), Entrywise(nn.Tanh()), pool).double()
    changed = {**features, "0.weight": features["0.weight"].roll(1, 1)}
    assert (network(changed) - network(features)).abs().max() > 1e-4
    pool_only = InvariantPool(symmetry, 1)
    torch.testing.assert_close(pool_only(changed), pool_only(features))


def test_norms_normalise() -> None:
    symmetry, features = ZOO_HNP["cnn_flatten"], features_of(ZOO_HNP["cnn_flatten"], 4, 3)
    by_entry = ChannelNorm(symmetry, 4).double()(features)["3.weight"]
    torch.testing.assert_close(by_entry.mean(-1), torch.zeros_like(by_entry[..., 0]))
    by_positions = ChannelNorm(symmetry, 4, positions=True).double()(features)["3.weight"]  # (N, d, c, k, l, C)
    torch.testing.assert_close(by_positions.mean((-1, -2, -3)), torch.zeros_like(by_positions[..., 0, 0, 0]))
    by_tensor = TensorNorm(symmetry, 4).double()({n: 100 * x for n, x in features.items()})["3.weight"]
    squares = by_tensor.square().mean((1, 2, 3, 4))
    torch.testing.assert_close(squares, torch.ones_like(squares))


def test_dropout_drops_whole_channels_in_training_only() -> None:
    torch.manual_seed(0)
    ones = {"w": torch.ones(5, 3, 4, 50)}
    layer = ChannelDropout(0.4)
    dropped = layer(ones)["w"]
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.6)}
    assert 0.45 < (dropped != 0).float().mean() < 0.75
    assert torch.equal(layer.eval()(ones)["w"], ones["w"])
    with pytest.raises(ValueError, match="expected a probability"):
        ChannelDropout(1.0)


@pytest.mark.parametrize("name", ["deep_mlp", "attention", "group_norm", "experts", "lstm"])
def test_attention_is_sensitive_to_permuting_one_tensor_only(name: str) -> None:
    torch.manual_seed(0)
    symmetry, features = ZOO_HNP[name], features_of(ZOO_HNP[name], 4, 1)
    layer = WeightAttention(symmetry, 4, 2).double()
    for axis in symmetry.free:
        carriers = [n for n in symmetry.dims if axis in symmetry.axes_of(n)]
        parents = [symmetry.sizes[parent] for parent in symmetry.nested.get(axis, ())]
        shift = {axis: torch.arange(symmetry.sizes[axis]).roll(1).expand(*parents, -1)}
        expected = permuted(symmetry, layer(features), shift)
        actual = layer({**permuted(symmetry, features, shift), carriers[0]: features[carriers[0]]})
        assert max(float((actual[n] - expected[n]).detach().abs().max()) for n in carriers[1:]) > 1e-6


def test_encodings_distinguish_positions_on_fixed_axes() -> None:
    """With encoded positions, features are no longer equivariant to permutations of the inputs."""
    symmetry = ZOO_HNP["mlp"]
    features = features_of(symmetry, 2, 1)
    np_symmetry = free_ends(symmetry)
    shift = {"in": torch.arange(symmetry.sizes["in"]).roll(1)}
    for encode in (PositionEncoding(symmetry), LearnedEncoding(symmetry, 2)):
        one, other = encode(permuted(np_symmetry, features, shift)), permuted(np_symmetry, encode(features), shift)
        assert (one["0.weight"] - other["0.weight"]).abs().max() > 1e-3
        torch.testing.assert_close(one["0.bias"], other["0.bias"])
    with pytest.raises(ValueError, match=r"only these have positions.*found \['h'\]"):
        PositionEncoding(symmetry, ["h"])


def test_heads_must_divide_the_channels() -> None:
    for build in (lambda s: WeightAttention(s, 3, 2), lambda s: LatentEncoder(s, 3, 1, 2)):
        with pytest.raises(ValueError, match="divides 3 channels, found 2"):
            build(ZOO_HNP["mlp"])
