"""Tracing: properties of every network of the zoo, single ops, inputs and modules of all kinds, certificates."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import properties
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from nfn_optim.symmetry import Symmetry, certify, symmetry_of
from nfn_optim.symmetry.expression import axes_of


@pytest.mark.parametrize("network", zoo.ZOO, ids=lambda network: network.name)
@pytest.mark.parametrize("check", properties.TRACED, ids=lambda check: check.__name__)
def test_property(check: Callable[[zoo.Network], None], network: zoo.Network) -> None:
    check(network)


# ----------------------------------------------------------------------------------------------------------- single ops


class Between(nn.Module):
    """A linear layer, then an op, then a scale that is different for every entry of its output."""

    def __init__(self, op: Callable[[Tensor], Tensor], image: bool) -> None:
        super().__init__()
        self.op = op
        self.first = nn.Conv2d(2, 6, 1) if image else nn.Linear(2, 6)
        x = torch.randn(4, 2, 5, 7) if image else torch.randn(4, 5, 2)
        self.scale = nn.Parameter(torch.randn(op(self.first(x)).shape))

    def forward(self, x: Tensor) -> Tensor:
        return (self.op(self.first(x)) * self.scale).sum()


def _assigned(target: Tensor, index: Any, value: Any) -> Tensor:
    target = target.clone()
    target[index] = value
    return target


def _padded(t: Tensor, *shape: int) -> Tensor:
    out = t.new_zeros(shape)
    out[tuple(slice(0, size) for size in t.shape)] = t
    return out


def _causal_attention(t: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(t, t, t, is_causal=True)


FREE: dict[str, Callable[[Tensor], Tensor]] = {  # tokens (batch 4, token 5, h 6)
    "unary": lambda t: t.sigmoid().sqrt().neg().clamp(-1, 1).tanh_(),
    "binary": lambda t: torch.lerp(t, t.exp(), 0.3) + torch.addcmul(t, t, t) - torch.where(t > 0, t, -t),
    "activations": lambda t: F.hardswish(F.softplus(F.elu(F.gelu(F.silu(F.mish(t))))), inplace=True),
    "rrelu": lambda t: F.rrelu(F.dropout(t, training=False), training=False),
    "logsigmoid": F.logsigmoid,
    "masked_fill": lambda t: t.masked_fill(t.detach() > 0, 2.0),
    "softmax": lambda t: t.softmax(-1) + t.log_softmax(-1),
    "normalize": lambda t: F.normalize(t, dim=-1) * F.cosine_similarity(t, t.exp(), dim=-1)[..., None],
    "layer_norm": lambda t: F.layer_norm(t, (5, 6)) + F.rms_norm(t, (6,)),
    "mean": lambda t: t.mean(-1) + t.sum(2) + t.amax(-1) + t.logsumexp(-1) + t.norm(dim=-1) + t.prod(-1),
    "variance": lambda t: t.var((0, 2)) + t.std((0, -1)) + torch.var_mean(t, (0, 2))[1],
    "full_reductions": lambda t: t.sum() + t.max() + t.mean() + t.norm(),
    "max_values": lambda t: t.max(-1).values,
    "cumsum_over_tokens": lambda t: t.cumsum(1).flip(1).roll(1, 1),
    "sort_tokens": lambda t: t.sort(1).values + t.topk(5, 1).values,
    "views": lambda t: t.reshape(20, 6).view(2, 10, 6).flatten(1),
    "factors": lambda t: t.view(4, 5, 2, 3).sum(2),
    "reordered_dims": lambda t: t.transpose(0, 2).permute(1, 0, 2).mT[None].squeeze(0).movedim(0, 2).contiguous(),
    "expand": lambda t: t[:, :, None].expand(4, 5, 3, 6) + t[:, :1].expand_as(t)[:, :, None],
    "repeat": lambda t: t.repeat(2, 1, 3),
    "repeat_interleave": lambda t: t.repeat_interleave(3, -1),
    "slice_tokens": lambda t: t[:, 1:] - t[:, :-1] + t[:, 2:3] + t.select(1, 0)[:, None] + t.narrow(1, 0, 1),
    "chunks": lambda t: t.chunk(2, -1)[0] * torch.split(t, 3, -1)[1],
    "unbind_tokens": lambda t: torch.stack(t.unbind(1), -1) + torch.cat([t, t], 1).chunk(2, 1)[0].mT,
    "index_tokens": lambda t: t[:, [0, 2]] + t.index_select(1, torch.tensor([1, 1])) + t[:, 3:, :],
    "index_many": lambda t: t[[0, 1], [1, 2]],
    "gather_tokens": lambda t: t.gather(1, torch.zeros(4, 2, 6, dtype=torch.int64)),
    "write_tokens": lambda t: _assigned(t, (slice(None), 0), 1.0),
    "write_mask": lambda t: _assigned(t, t > 0, 0.0),
    "write_padded": lambda t: _padded(t, 4, 8, 6),
    "pad_tokens": lambda t: F.pad(t, (0, 0, 1, 2)),
    "gram": lambda t: t @ t.mT,
    "outer": lambda t: t[..., None] * t[..., None, :],
    "covariance": lambda t: torch.einsum("bti,btj->bij", t, t) + torch.baddbmm(t.mT @ t, t.mT, t),
    "vectors": lambda t: t[0] @ t[0, 0] + torch.mv(t[1], t[0, 1]) + torch.dot(t[0, 0], t[0, 1]),
    "distances": lambda t: (t[:, :, None] - t[:, None]).square().sum(-1).sqrt(),
    "glu": F.glu,
    "bilinear": lambda t: F.bilinear(t, t, torch.ones(3, 6, 6)),
    "attention": _causal_attention,
    "heads": lambda t: _causal_attention(t.view(4, 5, 2, 3).transpose(1, 2)).transpose(1, 2),
    "constants": lambda t: t + torch.ones(6) * torch.zeros_like(t) + torch.full((6,), 2.0),
    "positions": lambda t: t * torch.arange(5.0)[:, None] + torch.rand(5, 1) * 0,
    "loss": lambda t: F.mse_loss(t, t.exp()) + F.smooth_l1_loss(t, t * 2, reduction="none").mean(0),
    "casts": lambda t: t.to(torch.float32).double().type_as(t).detach() + t.data,
    "in_place": lambda t: t.clone().add_(1).mul_(t).copy_(t[:, :1]).fill_(2).zero_() + t,
    "pixel_norm": lambda t: t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1),
}
FREE_IMAGE: dict[str, Callable[[Tensor], Tensor]] = {  # images (batch 4, h 6, 5, 7)
    "pools": lambda t: F.max_pool2d(t, 2) + F.avg_pool2d(t, 2) + F.adaptive_avg_pool2d(t, (2, 3)),
    "pool_indices": lambda t: F.max_pool2d(t, 2, return_indices=True)[1] * F.adaptive_max_pool2d(t, (2, 3)),
    "resize": lambda t: F.interpolate(t, scale_factor=2) + F.interpolate(t, size=(10, 14), mode="bilinear"),
    "pads": lambda t: (
        F.pad(t, (1, 1)) + F.pad(t, (1, 1, 0, 0), mode="reflect") + F.pad(t, (1, 1, 0, 0), mode="circular")
    ),
    "norms": lambda t: (
        F.instance_norm(t) + F.group_norm(t, 1) + F.group_norm(t, 6) + F.batch_norm(t, None, None, training=True)
    ),
    "patches": lambda t: t.unfold(2, 2, 2).sum((2, 3)),
    "im2col": lambda t: F.unfold(t, 2),
    "depthwise": lambda t: (
        F.conv2d(t, torch.ones(12, 1, 2, 2), groups=6)
        + F.conv_transpose2d(t, torch.ones(6, 2, 1, 1), groups=6)[..., 1:, 1:]
    ),
    "global": lambda t: t.mean((2, 3)) + t.amax((2, 3)) + t.flatten(2).max(-1)[0],
    "flatten": lambda t: t.flatten(1),
    "shuffle": lambda t: t.view(4, 2, 3, 5, 7).transpose(1, 2).reshape(4, 6, 5, 7),
}
PARTS: dict[str, Callable[[Tensor], Tensor]] = {  # an axis that is sliced or padded: some factors stay free
    "slice": lambda t: t[..., :3],
    "stride": lambda t: t[..., ::2],
    "uneven_split": lambda t: torch.split(t, [2, 4], -1)[1],
    "cat": lambda t: torch.cat([t, t], -1),
    "pad": lambda t: F.pad(t, (0, 1)),
    "write": lambda t: _assigned(t, (..., 0), 1.0),
    "write_padded": lambda t: _padded(t, 4, 5, 12),
    "select": lambda t: t[..., 2],
    "write_view": lambda t: t.clone().transpose(0, 2).select(0, 1).fill_(3.0).sum() * 0 + _assigned(t, (..., 1), 3.0),
    "channel_shuffle": lambda t: torch.cat([t, t.exp()], -1).view(4, 5, 2, 6).mT.flatten(2),
    "halves_swapped": lambda t: torch.cat([-t[..., 3:], t[..., :3]], -1) + t,
    "interleaved": lambda t: torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2) + t,
    "crop": lambda t: F.pad(t, (-1, -2)),
    "gated": lambda t: F.glu(t) + t.tensor_split(2, -1)[1].sigmoid(),
}
FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "cumsum": lambda t: t.cumsum(-1),
    "flip": lambda t: t.flip(-1),
    "roll": lambda t: t.roll(1, -1),
    "sort": lambda t: t.sort(-1).values,
    "topk": lambda t: t.topk(3).values,
    "kthvalue": lambda t: t.kthvalue(2, -1).values,
    "argmax": lambda t: t.argmax(-1),
    "max_indices": lambda t: t.max(-1).indices * 1.0,
    "unbind": lambda t: t.unbind(-1)[0],
    "tril": lambda t: t.tril(),
    "index": lambda t: t[..., [0, 2]],
    "index_select": lambda t: t.index_select(2, torch.tensor([1, 1])),
    "gather": lambda t: t.gather(2, torch.zeros(4, 5, 2, dtype=torch.int64)),
    "scatter": lambda t: t.scatter(2, torch.zeros(4, 5, 2, dtype=torch.int64), 1.0),
    "write_index": lambda t: _assigned(t, (slice(None), slice(None), [0, 1]), 1.0),
    "eye": lambda t: t @ torch.eye(6),
    "arange": lambda t: t * torch.arange(6),
    "noise": lambda t: t * torch.linspace(0, 1, 6),
    "literal": lambda t: t * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    "misaligned": lambda t: t.reshape(4, 3, 10),
    "causal_over_neurons": lambda t: _causal_attention(t.mT),
    "cross_entropy": lambda t: F.cross_entropy(t.transpose(1, 2), torch.zeros(4, 5, dtype=torch.int64)),
}
UNKNOWN: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "fft": ("aten::_fft_r2c", lambda t: torch.fft.rfft(t).abs()),
    "qr": ("aten::linalg_qr", lambda t: torch.linalg.qr(t).R + torch.linalg.qr(t.exp()).R),
}


def _traced_between(op: Callable[[Tensor], Tensor], image: bool = False) -> tuple[nn.Module, Symmetry, Tensor]:
    torch.manual_seed(0)
    module = Between(op, image)
    x = torch.randn(4, 2, 5, 7) if image else torch.randn(4, 5, 2)
    return module, symmetry_of(module, x), x


def _has_free_axis(symmetry: Symmetry) -> bool:
    return any(axis in symmetry.free for axis in symmetry.axes_of("first.bias"))


@pytest.mark.parametrize("name", [*FREE, *PARTS, *FREE_IMAGE])
def test_op_keeps_axis_free(name: str) -> None:
    module, symmetry, x = _traced_between({**FREE, **PARTS, **FREE_IMAGE}[name], image=name in FREE_IMAGE)
    assert _has_free_axis(symmetry), str(symmetry)
    certificate = certify(module, symmetry, x)
    assert certificate.ok, f"{certificate}\n{symmetry}"


@pytest.mark.parametrize("name", FIXED)
def test_op_fixes_axis(name: str) -> None:
    module, symmetry, x = _traced_between(FIXED[name])
    assert certify(module, symmetry, x).ok
    assert not _has_free_axis(symmetry), str(symmetry)


@pytest.mark.parametrize("name", UNKNOWN)
def test_op_without_rule_is_reported_once(name: str) -> None:
    op, function = UNKNOWN[name]
    with pytest.warns(UserWarning, match="no rule for the op") as caught:
        module, symmetry, x = _traced_between(function)
    assert [op in str(w.message) for w in caught] == [True]
    assert certify(module, symmetry, x).ok
    assert not _has_free_axis(symmetry)


# -------------------------------------------------------------------------------------------- inputs, modes and modules

MLP = zoo.ZOO[0]


def _data_dependent(t: Tensor) -> Tensor:
    return t if t.sum() > 0 else -t


def _generator(t: Tensor) -> Any:
    return (row for row in t)


@pytest.mark.parametrize(
    "op", [_data_dependent, _generator, lambda t: t[t > 0], lambda t: t.sum().item(), lambda _: 1 / 0]
)
def test_untraceable_modules_are_separate(op: Callable[[Tensor], Any]) -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), zoo.Residual())
    module[2].forward = op
    with pytest.warns(UserWarning, match="could not be traced") as caught:
        symmetry = symmetry_of(module, torch.randn(4, 3))
    assert len(caught) == 1
    tensors = {**dict(module.named_parameters()), **{n: b for n, b in module.named_buffers() if b.dim()}}
    assert symmetry == Symmetry.separate({name: tuple(t.shape) for name, t in tensors.items()})


def test_modules_with_wrong_inputs_are_separate() -> None:
    with pytest.warns(UserWarning, match="could not be traced"):
        assert not symmetry_of(MLP.module(), torch.randn(4, 7)).free


def test_op_without_rule_fixes_only_its_inputs_and_outputs() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.fft.rfft(x).abs()
            return y

    network = nn.Sequential(
        nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 6), Spectrum(), nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2)
    )
    with pytest.warns(UserWarning, match="submodule '3'") as caught:
        symmetry = symmetry_of(network, torch.randn(4, 3))
    assert len(caught) == 1
    assert [symmetry.sizes[axis] for axis in symmetry.free] == [5, 7]
    assert certify(network, symmetry, torch.randn(4, 3)).ok


def _meta(x: Tensor) -> Tensor:
    return x.to("meta")


def _fake(x: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


@pytest.mark.parametrize("convert", [_meta, _fake, Tensor.double, lambda x: x.clone().requires_grad_()])
def test_only_the_shapes_of_inputs_matter(convert: Callable[[Tensor], Tensor]) -> None:
    module = MLP.module()
    inputs = convert(torch.randn(4, 3))
    assert symmetry_of(module.double() if inputs.dtype == torch.float64 else module, inputs).canonical() == _expected()


def _expected() -> Symmetry:
    return MLP.expected().canonical()


@pytest.mark.parametrize(
    "around", [torch.no_grad, torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu")]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_any_grad_mode(around: Callable[[], Any], frozen: bool) -> None:
    module = MLP.module().requires_grad_(not frozen)
    with around():
        assert symmetry_of(module, torch.randn(4, 3)).canonical() == _expected()
    assert all(p.grad is None for p in module.parameters())


def test_module_on_meta() -> None:
    with torch.device("meta"):
        module = MLP.build()
    assert symmetry_of(module, torch.randn(4, 3)).canonical() == _expected()
    assert not certify(module, symmetry_of(module, torch.randn(4, 3)), torch.randn(4, 3)).ok


class ReassignedBuffer(nn.Module):
    """Each forward pass assigns a new tensor to a buffer."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(3, 5), nn.Linear(5, 2)
        self.register_buffer("last", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.last = x.mean(0)
        y: Tensor = self.out(x)
        return y


def test_reassigned_buffers_keep_their_axes() -> None:
    module = ReassignedBuffer()
    before = module.last
    symmetry = symmetry_of(module, torch.randn(4, 3))
    assert symmetry.dims["last"] == symmetry.dims["first.bias"]
    assert module.last is before


class ClampedWeight(nn.Linear):
    """Writes to its own parameter, which is only allowed without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.clamp_(-1, 1)
        return super().forward(x)


def test_parameters_written_in_the_forward_pass() -> None:
    module = nn.Sequential(ClampedWeight(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        assert len(symmetry_of(module, torch.randn(4, 3)).free) == 1
    with pytest.warns(UserWarning, match="in-place"):
        symmetry_of(module, torch.randn(4, 3))


class StructuredIO(nn.Module):
    """Keyword inputs, a dataclass as output, side effects on itself."""

    @dataclass
    class Output:
        """The output."""

        logits: Tensor
        hidden: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)
        self.history: list[Tensor] = []

    def forward(self, *, batch: dict[str, Tensor], scale: float, hidden: bool = False) -> StructuredIO.Output:
        x = self.first(batch["x"] * scale).relu()
        self.cache = x
        self.history.append(x)
        random.random()
        return self.Output(self.last(x), {"states": [x] if hidden else None})


@pytest.mark.parametrize("hidden", [False, True])
def test_structured_inputs_and_outputs(hidden: bool) -> None:
    module, batch, state = StructuredIO(), {"x": torch.randn(4, 3)}, random.getstate()
    symmetry = symmetry_of(module, batch=batch, scale=2.0, hidden=hidden)
    assert (symmetry.dims["first.bias"][0] in symmetry.free) is not hidden
    assert certify(module, symmetry, batch=batch, scale=2.0, hidden=hidden).ok
    assert not module.history
    assert not hasattr(module, "cache")
    assert random.getstate() == state


def test_outputs_without_tensors_are_untraceable() -> None:
    module = nn.Sequential(nn.Linear(3, 5))
    module.forward = lambda x: "done"  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="no tensor found"):
        symmetry_of(module, torch.randn(4, 3))


def test_names_are_readable() -> None:
    network = next(network for network in zoo.ZOO if network.name == "cnn_flatten")
    symmetry = properties.traced(network)
    assert symmetry.dims["0.weight"] == ("h0", "in0", "k0", "k1")
    assert symmetry.dims["7.weight"] == ("h2", "(h1 x0 x1)")
    assert symmetry.dims["9.weight"] == ("out0", "h2")
    assert symmetry == properties.traced(network)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # importing the compiler
def test_compiled_modules_keep_their_prefix() -> None:
    compiled = cast("nn.Module", torch.compile(MLP.module()))
    symmetry = symmetry_of(compiled, torch.randn(4, 3))
    assert list(symmetry.dims) == [name for name, _ in compiled.named_parameters()]
    assert symmetry.rename({name: name.removeprefix("_orig_mod.") for name in symmetry.dims}).canonical() == _expected()
    assert certify(compiled, symmetry, torch.randn(4, 3)).ok


def test_data_parallel_keeps_its_prefix() -> None:
    symmetry = symmetry_of(nn.DataParallel(MLP.module()), torch.randn(4, 3))
    assert next(iter(symmetry.dims)) == "module.0.weight"
    assert len(symmetry.free) == 1


def test_lazy_parameters_are_an_error() -> None:
    with pytest.raises(ValueError, match="call the module once"):
        symmetry_of(nn.LazyLinear(3), torch.randn(4, 3))


def test_views_of_parameters_outside_the_module_fix_them() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    rows = module.get_parameter("0.weight").detach()[1:3]
    module.register_forward_pre_hook(lambda _, args: (args[0] + rows.sum() * 0 + rows[:1],))
    symmetry = symmetry_of(module, torch.randn(4, 3))
    assert symmetry.dims["0.weight"][0] in symmetry.fixed


def test_replaced_parameter_data_is_reported() -> None:
    class Clipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data.flip(0)
            return super().forward(x)

    with pytest.warns(UserWarning, match="replaces the data"):
        assert not symmetry_of(nn.Sequential(Clipped(3, 5), nn.Linear(5, 2)), torch.randn(4, 3)).free


def test_hooks_are_removed() -> None:
    from torch.nn.modules import module as hooks

    before = dict(hooks._global_forward_pre_hooks), dict(hooks._global_forward_hooks)
    symmetry_of(MLP.module(), torch.randn(4, 3))
    assert before == (dict(hooks._global_forward_pre_hooks), dict(hooks._global_forward_hooks))


def test_certificate_lists_broken_axes() -> None:
    module = MLP.module()
    unsound = Symmetry.spec(
        {"0.weight": "h i", "0.bias": "b", "2.weight": "o h", "2.bias": "o"}, dict(module.named_parameters())
    )
    certificate = certify(module, unsound, torch.randn(4, 3))
    assert certificate.broken == ("h", "i", "b", "o")
    assert "not certified: 4 free axes" in str(certificate)
    sound = certify(module, symmetry_of(module, torch.randn(4, 3)), torch.randn(4, 3))
    assert sound.ok
    assert str(sound).endswith("certified: 1 free axes, tolerance 1e-08")


class FourierIdentity(nn.Module):
    """The identity, computed by ops without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(x, dim=0), dim=0).real


@pytest.mark.filterwarnings("ignore:no rule for the op")
def test_certificate_finds_symmetry_that_is_not_claimed() -> None:
    module, x = nn.Sequential(nn.Linear(3, 5), FourierIdentity(), nn.Linear(5, 2)), torch.randn(4, 3)
    symmetry = symmetry_of(module, x)
    assert not symmetry.free
    certificate = certify(module, symmetry, x, search=True)
    hidden = symmetry.dims["0.weight"][0], symmetry.dims["2.weight"][1]
    assert certificate.missed == (f"{hidden[0]} and {hidden[1]} could be one free axis",)
    assert certificate.missed[0] in str(certificate)
    heads = next(network for network in zoo.ZOO if network.name == "fused_qkv")
    full = symmetry_of(heads.module(), *heads.inputs())
    without_nesting = Symmetry(
        {n: tuple(d.replace(" >", "") for d in dims) for n, dims in full.dims.items()}, full.sizes, full.fixed
    )
    assert not without_nesting.nested
    missed = certify(heads.module(), without_nesting, *heads.inputs(), search=True).missed
    assert len(missed) == 2
    assert all("could be nested in" in line for line in missed)


def test_certificate_does_not_raise() -> None:
    certificate = certify(MLP.module(), MLP.expected(), torch.randn(4, 7))
    assert not certificate.ok
    assert "not certified: RuntimeError" in str(certificate)


def test_certify_leaves_the_module_unchanged() -> None:
    network = zoo.ZOO[3]
    module, state = network.module(), torch.get_rng_state()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    symmetry = symmetry_of(module, *network.inputs())
    certify(module, symmetry, *network.inputs())
    assert module.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


TORCH_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # input shape, minimum of free axes
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (2, 5, 8), 3),
    "embedded": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 12), nn.Linear(8, 2)),
        (5, 2, 3),
        4,
    ),
    "lstm": (lambda: nn.Sequential(nn.Linear(3, 5), nn.LSTM(5, 4, num_layers=2)), (4, 2, 3), 1),
    "gru": (lambda: nn.Sequential(nn.Linear(3, 5), nn.GRU(5, 4, bidirectional=True)), (4, 2, 3), 1),
}


@pytest.mark.parametrize("name", TORCH_LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_torch_layers_are_sound(name: str, training: bool) -> None:
    build, shape, min_free = TORCH_LAYERS[name]
    torch.manual_seed(0)
    module, x = build().train(training), torch.randn(*shape)
    symmetry = symmetry_of(module, x)
    assert len(symmetry.free) >= min_free, str(symmetry)
    certificate = certify(module, symmetry, x)
    assert certificate.ok, f"{certificate}\n{symmetry}"


class PositionEmbedding(nn.Module):
    """A position embedding with more positions than the batch has tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.positions = nn.Parameter(torch.randn(1, 9, 6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x) + self.positions[:, : x.shape[1]])
        return y


def test_positions_beyond_the_batch_are_fixed() -> None:
    module, x = PositionEmbedding(), torch.randn(4, 5, 3)
    symmetry = symmetry_of(module, x)
    assert [symmetry.sizes[axis] for axis in symmetry.free] == [6]
    assert certify(module, symmetry, torch.randn(4, 9, 3)).ok
    dim = symmetry.expressions_of("positions")[1]
    assert symmetry.size_of(symmetry.dims["positions"][1]) == 9
    assert set(axes_of(dim)) <= symmetry.fixed
