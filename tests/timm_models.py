"""Image classifiers from timm in small configurations, with random weights."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from real_model import BATCH, CLASSES, RealModel
from torch import Tensor, nn
from torch.nn import functional as F


class _Timm(str):
    """The dotted name of something in timm, which is imported when a model is built."""

    def found(self) -> Any:
        module, _, name = self.rpartition(".")
        return getattr(importlib.import_module(f"timm.{module}"), name)


def _timm(name: str, build: str | None = None, size: int = 32, args: tuple[Any, ...] = (), **options: Any) -> RealModel:
    """A classifier of images of `size` by `size` pixels: from timm's registry, or one of its classes with options."""

    def module() -> nn.Module:
        given = {key: value.found() if isinstance(value, _Timm) else value for key, value in options.items()}
        make = (
            build.found() if isinstance(build, _Timm) else partial(_Timm("models.create_model").found(), build or name)
        )
        made: nn.Module = make(*args, num_classes=CLASSES, **given)
        return made

    def loss(logits: Any) -> Tensor:
        return F.cross_entropy(logits, torch.arange(BATCH) % CLASSES)

    return RealModel(f"timm.{name}", module, lambda: torch.randn(BATCH, 3, size, size), loss)


_PATCHES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24}
_VIT = {**_PATCHES, "depth": 2, "num_heads": 3}
_BLOCKS: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (4, 8, 12, 16)}
_STAGES: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
_REGNET: dict[str, Any] = {"depth": 8, "w0": 8, "wa": 8.0, "wm": 2.0, "group_size": 4, "stem_width": 8}
_SWIN: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}
_MAXVIT: dict[str, Any] = {"img_size": 32, "stem_width": 8}
TIMM = (
    _timm("resnet18", channels=(8, 12, 16, 24)),
    _timm("resnet50", **_BLOCKS),
    _timm("seresnet50", **_BLOCKS),
    _timm("resnext50", "resnext50_32x4d", **(_BLOCKS | {"channels": (8, 8, 16, 16)}), cardinality=2, base_width=32),
    _timm("res2net50", "res2net50_26w_4s", **(_BLOCKS | {"channels": (8, 16, 24, 32)}), base_width=16),
    _timm("skresnet18", channels=(8, 16, 24, 32)),
    _timm("regnetx", "regnetx_002", **_REGNET),
    _timm("regnety", "regnety_002", **_REGNET),
    _timm("nfnet", "nfnet_l0", depths=(1, 1, 1, 1), channels=(16, 24, 32, 40), group_size=4, stem_chs=16),
    _timm("densenet", "densenet121", growth_rate=4, block_config=(2, 2)),
    _timm(
        "dla",
        _Timm("models.dla.DLA"),
        levels=(1, 1, 1, 2, 1, 1),
        channels=(8, 8, 8, 12, 16, 16),
        block=_Timm("models.dla.DlaBasic"),
    ),
    _timm(
        "vgg", _Timm("models.vgg.VGG"), cfg=[8, "M", 12, "M", 12, 12, "M"], mlp_ratio=0.01, norm_layer=nn.BatchNorm2d
    ),
    _timm("repvgg", "repvgg_a0", width_factor=0.1),
    _timm("mobilenetv3", "mobilenetv3_small_050"),
    _timm("ghostnet", "ghostnet_050"),
    _timm(
        "efficientnet",
        _Timm("models.efficientnet._gen_efficientnet"),
        args=("efficientnet_b0", 0.25, 0.25),
    ),
    _timm("convnext", "convnext_atto", **_STAGES),
    _timm("convnextv2", "convnextv2_atto", **_STAGES),
    _timm("inception_next", "inception_next_tiny", **_STAGES),
    _timm("edgenext", "edgenext_xx_small", depths=(1, 2, 2, 2), dims=_STAGES["dims"], heads=(2, 2, 2, 2)),
    _timm("convmixer", _Timm("models.convmixer.ConvMixer"), dim=24, depth=2, patch_size=4, kernel_size=3),
    _timm("mixer", _Timm("models.mlp_mixer.MlpMixer"), num_blocks=2, **_PATCHES),
    _timm(
        "resmlp",
        _Timm("models.mlp_mixer.MlpMixer"),
        num_blocks=2,
        mlp_ratio=4,
        block_layer=_Timm("models.mlp_mixer.ResBlock"),
        norm_layer=_Timm("models.mlp_mixer.Affine"),
        **_PATCHES,
    ),
    _timm(
        "gmlp",
        _Timm("models.mlp_mixer.MlpMixer"),
        num_blocks=2,
        mlp_ratio=6,
        block_layer=_Timm("models.mlp_mixer.SpatialGatingBlock"),
        mlp_layer=_Timm("layers.GatedMlp"),
        **_PATCHES,
    ),
    _timm(
        "poolformer",
        _Timm("models.metaformer.MetaFormer"),
        depths=(1, 1),
        dims=(16, 24),
        token_mixers=_Timm("models.metaformer.Pooling"),
        norm_layers=_Timm("models.metaformer.GroupNorm1"),
    ),
    _timm("vit", "vit_tiny_patch16_224", **_VIT),
    _timm("deit3", "deit3_small_patch16_224", **_VIT),
    _timm("cait", "cait_xxs24_224", **_VIT),
    _timm("beit", "beit_base_patch16_224", **_VIT),
    _timm("eva02", "eva02_tiny_patch14_224", **_VIT),
    _timm("xcit", "xcit_nano_12_p16_224", **_VIT),
    _timm("swin", "swin_tiny_patch4_window7_224", **_SWIN),
    _timm("swinv2", "swinv2_tiny_window8_256", **_SWIN),
    _timm("pvt_v2", "pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4)),
    _timm(
        "twins", "twins_svt_small", img_size=32, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 2), num_heads=(1, 2, 3, 4)
    ),
    _timm("crossvit", "crossvit_9_240", embed_dim=(12, 24), depth=((1, 1, 0),), num_heads=(2, 2)),
    _timm("maxvit", "maxvit_pico_rw_256", embed_dim=(32,), depths=(1,), block_type=("M",), **_MAXVIT),
    _timm("coatnet", "coatnet_pico_rw_224", embed_dim=(32, 64), depths=(1, 1), block_type=("C", "T"), **_MAXVIT),
    _timm("mobilevit", "mobilevit_xxs"),
    _timm(
        "levit", "levit_128s", 64, img_size=64, embed_dim=(16, 24, 32), key_dim=4, num_heads=(2, 3, 4), depth=(1, 1, 1)
    ),
    _timm(
        "volo",
        _Timm("models.volo.VOLO"),
        layers=(1, 1),
        embed_dims=(12, 24),
        num_heads=(2, 4),
        img_size=32,
        outlook_attention=(True, False),
        downsamples=(True, False),
        mlp_ratio=3.0,
    ),
)
