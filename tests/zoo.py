"""Tiny networks, each with example inputs and its symmetry written by hand.

Axes called `h`, `c`, `e` and the like are free; `fixed` names the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import glu, linear, scaled_dot_product_attention
from torch.nn.utils.parametrizations import weight_norm

from nfn_optim.symmetry import Symmetry


@dataclass(frozen=True)
class Network:
    """A network, its inputs and its symmetry.

    Args:
        name: For test ids.
        build: Returns a new module.
        inputs: Returns its positional arguments.
        symmetry: Name of a parameter or buffer -> its dimensions, in the order of the module.
        fixed: The axes that must not be permuted.
        sizes: Sizes of axes that only occur within products.
        nested: Axis -> the axes of other dimensions that it is nested in.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    symmetry: Mapping[str, str]
    fixed: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    nested: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def module(self) -> nn.Module:
        """A new module with reproducible weights."""
        torch.manual_seed(0)
        return self.build()

    def expected(self) -> Symmetry:
        """The symmetry written by hand, as a value."""
        module = self.module()
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        written = Symmetry.spec(self.symmetry, tensors, self.fixed, self.sizes)
        return Symmetry(written.dims, written.sizes, written.fixed, {**written.nested, **self.nested})


class Residual(nn.Module):
    """`x + body(x)`."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y


class Reused(nn.Module):
    """A hidden layer that is applied twice, so that its rows and columns are the same neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for _ in range(2):
            x = self.hidden(x).tanh()
        y: Tensor = self.last(x)
        return y


class TiedAutoencoder(nn.Module):
    """Encoder W, decoder W transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias).relu() @ self.weight


class LayerScale(nn.Module):
    """Parameters outside of layers: a position embedding, a scale per channel, a scalar gain."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 3, 6))
        self.scale = nn.Parameter(torch.randn(6))
        self.gain = nn.Parameter(torch.randn(()))
        self.embed, self.mix, self.head = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position  # (batch, token, channel)
        x = x + self.scale * self.gain * self.mix(x).relu()
        y: Tensor = self.head(x.mean(1))
        return y


class Gated(nn.Module):
    """A gated linear unit, whose halves are indexed by the same neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 10), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(glu(self.up(x)))
        return y


class Attention(nn.Module):
    """One attention head; queries and keys have another width than values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.q, self.k, self.v, self.o = nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)  # (batch, token, channel)
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        y: Tensor = self.head(x + self.o(weights @ self.v(x)))
        return y


class RunningMean(nn.Module):
    """A running mean updated in place, an unused buffer and an unused parameter."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(3, 5), nn.Linear(5, 2), nn.Parameter(torch.randn(5))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("idle", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        y: Tensor = self.last((x - self.mean).relu_())
        return y


class FusedAttention(nn.Module):
    """Two heads with a fused projection, position embeddings and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.embed, self.norm, self.qkv = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 18)
        self.out, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position  # (batch, token, e)
        q, k, v = self.qkv(self.norm(x)).reshape(len(x), 5, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = self.head(x[:, 0])
        return y


class GroupedQueries(nn.Module):
    """Four query heads on two key and value heads, rotary position embeddings, tied word embeddings."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.q, self.k, self.v = (nn.Linear(8, width, bias=False) for width in (16, 8, 8))
        self.out, self.norm = nn.Linear(16, 8, bias=False), nn.RMSNorm(8)
        self.register_buffer("angles", torch.rand(2))

    def rotated(self, x: Tensor) -> Tensor:
        """Rotates the pairs (i, i + 2) of the last dimension by position times angle."""
        angle = (torch.arange(x.shape[-2])[:, None] * self.angles).repeat(1, 2)
        return x * angle.cos() + torch.cat([-x[..., 2:], x[..., :2]], -1) * angle.sin()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)  # (batch, token, e)
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = self.rotated(q) @ self.rotated(k).mT
        x = self.norm(x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        return linear(x, self.words.weight)


class Recurrent(nn.Module):
    """A recurrent layer between two linear layers; returns the outputs of all time steps."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(3, 5), layer, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.layer(self.first(x))[0])
        return y


class Dense(nn.Module):
    """Dense connections, then a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(5, 4, 1), nn.Conv2d(9, 2, 1)
        self.squeeze, self.excite = nn.Conv2d(9, 3, 1), nn.Conv2d(3, 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.first(x).relu()], 1)
        x = torch.cat([x, self.second(x).relu()], 1)
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).tanh()).sigmoid()
        y: Tensor = self.last(x)
        return y


class Experts(nn.Module):
    """The mean of experts: experts may be permuted, and each may permute its own neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 1, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eih->ebh", x, self.up) + self.bias
        return torch.bmm(hidden.relu(), self.down).mean(0)


class ExpertsByNumber(Experts):
    """A weighted sum of experts, which are taken one by one."""

    def forward(self, x: Tensor) -> Tensor:
        experts = enumerate(zip(self.up, self.bias, self.down, strict=True), start=1)
        return sum((i * ((x @ up + bias).relu() @ down) for i, (up, bias, down) in experts), torch.zeros(()))


def _normal(*shape: int) -> Callable[[], tuple[Tensor]]:
    """Inputs: one tensor of standard normal entries."""
    return lambda: (torch.randn(*shape, generator=torch.Generator().manual_seed(1)),)


ZOO = (
    Network(
        "mlp",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)),
        _normal(4, 3),
        {"0.weight": "h in", "0.bias": "h", "2.weight": "out h", "2.bias": "out"},
        ("in", "out"),
    ),
    Network(
        "deep_mlp",
        lambda: nn.Sequential(
            *(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 6), nn.LeakyReLU()),
            *(nn.Dropout(), nn.Linear(6, 2), nn.LogSoftmax(-1)),
        ),
        _normal(4, 3),
        {
            "0.weight": "h0 in",
            "0.bias": "h0",
            "2.weight": "h1 h0",
            "2.bias": "h1",
            "4.weight": "h2 h1",
            "4.bias": "h2",
            "7.weight": "out h2",
            "7.bias": "out",
        },
        ("in", "out"),
    ),
    Network(
        "bias_free_mlp_on_images",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False), nn.Tanh(), nn.Linear(5, 1, bias=False)),
        _normal(4, 2, 2, 3),
        {"1.weight": "h in", "3.weight": "out h"},
        ("in", "out"),
    ),
    Network(
        "mlp_batch_norm",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Sigmoid(), nn.Linear(5, 2)),
        _normal(4, 3),
        {
            "0.weight": "h in",
            "0.bias": "h",
            "1.weight": "h",
            "1.bias": "h",
            "3.weight": "out h",
            "3.bias": "out",
            "1.running_mean": "h",
            "1.running_var": "h",
            "1.num_batches_tracked": "",
        },
        ("in", "out"),
    ),
    Network(
        "token_mlp_layer_norm",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.ReLU(), nn.RMSNorm(5), nn.Linear(5, 2)),
        _normal(2, 4, 3),
        {
            "0.weight": "h in",
            "0.bias": "h",
            "1.weight": "h",
            "1.bias": "h",
            "3.weight": "h",
            "4.weight": "out h",
            "4.bias": "out",
        },
        ("in", "out"),
    ),
    Network(
        "residual_mlp",
        lambda: nn.Sequential(
            *(nn.Linear(3, 5), Residual(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5))),
            *(Residual(nn.LayerNorm(5), nn.Linear(5, 5)), nn.Linear(5, 2)),
        ),
        _normal(4, 3),
        {
            "0.weight": "h in",
            "0.bias": "h",
            "1.body.0.weight": "m h",
            "1.body.0.bias": "m",
            "1.body.2.weight": "h m",
            "1.body.2.bias": "h",
            "2.body.0.weight": "h",
            "2.body.0.bias": "h",
            "2.body.1.weight": "h h",
            "2.body.1.bias": "h",
            "3.weight": "out h",
            "3.bias": "out",
        },
        ("in", "out"),
    ),
    Network(
        "cnn_flatten",
        lambda: nn.Sequential(
            *(
                nn.Conv2d(1, 3, 3),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(3, 4, 3, padding=1),
                nn.Tanh(),
                nn.AvgPool2d(2),
            ),
            *(nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 2)),
        ),
        _normal(2, 1, 10, 14),
        {
            "0.weight": "c in i j",
            "0.bias": "c",
            "3.weight": "d c k l",
            "3.bias": "d",
            "7.weight": "h (d y x)",
            "7.bias": "h",
            "9.weight": "out h",
            "9.bias": "out",
        },
        ("in", "out", "i", "j", "k", "l", "y", "x"),
        {"y": 2, "x": 3},
    ),
    Network(
        "cnn_batch_norm",
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU6(), nn.Dropout2d(), nn.Conv2d(3, 4, 1)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
        ),
        _normal(2, 2, 6, 6),
        {
            "0.weight": "c in i j",
            "1.weight": "c",
            "1.bias": "c",
            "4.weight": "d c k l",
            "4.bias": "d",
            "7.weight": "out d",
            "7.bias": "out",
            "1.running_mean": "c",
            "1.running_var": "c",
            "1.num_batches_tracked": "",
        },
        ("in", "out", "i", "j", "k", "l"),
    ),
    Network(
        "residual_cnn",
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False)),
            *(Residual(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3, padding=1)),),
            *(nn.AdaptiveMaxPool2d(2), nn.Conv2d(3, 2, 2), nn.Flatten()),
        ),
        _normal(2, 2, 6, 6),
        {
            "0.weight": "c in i j",
            "0.bias": "c",
            "2.body.0.weight": "d c k l",
            "2.body.0.bias": "d",
            "2.body.2.weight": "c d m n",
            "2.body.2.bias": "c",
            "4.weight": "out c p q",
            "4.bias": "out",
            "1.running_mean": "c",
            "1.running_var": "c",
            "1.num_batches_tracked": "",
        },
        ("in", "out", "i", "j", "k", "l", "m", "n", "p", "q"),
    ),
    Network(
        "depthwise_separable",
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 5, 1), nn.ReLU()),
            *(nn.InstanceNorm2d(5, affine=True), nn.Conv2d(5, 2, 1)),
        ),
        _normal(2, 1, 6, 6),
        {
            "0.weight": "c in i j",
            "0.bias": "c",
            "1.weight": "c one k l",
            "1.bias": "c",
            "2.weight": "d c m n",
            "2.bias": "d",
            "4.weight": "d",
            "4.bias": "d",
            "5.weight": "out d p q",
            "5.bias": "out",
        },
        ("in", "out", "one", "i", "j", "k", "l", "m", "n", "p", "q"),
    ),
    Network(
        "group_norm",
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.GroupNorm(1, 4), nn.Mish(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.GroupNorm(4, 4)),
            *(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)),
        ),
        _normal(2, 2, 6, 6),
        {
            "0.weight": "c in i j",
            "0.bias": "c",
            "1.weight": "c",
            "1.bias": "c",
            "3.weight": "d c k l",
            "3.bias": "d",
            "5.weight": "d",
            "5.bias": "d",
            "6.weight": "(g > e) d m n",
            "6.bias": "(g > e)",
            "7.weight": "(g > e)",
            "7.bias": "(g > e)",
            "8.weight": "out (g > e) p q",
            "8.bias": "out",
        },
        ("in", "out", "i", "j", "k", "l", "m", "n", "p", "q"),
        {"g": 2},
    ),
    Network(
        "conv1d",
        lambda: nn.Sequential(
            *(nn.Conv1d(2, 3, 3), nn.ELU(), nn.MaxPool1d(2), nn.ConvTranspose1d(3, 4, 2, stride=2)),
            *(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 2, 1)),
        ),
        _normal(2, 2, 10),
        {
            "0.weight": "c in i",
            "0.bias": "c",
            "3.weight": "c (g > d) j",
            "3.bias": "(g > d)",
            "4.weight": "(g > e) d k",
            "4.bias": "(g > e)",
            "5.weight": "out (g > e) l",
            "5.bias": "out",
        },
        ("in", "out", "i", "j", "k", "l"),
        {"g": 2},
    ),
    Network(
        "conv3d",
        lambda: nn.Sequential(nn.Conv3d(1, 3, 2), nn.ReLU(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(3, 2)),
        _normal(2, 1, 3, 3, 3),
        {"0.weight": "c in i j k", "0.bias": "c", "4.weight": "out c", "4.bias": "out"},
        ("in", "out", "i", "j", "k"),
    ),
    Network(
        "embedding_bag",
        lambda: nn.Sequential(nn.Embedding(7, 4), weight_norm(nn.Linear(4, 5)), nn.PReLU(), nn.Linear(5, 2)),
        lambda: (torch.tensor([[0, 6, 1], [2, 3, 4]]),),
        {
            "0.weight": "vocabulary e",
            "1.bias": "h",
            "1.parametrizations.weight.original0": "h one",
            "1.parametrizations.weight.original1": "h e",
            "2.weight": "slope",
            "3.weight": "out h",
            "3.bias": "out",
        },
        ("vocabulary", "out", "one", "slope"),
    ),
    Network(
        "reused",
        Reused,
        _normal(4, 3),
        {
            "first.weight": "h in",
            "first.bias": "h",
            "hidden.weight": "h h",
            "hidden.bias": "h",
            "last.weight": "out h",
            "last.bias": "out",
        },
        ("in", "out"),
    ),
    Network("tied_autoencoder", TiedAutoencoder, _normal(3, 4), {"weight": "h in", "bias": "h"}, ("in",)),
    Network(
        "layer_scale",
        LayerScale,
        _normal(2, 3, 4),
        {
            "position": "one token e",
            "scale": "e",
            "gain": "",
            "embed.weight": "e in",
            "embed.bias": "e",
            "mix.weight": "e e",
            "head.weight": "out e",
            "head.bias": "out",
        },
        ("one", "token", "in", "out"),
    ),
    Network(
        "gated",
        Gated,
        _normal(4, 3),
        {"up.weight": "(half h) in", "up.bias": "(half h)", "down.weight": "out h", "down.bias": "out"},
        ("half", "in", "out"),
        {"half": 2},
    ),
    Network(
        "attention",
        Attention,
        _normal(2, 4, 3),
        {
            "embed.weight": "e in",
            "embed.bias": "e",
            "head.weight": "out e",
            "head.bias": "out",
            "q.weight": "a e",
            "q.bias": "a",
            "k.weight": "a e",
            "v.weight": "b e",
            "v.bias": "b",
            "o.weight": "e b",
            "o.bias": "e",
        },
        ("in", "out"),
    ),
    Network(
        "fused_qkv",
        FusedAttention,
        _normal(2, 4, 3),
        {
            "token": "one one2 e",
            "position": "one3 position e",
            "embed.weight": "e in",
            "embed.bias": "e",
            "norm.weight": "e",
            "norm.bias": "e",
            "qkv.weight": "((h > d) + (h > d) + (h > c)) e",
            "qkv.bias": "((h > d) + (h > d) + (h > c))",
            "out.weight": "e (h > c)",
            "out.bias": "e",
            "head.weight": "out e",
            "head.bias": "out",
        },
        ("one", "one2", "one3", "position", "in", "out"),
        {"h": 2, "d": 3},
    ),
    Network(
        "grouped_queries",
        GroupedQueries,
        lambda: (torch.tensor([[0, 6, 1], [2, 3, 4]]),),
        {
            "words.weight": "vocabulary e",
            "q.weight": "(g > h half pair) e",
            "k.weight": "(g half pair) e",
            "v.weight": "(g > c) e",
            "out.weight": "e (g > h c)",
            "norm.weight": "e",
            "angles": "pair",
        },
        ("vocabulary", "half"),
        {"g": 2, "h": 2, "half": 2, "pair": 2, "c": 4},
    ),
    Network(
        "encoder_layer",
        lambda: nn.Sequential(nn.Linear(3, 6), nn.TransformerEncoderLayer(6, 2, 8, 0.0), nn.Linear(6, 2)),
        _normal(4, 2, 3),
        {
            "0.weight": "e in",
            "0.bias": "e",
            "1.self_attn.in_proj_weight": "((h > d) + (h > d) + (h > c)) e",
            "1.self_attn.in_proj_bias": "((h > d) + (h > d) + (h > c))",
            "1.self_attn.out_proj.weight": "e (h > c)",
            "1.self_attn.out_proj.bias": "e",
            "1.linear1.weight": "m e",
            "1.linear1.bias": "m",
            "1.linear2.weight": "e m",
            "1.linear2.bias": "e",
            "1.norm1.weight": "e",
            "1.norm1.bias": "e",
            "1.norm2.weight": "e",
            "1.norm2.bias": "e",
            "2.weight": "out e",
            "2.bias": "out",
        },
        ("in", "out"),
        {"h": 2, "d": 3},
    ),
    Network(
        "lstm",
        lambda: Recurrent(nn.LSTM(5, 4, num_layers=2), 4),
        _normal(3, 2, 3),
        {
            "first.weight": "e in",
            "first.bias": "e",
            "layer.weight_ih_l0": "(gate h) e",
            "layer.weight_hh_l0": "(gate h) h",
            "layer.bias_ih_l0": "(gate h)",
            "layer.bias_hh_l0": "(gate h)",
            "layer.weight_ih_l1": "(gate2 k) h",
            "layer.weight_hh_l1": "(gate2 k) k",
            "layer.bias_ih_l1": "(gate2 k)",
            "layer.bias_hh_l1": "(gate2 k)",
            "last.weight": "out k",
            "last.bias": "out",
        },
        ("in", "out", "gate", "gate2"),
        {"gate": 4},
    ),
    Network(
        "gru_both_ways",
        lambda: Recurrent(nn.GRU(5, 4, bidirectional=True), 8),
        _normal(3, 2, 3),
        {
            "first.weight": "e in",
            "first.bias": "e",
            "layer.weight_ih_l0": "(gate h) e",
            "layer.weight_hh_l0": "(gate2 h) h",
            "layer.bias_ih_l0": "(gate h)",
            "layer.bias_hh_l0": "(gate2 h)",
            "layer.weight_ih_l0_reverse": "(gate3 k) e",
            "layer.weight_hh_l0_reverse": "(gate4 k) k",
            "layer.bias_ih_l0_reverse": "(gate3 k)",
            "layer.bias_hh_l0_reverse": "(gate4 k)",
            "last.weight": "out (h + k)",
            "last.bias": "out",
        },
        ("in", "out", "gate", "gate2", "gate3", "gate4"),
        {"gate": 3},
    ),
    Network(
        "dense_with_gate",
        Dense,
        _normal(2, 2, 4, 4),
        {
            "first.weight": "c in i j",
            "first.bias": "c",
            "second.weight": "d (in + c) k l",
            "second.bias": "d",
            "last.weight": "out (in + c + d) m n",
            "last.bias": "out",
            "squeeze.weight": "s (in + c + d) o p",
            "squeeze.bias": "s",
            "excite.weight": "(in + c + d) s q r",
            "excite.bias": "(in + c + d)",
        },
        ("in", "out", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r"),
        {"in": 2},
    ),
    Network(
        "pixel_shuffle",
        lambda: nn.Sequential(nn.Conv2d(2, 12, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 2, 1)),
        _normal(2, 2, 5, 5),
        {
            "0.weight": "(c y x) in i j",
            "0.bias": "(c y x)",
            "3.weight": "out c k l",
            "3.bias": "out",
        },
        ("in", "out", "y", "x", "i", "j", "k", "l"),
        {"y": 2, "x": 2},
    ),
    Network(
        "experts",
        Experts,
        _normal(4, 4),
        {"up": "x in h", "bias": "x one h", "down": "x h out"},
        ("in", "out", "one"),
        nested={"h": ("x",)},
    ),
    Network(
        "experts_by_number",
        ExpertsByNumber,
        _normal(4, 4),
        {"up": "x in h", "bias": "x one h", "down": "x h out"},
        ("in", "out", "one", "x"),
        nested={"h": ("x",)},
    ),
    Network(
        "statistics",
        RunningMean,
        _normal(4, 3),
        {
            "unused": "x",
            "first.weight": "h in",
            "first.bias": "h",
            "last.weight": "out h",
            "last.bias": "out",
            "mean": "h",
            "idle": "y",
        },
        ("in", "out", "x", "y"),
    ),
)
BY_NAME = {network.name: network for network in ZOO}
FEW = {"mlp", "cnn_batch_norm", "attention", "gru_both_ways"}
"""Networks that have most of it, for `make test-fast`."""
