"""Image classification by multilayer perceptrons of many shapes.

A member's parameters are a reparametrisation p = c * w of the weights w of the network, one constant c for each tensor:
the function at the start is the same, the scale on which the optimizer finds it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meta_train.tasks.images import ImageSet, digits
from meta_train.tasks.task import Params, Task, TaskDistribution, Tensors
from nfn_optim.symmetry import Symmetry

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class MLPShape:
    """What an MLP task is made of.

    Args:
        zoom: Every pixel becomes `zoom` x `zoom` pixels, so that the input is wider but not richer.
        widths: Hidden neurons of each layer.
        activation: One of `ACTIVATIONS`.
        layer_norm: Whether every hidden layer is normalised before its activation.
        zero_bias: Whether biases start at zero, with normal weights of variance 2 / inputs; else PyTorch's default.
        batch_size: Images in a batch.
    """

    zoom: int
    widths: tuple[int, ...]
    activation: str
    layer_norm: bool
    zero_bias: bool
    batch_size: int


@dataclass(frozen=True)
class Augment:
    """How the members of a task differ, besides their initial parameters and the names of their classes.

    Args:
        reparametrise: Decades by which the scale of a tensor is moved at most, up or down.
        label_noise: Largest fraction of labels that are drawn at random in every batch; none for half of the members.
        pixel_noise: Largest standard deviation of noise on the inputs, in their own; none for half of the members.
    """

    reparametrise: float = 0.5
    label_noise: float = 0.4
    pixel_noise: float = 1.5


class MLPTask(Task):
    """An MLP on images.

    Args:
        shape: What it is made of.
        data: What it learns.
        augment: How its members differ.
    """

    def __init__(self, shape: MLPShape, data: ImageSet, augment: Augment) -> None:
        self.shape, self.augment, self.classes = shape, augment, data.classes
        pixels = data.images.repeat_interleave(shape.zoom, -1).repeat_interleave(shape.zoom, -2).flatten(1)
        self.inputs, self.labels = pixels, data.labels
        sizes = (pixels.shape[1], *shape.widths, data.classes)
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

    def draw(self, count: int, generator: torch.Generator) -> tuple[Params, Tensors]:
        """Initial parameters, a permutation of the labels and the constants of the reparametrisation."""
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
        member: Tensors = {
            "labels": torch.stack([torch.randperm(self.classes, generator=generator) for _ in range(count)])
        }
        for name, most in (("label_noise", self.augment.label_noise), ("pixel_noise", self.augment.pixel_noise)):
            member[name] = (torch.rand(count, generator=generator) * 2 - 1).clamp(min=0) * most
        params = {}
        for name in self.symmetry.dims:  # in the order of the symmetry
            decades = (torch.rand(count, generator=generator) * 2 - 1) * self.augment.reparametrise
            member[name] = 10**-decades
            params[name] = weights[name] * (10**decades).reshape(count, *(1,) * (weights[name].dim() - 1))
        return params, member

    def batch(self, count: int, generator: torch.Generator) -> Tensors:
        """Images, drawn with replacement, their labels, and the noise that members may take.

        Returns:
            `x` and `noise` `(count, batch_size, pixels)`; `y`, `other` and `chance` `(count, batch_size)`: the label,
            another one, and the number below which a member's label noise must be to keep the first.
        """
        size = (count, self.shape.batch_size)
        index = torch.randint(len(self.labels), size, generator=generator)
        return {
            "x": self.inputs[index],
            "y": self.labels[index],
            "noise": torch.randn(*size, self.inputs.shape[1], generator=generator),
            "other": torch.randint(self.classes, size, generator=generator),
            "chance": torch.rand(size, generator=generator),
        }

    def loss(self, params: Params, member: Tensors, batch: Tensors) -> Tensor:
        """Cross-entropy with the member's own names for the classes, in nats."""
        x = batch["x"] + member["pixel_noise"] * batch["noise"]  # (batch_size, pixels)
        y = torch.where(batch["chance"] < member["label_noise"], batch["other"], batch["y"])  # (batch_size,)
        act = ACTIVATIONS[self.shape.activation]

        def weight(name: str) -> Tensor:
            return params[name] * member[name]

        for i in range(len(self.layers)):
            x = F.linear(x, weight(f"{i}.weight"), weight(f"{i}.bias"))
            if f"{i}.norm.weight" in params:
                x = F.layer_norm(x, x.shape[-1:]) * weight(f"{i}.norm.weight") + weight(f"{i}.norm.bias")
            x = act(x) if i + 1 < len(self.layers) else x
        right = (x * F.one_hot(y, self.classes)[:, member["labels"]]).sum(-1)  # (batch_size,)
        return (torch.logsumexp(x, -1) - right).mean()  # differentiates twice far faster than F.cross_entropy


@dataclass(frozen=True)
class MLPDistribution(TaskDistribution[MLPTask]):
    """MLPs on scikit-learn's digits, of one to three hidden layers.

    Args:
        width: Smallest and largest number of hidden neurons, log-uniform.
        batch_size: Smallest and largest batch, in images, log-uniform.
        zooms: Linear magnifications of the 8x8 images, equally likely.
        augment: How the members of a task differ.
    """

    width: tuple[int, int] = (8, 128)
    batch_size: tuple[int, int] = (16, 256)
    zooms: tuple[int, ...] = (1, 1, 1, 1, 2, 2, 3)
    augment: Augment = field(default_factory=Augment)

    def sample(self, generator: torch.Generator) -> MLPTask:
        """Draw an architecture and a batch size."""

        def pick(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        def log_uniform(low: int, high: int) -> int:
            unit = torch.rand((), generator=generator, dtype=torch.float64).item()
            return round(low * (high / low) ** unit)

        depth = 1 + pick(3)
        shape = MLPShape(
            zoom=self.zooms[pick(len(self.zooms))],
            widths=tuple(log_uniform(*self.width) for _ in range(depth)),
            activation=list(ACTIVATIONS)[pick(len(ACTIVATIONS))],
            layer_norm=pick(4) == 0,
            zero_bias=pick(2) == 0,
            batch_size=log_uniform(*self.batch_size),
        )
        return MLPTask(shape, digits(), self.augment)

    def describe(self, task: MLPTask) -> dict[str, Any]:
        """The shape's fields."""
        return asdict(task.shape)

    def rebuild(self, description: dict[str, Any]) -> MLPTask:
        """The task of that shape."""
        shape = MLPShape(**{**description, "widths": tuple(description["widths"])})
        return MLPTask(shape, digits(), self.augment)
