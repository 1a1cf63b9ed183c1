"""Image classification by multilayer perceptrons of many shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from meta_train.tasks.activation import ACTIVATIONS
from meta_train.tasks.augment import Augment
from meta_train.tasks.data import Examples
from meta_train.tasks.family import Draws, Family
from meta_train.tasks.images import images
from meta_train.tasks.losses import CLASSIFICATION
from meta_train.tasks.supervised import SupervisedTask
from meta_train.tasks.task import Params
from nfn_optim.symmetry import Symmetry


@dataclass(frozen=True)
class MLPShape:
    """The hyperparameters of an MLP task.

    Args:
        zoom: Every pixel is repeated `zoom` x `zoom` times: a wider input without more information.
        widths: Hidden neurons of each layer.
        activation: One of `ACTIVATIONS`.
        layer_norm: Whether a LayerNorm precedes every activation.
        zero_bias: Whether biases are initialised at zero and weights by He's normal initialisation; else PyTorch's
            default.
        batch_size: Images in a batch.
        data: A name for `images`.
        loss: One of `CLASSIFICATION`.
    """

    zoom: int
    widths: tuple[int, ...]
    activation: str
    layer_norm: bool
    zero_bias: bool
    batch_size: int
    data: str = "digits"
    loss: str = "cross_entropy"


class MLPTask(SupervisedTask):
    """An MLP on images, with a hand-written symmetry; all members are initialised at once.

    Args:
        shape: Its hyperparameters.
        data: The data set.
        augment: Augmentation of its members.
    """

    def __init__(self, shape: MLPShape, data: Examples, augment: Augment) -> None:
        super().__init__(data.zoomed(shape.zoom), CLASSIFICATION[shape.loss], shape.batch_size, augment)
        self.shape = shape
        sizes = (data.x[0].numel() * shape.zoom**2, *shape.widths, data.classes)
        self.layers = list(pairwise(sizes))
        axes = ("in", *(f"h{i}" for i in range(len(shape.widths))), "out")
        dims: dict[str, tuple[str, ...]] = {}
        for i in range(len(self.layers)):
            dims[f"{i}.weight"] = (axes[i + 1], axes[i])
            dims[f"{i}.bias"] = (axes[i + 1],)
            if shape.layer_norm and i < len(shape.widths):
                dims[f"{i}.norm.weight"] = dims[f"{i}.norm.bias"] = (axes[i + 1],)
        self.symmetry = Symmetry(dims, dict(zip(axes, sizes, strict=True)), frozenset({"in", "out"}))
        self.name = "mlp-" + "-".join(map(str, sizes))

    def init(self, count: int, generator: torch.Generator) -> Params:
        """Weights, biases and the affine parts of the norms."""
        weights: Params = {}
        for i, (fan_in, fan_out) in enumerate(self.layers):
            if self.shape.zero_bias:
                weights[f"{i}.weight"] = torch.randn(count, fan_out, fan_in, generator=generator) * (2 / fan_in) ** 0.5
                weights[f"{i}.bias"] = torch.zeros(count, fan_out)
            else:
                bound = 1 / math.sqrt(fan_in)
                for name, size in ((f"{i}.weight", (count, fan_out, fan_in)), (f"{i}.bias", (count, fan_out))):
                    weights[name] = (torch.rand(*size, generator=generator) * 2 - 1) * bound
            if f"{i}.norm.weight" in self.symmetry.dims:
                weights[f"{i}.norm.weight"] = torch.ones(count, fan_out)
                weights[f"{i}.norm.bias"] = torch.zeros(count, fan_out)
        return weights

    def output(self, weights: Params, x: Tensor) -> Tensor:
        """Logits. `(batch_size, channels, height, width) -> (batch_size, classes)`."""
        one = {name: value.unsqueeze(0) for name, value in weights.items()}
        return self._outputs(one, x.unsqueeze(0)).squeeze(0)

    def network_losses(self, weights: Params, x: Tensor, y: Tensor) -> Tensor:
        """The loss of every network by batched products: for small networks `vmap` costs more than the arithmetic."""
        return torch.func.vmap(self._loss)(self._outputs(weights, x), y)

    def _outputs(self, weights: Params, x: Tensor) -> Tensor:
        """Logits of all networks. `(count, batch_size, channels, height, width) -> (count, batch_size, classes)`."""
        act = ACTIVATIONS[self.shape.activation]
        x = x.flatten(2)  # (count, batch_size, pixels)
        for i in range(len(self.layers)):
            x = torch.baddbmm(weights[f"{i}.bias"].unsqueeze(1), x, weights[f"{i}.weight"].mT)
            if f"{i}.norm.weight" in weights:
                scale, shift = (weights[f"{i}.norm.{part}"].unsqueeze(1) for part in ("weight", "bias"))
                x = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), scale)
            x = act(x) if i + 1 < len(self.layers) else x
        return x


@dataclass(frozen=True)
class MLPDistribution(Family[MLPTask, MLPShape]):
    """MLPs on small images, of one to three hidden layers.

    Args:
        width: Smallest and largest number of hidden neurons, log-uniform.
        batch_size: Smallest and largest batch, in images, log-uniform.
        zooms: Linear magnifications of the images, equally likely.
        data: Names for `images`, equally likely.
        losses: Names in `CLASSIFICATION`, equally likely.
        augment: Augmentation of the members of a task.
    """

    shape_class = MLPShape
    width: tuple[int, int] = (8, 128)
    batch_size: tuple[int, int] = (16, 256)
    zooms: tuple[int, ...] = (1, 1, 1, 1, 2, 2, 3)
    data: tuple[str, ...] = ("digits",)
    losses: tuple[str, ...] = ("cross_entropy",)
    augment: Augment = field(default_factory=Augment)

    def shape(self, draws: Draws) -> MLPShape:
        """Draw an architecture and a batch size."""
        return MLPShape(
            zoom=draws.one_of(self.zooms),
            widths=draws.widths(*self.width, depths=(1, 2, 3)),
            activation=draws.one_of(list(ACTIVATIONS)),
            layer_norm=draws.one_in(4),
            zero_bias=draws.one_in(2),
            batch_size=draws.log_uniform(*self.batch_size),
            data=draws.one_of(self.data),
            loss=draws.one_of(self.losses),
        )

    def task(self, shape: MLPShape) -> MLPTask:
        """The task with these hyperparameters."""
        return MLPTask(shape, images(shape.data), self.augment)
