"""The same maps as the seed paper's code, the PyPI package `nfn`: its coefficients copied over give its outputs.

Its channels come first, and its means over inputs or outputs stand beside the inputs or outputs themselves, so that
some of its coefficients are another's share. A group of its channels is laid out (C, taps, ends), one of ours (ends,
taps, C). Its HNP layer lacks one of the terms: the last weights do not hear the last hidden biases of the same neuron.
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
    """The symmetry of linear layers or convolutions one behind the other, HNP."""
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
class Group:
    """Some of the channels of one of their layers: a tensor of ours, its taps, its ends, if it is their mean."""

    name: str
    taps: int
    ends: int = 1
    mean: bool = False


class Copy:
    """Copies coefficients of a layer of theirs into one of ours."""

    def __init__(self, ours: NFLinear, theirs: nn.Module, layers: int, taps: int, n_in: int, n_out: int) -> None:
        self.ours, self.theirs, self.layers = ours, theirs, layers
        self.taps, self.n_in, self.n_out = taps, n_in, n_out
        with torch.no_grad():
            for p in ours.parameters():
                p.zero_()

    def weight(self, n: int, mean: bool = False) -> Group:
        ends = {0: self.n_in, self.layers - 1: self.n_out}.get(n, 1)
        return Group(f"{n}.weight", self.taps, ends, mean)

    def bias(self, n: int, mean: bool = False) -> Group:
        return Group(f"{n}.bias", 1, self.n_out if n == self.layers - 1 else 1, mean)

    def all_means(self, ends: bool) -> list[Group]:
        """What their layers `rc` read; HNP reads the ends again, one by one."""
        last = self.layers - 1
        found = [self.weight(n, ends) for n in range(self.layers)] + [self.bias(n, ends) for n in range(self.layers)]
        return found + ([self.weight(0), self.weight(last), self.bias(last)] if ends else [])

    @torch.no_grad()
    def __call__(self, module: str, target: Group, sources: Sequence[Group], axes: tuple[str, ...] = ()) -> None:
        found = getattr(self.theirs, module)
        weight: Tensor = found.weight.reshape(found.weight.shape[0], -1)
        widths = [g.taps * (1 if g.mean else g.ends) * IN for g in sources]
        assert sum(widths) == weight.shape[1]
        for g, part in zip(sources, weight.split(widths, 1), strict=True):
            both = part.reshape(OUT, target.taps, target.ends, IN, g.taps, -1).permute(2, 1, 0, 5, 4, 3)
            if g.mean:
                both = both.expand(-1, -1, -1, g.ends, -1, -1) / g.ends
            self.ours.coefficients(target.name, g.name, axes).add_(both.reshape(target.ends * target.taps * OUT, -1))
        constant = found.bias.reshape(OUT, target.taps, target.ends).permute(2, 1, 0)
        self.ours.constants(target.name).add_(constant.reshape(-1))


def copy_np(copy: Copy, axes: Sequence[str]) -> None:
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


def copy_hnp(copy: Copy, axes: Sequence[str]) -> None:
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
        near = n == last - 1
        columns = [copy.weight(n), copy.bias(n), copy.weight(n + 1, near), *([copy.weight(last)] if near else [])]
        copy(f"layer_{n}", copy.weight(n), [copy.weight(n)], (axes[n], axes[n + 1]))
        copy(f"layer_{n}_r", copy.weight(n), rows, (axes[n],))
        copy(f"layer_{n}_c", copy.weight(n), columns, (axes[n + 1],))
        copy(f"layer_{n}_rc", copy.weight(n), means)
        copy(f"bias_{n}", copy.bias(n), columns, (axes[n + 1],))
        copy(f"bias_{n}_rc", copy.bias(n), means)


def both_features(symmetry: Symmetry) -> tuple[dict[str, Tensor], WeightSpaceFeatures]:
    """The same features, channels last for us and first for them."""
    torch.manual_seed(0)
    ours = {name: torch.randn(BATCH, *symmetry.shape_of(name), IN) for name in symmetry.dims}
    first = {name: x.movedim(-1, 1) for name, x in ours.items()}
    weights = [x for name, x in first.items() if name.endswith("weight")]
    return ours, WeightSpaceFeatures(weights, [x for name, x in first.items() if name.endswith("bias")])


@pytest.mark.parametrize("network", SIZES)
@pytest.mark.parametrize("kind", ["NP", "HNP"])
def test_their_coefficients_give_their_outputs(network: str, kind: str) -> None:
    sizes, tap = SIZES[network]
    symmetry = chain(sizes, tap)
    own = symmetry if kind == "HNP" else free_ends(symmetry)
    ours, (features, theirs) = NFLinear(own, IN, OUT), both_features(symmetry)
    spec = network_spec_from_wsfeat(theirs, set_all_dims=True)
    layer = {"NP": NPLinear, "HNP": HNPLinear}[kind](spec, IN, OUT)
    ends = (sizes[0], sizes[-1]) if kind == "HNP" else (1, 1)
    copy = Copy(ours, layer, len(sizes) - 1, tap * tap, *ends)
    {"NP": copy_np, "HNP": copy_hnp}[kind](copy, ["in", *(f"h{n}" for n in range(len(sizes) - 2)), "out"])
    found, expected = ours(features), layer(theirs)
    for n in range(len(sizes) - 1):
        for name, x in ((f"{n}.weight", expected.weights[n]), (f"{n}.bias", expected.biases[n])):
            torch.testing.assert_close(found[name], x.movedim(1, -1), rtol=1e-5, atol=1e-5)
    if kind == "HNP":  # what theirs lacks
        last = len(sizes) - 2
        lacking = ours.coefficients(f"{last}.weight", f"{last - 1}.bias", (f"h{last - 1}",))
        assert (lacking == 0).all()
        with torch.no_grad():
            lacking.fill_(1.0)
    assert all((p != 0).all() for p in ours.parameters()), "a coefficient of ours is none of theirs"


@pytest.mark.parametrize("network", SIZES)
@pytest.mark.parametrize("kind", ["NP", "HNP"])
def test_pooling_spans_theirs(network: str, kind: str) -> None:
    """Each of their numbers is a mean of ours, and of each of ours there are as many as of theirs."""
    sizes, tap = SIZES[network]
    symmetry = chain(sizes, tap)
    features, theirs = both_features(symmetry)
    features = {name: torch.cat([x] * 40)[:, ..., :1] for name, x in features.items()}
    features = {name: torch.randn_like(x, dtype=torch.float64) for name, x in features.items()}
    names = list(features)
    theirs = WeightSpaceFeatures(
        *([features[n].movedim(-1, 1) for n in names if n.endswith(k)] for k in ("ght", "ias"))
    )
    spec = network_spec_from_wsfeat(theirs, set_all_dims=True)
    expected = {"NP": NPPool, "HNP": HNPPool}[kind](spec)(theirs).flatten(1)  # (80, numbers)
    own = symmetry if kind == "HNP" else free_ends(symmetry)
    found = InvariantPool(own, 1)(features)
    assert found.shape == expected.shape
    assert int(torch.linalg.matrix_rank(torch.cat([found, expected], 1))) == found.shape[1]


@pytest.mark.parametrize("network", ["MLP", "shallow MLP"])
def test_attention_is_theirs(network: str) -> None:
    symmetry = free_ends(chain(*SIZES[network]))
    _, given = both_features(symmetry)
    spec = network_spec_from_wsfeat(given, set_all_dims=True)
    torch.manual_seed(0)
    mixed = given.map(lambda x: torch.randn(BATCH, 6, *x.shape[2:]))
    theirs, ours = NPAttention(spec, 6, num_heads=3), WeightAttention(symmetry, 6, heads=3)
    ours.project.load_state_dict(theirs.to_qkv.linear.state_dict())
    features = {
        name: (mixed.weights if name.endswith("weight") else mixed.biases)[int(name[0])].movedim(1, -1)
        for name in symmetry.dims
    }
    found, expected = ours(features), theirs(mixed)
    for n in range(len(mixed)):
        torch.testing.assert_close(found[f"{n}.weight"], expected.weights[n].movedim(1, -1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[f"{n}.bias"], expected.biases[n].movedim(1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", SIZES)
def test_statistics_are_theirs(network: str) -> None:
    symmetry = chain(*SIZES[network])
    features, theirs = both_features(symmetry)
    expected = StatFeaturizer()(theirs)  # (N, C, 7 * tensors)
    expected = expected.reshape(BATCH, IN, len(symmetry.dims), 7).transpose(1, 2).flatten(1)
    torch.testing.assert_close(Statistics(symmetry, IN)(features), expected)
