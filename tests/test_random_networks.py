"""Random compositions of blocks are traced without a warning, and every symmetry found is certified."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nfn_optim.symmetry import Symmetry, certify, symmetry_of

WIDTHS = (4, 8, 12)


class Apply(nn.Module):
    """Applies a function of an input and some layers."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def _attention(x: Tensor, qkv: nn.Module, out: nn.Module, heads: int, fused: bool) -> Tensor:
    width = x.shape[-1]
    if fused:
        q, k, v = qkv(x).view(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv(x).split(width, -1))
    return x + out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _over_channels(x: Tensor, layer: nn.Module) -> Tensor:
    y: Tensor = layer(x.mT)
    return y.mT


def _shuffle(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).mT.flatten(-2)


def _two_streams(x: Tensor, left: nn.Module, right: nn.Module) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([b + left(a), right(b).tanh()], -1)


def _uneven_split(x: Tensor, layer: nn.Module) -> Tensor:
    a, b = x.split([3, x.shape[-1] - 3], -1)
    return torch.cat([a, layer(b).relu()], -1)


BLOCKS: dict[str, Callable[[int], nn.Module]] = {  # width -> block; input and output (batch 2, token 5, width)
    "linear": lambda w: nn.Sequential(nn.Linear(w, w), nn.GELU()),
    "residual": lambda w: Apply(
        lambda x, up, down: x + down(up(x).relu()), nn.Linear(w, 5), nn.Linear(5, w, bias=False)
    ),
    "layer_norm": nn.LayerNorm,
    "rms_norm": nn.RMSNorm,
    "dropout": lambda w: nn.Dropout(0.0),
    "batch_norm": lambda w: Apply(_over_channels, nn.BatchNorm1d(w)),
    "group_norm": lambda w: Apply(_over_channels, nn.GroupNorm(2, w)),
    "grouped": lambda w: Apply(_over_channels, nn.Conv1d(w, w, 3, padding=1, groups=w // 2)),
    "depthwise": lambda w: Apply(_over_channels, nn.Conv1d(w, w, 3, padding=1, groups=w)),
    "conv": lambda w: Apply(_over_channels, nn.Conv1d(w, w, 1)),
    "fused_heads": lambda w: Apply(
        lambda x, *p: _attention(x, *p, heads=2, fused=True), nn.Linear(w, 3 * w), nn.Linear(w, w)
    ),
    "separate_heads": lambda w: Apply(
        lambda x, *p: _attention(x, *p, heads=4, fused=False), nn.Linear(w, 3 * w), nn.Linear(w, w)
    ),
    "glu": lambda w: Apply(lambda x, up, down: down(F.glu(up(x))), nn.Linear(w, 6), nn.Linear(3, w)),
    "gate": lambda w: Apply(lambda x, a, b: x * b(a(x.mean(1)).tanh()).sigmoid()[:, None], *_down_and_up(w, 3)),
    "dense": lambda w: Apply(lambda x, a, b: b(torch.cat([x, a(x).relu()], -1)), nn.Linear(w, 3), nn.Linear(w + 3, w)),
    "shuffle": lambda w: Apply(_shuffle),
    "swap": lambda w: Apply(lambda x: torch.cat([-x[..., w // 2 :], x[..., : w // 2]], -1)),
    "streams": lambda w: Apply(_two_streams, nn.Linear(w // 2, w // 2), nn.Linear(w // 2, w // 2)),
    "uneven": lambda w: Apply(_uneven_split, nn.Linear(w - 3, w - 3)),
    "roll_tokens": lambda w: Apply(lambda x: x.roll(1, 1) - x[:, :1]),
    "bilinear": lambda w: Apply(lambda x, a: torch.einsum("btw,bsw->bts", a(x), x).softmax(-1) @ x, nn.Linear(w, w)),
    "cumsum": lambda w: Apply(lambda x: x.cumsum(-1)),
    "gru": lambda w: Apply(lambda x, layer: layer(x)[0], nn.GRU(w, w, batch_first=True)),
}


def _down_and_up(width: int, inner: int) -> tuple[nn.Module, nn.Module]:
    return nn.Linear(width, inner), nn.Linear(inner, width)


@st.composite
def networks(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[str, ...], bool]:
    """Widths, names of blocks, and whether the first block is used twice."""
    widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=2))
    names = draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5))
    return tuple(widths), tuple(names), draw(st.booleans())


def build(widths: tuple[int, ...], names: tuple[str, ...], reuse_first: bool) -> nn.Module:
    torch.manual_seed(0)
    blocks = [BLOCKS[name](widths[0]) for name in names]
    if reuse_first:
        blocks.append(blocks[0])
    blocks += [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(nn.Linear(3, widths[0]), *blocks, nn.Linear(widths[-1], 2))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(networks())
def test_every_symmetry_found_is_certified(drawn: tuple[tuple[int, ...], tuple[str, ...], bool]) -> None:
    module = build(*drawn)
    x = torch.randn(2, 5, 3)
    symmetry = symmetry_of(module, x)
    certificate = certify(module, symmetry, x)
    assert certificate.ok, f"{drawn}\n{certificate}\n{symmetry}"
    assert Symmetry.parse(str(symmetry)) == symmetry
