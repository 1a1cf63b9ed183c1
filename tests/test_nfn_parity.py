"""Parity with the paper's code, the PyPI package `nfn`: with its coefficients, our layers compute its outputs.

In `nfn`, channels come first, and some layers read the means over inputs or outputs in addition to the inputs or
outputs themselves, so that several of its coefficients add up to one of ours. Within a group of channels its layout is
(C, taps, inputs or outputs), ours is (inputs or outputs, taps, C). Its HNP layer lacks one term: from the last hidden
bias to the last weight, along the last hidden axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from nfn.common import WeightSpaceFeatures, network_spec_from_wsfeat
from nfn.layers import HNPLinear, HNPPool, NPAttention, NPLinear, NPPool, StatFeaturizer
from torch import Tensor, nn

from nfn_optim.layers import InvariantPool, NFLinear, Statistics, WeightAttention, free_ends
from nfn_optim.symmetry import Symmetry

IN, OUT, BATCH = 2, 3, 2


def chain(sizes: Sequence[int], tap: int) -> Symmetry:
    """The HNP symmetry of a sequence of linear layers, or of convolutions with `tap * tap` taps."""
    axes = ["in", *(f"h{n}" for n in range(len(sizes) - 2)), "out"]
    lengths, fixed = dict(zip(axes, sizes, strict=True)), {"in", "out"}
    dims: dict[str, tuple[str, ...]] = {}
    for n in range(len(sizes) - 1):
        taps = (f"y{n}", f"x{n}") if tap > 1 else ()
        dims |= {f"{n}.weight": (axes[n + 1], axes[n], *taps), f"{n}.bias": (axes[n + 1],)}
        lengths |= dict.fromkeys(taps, tap)
        fixed |= set(taps)
    return Symmetry(dims, lengths, frozenset(fixed))


SIZES = {"MLP": ((4, 5, 6, 3), 1), "shallow MLP": ((4, 5, 3), 1), "CNN": ((2, 4, 3, 4, 3), 2)}


@dataclass(frozen=True)
class ChannelGroup:
    """The channels of an nfn layer that belong to one tensor.

    Attributes:
        name: Our name of the tensor.
        taps: Number of kernel taps.
        ends: Number of inputs or outputs that act as channels.
        mean: Whether it is the mean over them instead.
    """

    name: str
    taps: int
    ends: int = 1
    mean: bool = False


class CoefficientCopy:
    """Copies the coefficients of an nfn layer to an `NFLinear`."""

    def __init__(self, layer: NFLinear, nfn_layer: nn.Module, layers: int, taps: int, n_in: int, n_out: int) -> None:
        self.layer, self.nfn_layer, self.layers = layer, nfn_layer, layers
        self.taps, self.n_in, self.n_out = taps, n_in, n_out
        with torch.no_grad():
            for p in layer.parameters():
                p.zero_()

    def weight(self, n: int, mean: bool = False) -> ChannelGroup:
        ends = {0: self.n_in, self.layers - 1: self.n_out}.get(n, 1)
        return ChannelGroup(f"{n}.weight", self.taps, ends, mean)

    def bias(self, n: int, mean: bool = False) -> ChannelGroup:
        return ChannelGroup(f"{n}.bias", 1, self.n_out if n == self.layers - 1 else 1, mean)

    def all_means(self, ends: bool) -> list[ChannelGroup]:
        """The inputs of the nfn layers `rc`; HNP has inputs and outputs twice, as means and individually."""
        last = self.layers - 1
        means = [self.weight(n, ends) for n in range(self.layers)] + [self.bias(n, ends) for n in range(self.layers)]
        return means + ([self.weight(0), self.weight(last), self.bias(last)] if ends else [])

    @torch.no_grad()
    def __call__(
        self, module: str, target: ChannelGroup, sources: Sequence[ChannelGroup], axes: tuple[str, ...] = ()
    ) -> None:
        linear = getattr(self.nfn_layer, module)
        weight: Tensor = linear.weight.reshape(linear.weight.shape[0], -1)
        widths = [g.taps * (1 if g.mean else g.ends) * IN for g in sources]
        assert sum(widths) == weight.shape[1]
        for g, part in zip(sources, weight.split(widths, 1), strict=True):
            values = part.reshape(OUT, target.taps, target.ends, IN, g.taps, -1).permute(2, 1, 0, 5, 4, 3)
            if g.mean:
                values = values.expand(-1, -1, -1, g.ends, -1, -1) / g.ends
            self.layer.coefficients(target.name, g.name, axes).add_(values.reshape(target.ends * target.taps * OUT, -1))
        constant = linear.bias.reshape(OUT, target.taps, target.ends).permute(2, 1, 0)
        self.layer.constants(target.name).add_(constant.reshape(-1))


def copy_np(copy: CoefficientCopy, axes: Sequence[str]) -> None:
    for n in range(copy.layers):
        below, above = axes[n], axes[n + 1]
        rows = [copy.weight(n), *([copy.weight(n - 1), copy.bias(n - 1)] if n > 0 else [])]
        columns = [copy.weight(n), copy.bias(n), *([copy.weight(n + 1)] if n < copy.layers - 1 else [])]
        copy(f"layer_{n}", copy.weight(n), [copy.weight(n)], (below, above))
        copy(f"layer_{n}_r", copy.weight(n), rows, (below,))
        copy(f"layer_{n}_c", copy.weight(n), columns, (above,))
        copy(f"layer_{n}_rc", copy.weight(n), copy.all_means(ends=False))
        copy(f"bias_{n}", copy.bias(n), columns, (above,))
        copy(f"bias_{n}_rc", copy.bias(n), copy.all_means(ends=False))


def copy_hnp(copy: CoefficientCopy, axes: Sequence[str]) -> None:
    last, means = copy.layers - 1, copy.all_means(ends=True)
    first = [copy.weight(0), copy.weight(1, last == 1), copy.bias(0), *([copy.weight(1)] if last == 1 else [])]
    copy("w0_rpt", copy.weight(0), first, (axes[1],))
    copy("w0_rbdcst", copy.weight(0), means)
    copy("bias_0", copy.bias(0), first, (axes[1],))
    copy("bias_0_rc", copy.bias(0), means)
    final = [copy.weight(last), copy.weight(last - 1, last == 1), *([copy.weight(0)] if last == 1 else [])]
    copy("wfin_cpt", copy.weight(last), final, (axes[last],))
    copy("wfin_cbdcst", copy.weight(last), means)
    copy("bias_fin_rc", copy.bias(last), means)
    for n in range(1, last):
        rows = [copy.weight(n), copy.weight(n - 1, n == 1), copy.bias(n - 1), *([copy.weight(0)] if n == 1 else [])]
        before_last = n == last - 1
        columns = [
            copy.weight(n),
            copy.bias(n),
            copy.weight(n + 1, before_last),
            *([copy.weight(last)] if before_last else []),
        ]
        copy(f"layer_{n}", copy.weight(n), [copy.weight(n)], (axes[n], axes[n + 1]))
        copy(f"layer_{n}_r", copy.weight(n), rows, (axes[n],))
        copy(f"layer_{n}_c", copy.weight(n), columns, (axes[n + 1],))
        copy(f"layer_{n}_rc", copy.weight(n), means)
        copy(f"bias_{n}", copy.bias(n), columns, (axes[n + 1],))
        copy(f"bias_{n}_rc", copy.bias(n), means)


def both_features(
    symmetry: Symmetry, batch: int = BATCH, channels: int = IN, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], WeightSpaceFeatures]:
    """The same features for our layers, channels last, and for nfn, channels first."""
    torch.manual_seed(0)
    features = {name: torch.randn(batch, *symmetry.shape_of(name), channels, dtype=dtype) for name in symmetry.dims}
    channels_first = {name: x.movedim(-1, 1) for name, x in features.items()}
    weights = [x for name, x in channels_first.items() if name.endswith("weight")]
    biases = [x for name, x in channels_first.items() if name.endswith("bias")]
    return features, WeightSpaceFeatures(weights, biases)


@pytest.mark.parametrize("network", SIZES)
@pytest.mark.parametrize("kind", ["NP", "HNP"])
def test_nfn_coefficients_give_nfn_outputs(network: str, kind: str) -> None:
    sizes, tap = SIZES[network]
    symmetry = chain(sizes, tap)
    layer = NFLinear(symmetry if kind == "HNP" else free_ends(symmetry), IN, OUT)
    features, nfn_features = both_features(symmetry)
    spec = network_spec_from_wsfeat(nfn_features, set_all_dims=True)
    nfn_layer = {"NP": NPLinear, "HNP": HNPLinear}[kind](spec, IN, OUT)
    ends = (sizes[0], sizes[-1]) if kind == "HNP" else (1, 1)
    copy = CoefficientCopy(layer, nfn_layer, len(sizes) - 1, tap * tap, *ends)
    {"NP": copy_np, "HNP": copy_hnp}[kind](copy, ["in", *(f"h{n}" for n in range(len(sizes) - 2)), "out"])
    actual, expected = layer(features), nfn_layer(nfn_features)
    for n in range(len(sizes) - 1):
        for name, x in ((f"{n}.weight", expected.weights[n]), (f"{n}.bias", expected.biases[n])):
            torch.testing.assert_close(actual[name], x.movedim(1, -1), rtol=1e-5, atol=1e-5)
    if kind == "HNP":  # the term that nfn lacks
        last = len(sizes) - 2
        lacking = layer.coefficients(f"{last}.weight", f"{last - 1}.bias", (f"h{last - 1}",))
        assert (lacking == 0).all()
        with torch.no_grad():
            lacking.fill_(1.0)
    assert all((p != 0).all() for p in layer.parameters()), "a coefficient of NFLinear has no counterpart in nfn"


@pytest.mark.parametrize("network", SIZES)
@pytest.mark.parametrize("kind", ["NP", "HNP"])
def test_pooling_spans_that_of_nfn(network: str, kind: str) -> None:
    """As many outputs as nfn, and each output of nfn is a linear combination of ours."""
    sizes, tap = SIZES[network]
    symmetry = chain(sizes, tap)
    features, nfn_features = both_features(symmetry, batch=80, channels=1, dtype=torch.float64)
    spec = network_spec_from_wsfeat(nfn_features, set_all_dims=True)
    expected = {"NP": NPPool, "HNP": HNPPool}[kind](spec)(nfn_features).flatten(1)  # (80, outputs)
    actual = InvariantPool(symmetry if kind == "HNP" else free_ends(symmetry), 1)(features)
    assert actual.shape == expected.shape
    assert int(torch.linalg.matrix_rank(torch.cat([actual, expected], 1))) == actual.shape[1]


@pytest.mark.parametrize("network", ["MLP", "shallow MLP"])
def test_attention_agrees(network: str) -> None:
    symmetry = free_ends(chain(*SIZES[network]))
    features, nfn_features = both_features(symmetry, channels=6)
    spec = network_spec_from_wsfeat(nfn_features, set_all_dims=True)
    nfn_layer, layer = NPAttention(spec, 6, num_heads=3), WeightAttention(symmetry, 6, heads=3)
    layer.project.load_state_dict(nfn_layer.to_qkv.linear.state_dict())
    actual, expected = layer(features), nfn_layer(nfn_features)
    for n in range(len(nfn_features)):
        torch.testing.assert_close(actual[f"{n}.weight"], expected.weights[n].movedim(1, -1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(actual[f"{n}.bias"], expected.biases[n].movedim(1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", SIZES)
def test_statistics_agree(network: str) -> None:
    symmetry = chain(*SIZES[network])
    features, nfn_features = both_features(symmetry)
    expected = StatFeaturizer()(nfn_features)  # (N, C, 7 * tensors)
    expected = expected.reshape(BATCH, IN, len(symmetry.dims), 7).transpose(1, 2).flatten(1)
    torch.testing.assert_close(Statistics(symmetry, IN)(features), expected)
