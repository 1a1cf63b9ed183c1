"""How the members of one task differ, besides their initial parameters; the same for every kind of task.

    reparametrisation   p = c * w for each tensor w of the network, one constant c for each: the function at the start
                        is the same, the scale on which the optimizer finds it is not
    loss scale          a constant times the loss
    label permutation   the names of the classes
    label noise         targets that are drawn anew in every batch
    pixel noise         on real inputs

It acts on parameters before the network sees them, on a batch by its names `x` and `y`, and on the loss, for all
members at once. Noise on real numbers is cut from one long fixed sequence of normal numbers, each time at a random
place, since to draw it would take longer than the step of a small network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from meta_train.tasks.task import Params, Tensors

NORMALS = 2**21  # numbers in the sequence that noise is cut from
FEW = 2**11  # as many are drawn as fast as they are cut out


@dataclass(frozen=True)
class Augment:
    """Ranges from which the differences of members are drawn.

    Args:
        reparametrise: Decades by which the scale of a tensor is moved at most, up or down.
        label_noise: Largest fraction of labels that are drawn at random in every batch; none for half of the members.
            Of real targets: largest standard deviation of noise, in their own units.
        pixel_noise: Largest standard deviation of noise on real inputs, in their own; none for half of the members.
        rescale: Decades by which the scale of all tensors together is moved at most, up or down.
        loss_scale: Decades by which the loss is scaled at most, up or down.

    Example:
        >>> augment, generator = Augment(reparametrise=1.0), torch.Generator().manual_seed(0)
        >>> params, member = augment.draw({"w": torch.ones(2, 3)}, 4, generator)
        >>> torch.allclose(augment.weights(params, member)["w"], torch.ones(2, 3))
        True
    """

    reparametrise: float = 0.5
    label_noise: float = 0.4
    pixel_noise: float = 1.5
    rescale: float = 0.0
    loss_scale: float = 0.0

    def draw(self, weights: Params, classes: int, generator: torch.Generator) -> tuple[Params, Tensors]:
        """Draw what distinguishes members.

        Args:
            weights: Initial weights of the network, `(count, *shape)` by name.
            classes: Number of classes, 0 if targets are real.
            generator: The only source of randomness.

        Returns:
            Parameters `(count, *shape)`, and by the same names the constants `(count,)` that make them weights again,
            if there are any; by further names permutation `(count, classes)`, noise and loss scale `(count,)`.
        """
        count = len(next(iter(weights.values())))
        member: Tensors = {}
        if classes:
            permutations = [torch.randperm(classes, generator=generator) for _ in range(count)]
            member["labels"] = torch.stack(permutations).argsort(-1)
        for name, most in (("label_noise", self.label_noise), ("pixel_noise", self.pixel_noise)):
            member[name] = _uniform(count, generator).clamp(min=0) * most
        common = _uniform(count, generator) * self.rescale if self.rescale else torch.zeros(count)
        if self.loss_scale:
            member["loss_scale"] = 10 ** (_uniform(count, generator) * self.loss_scale)
        if not self.reparametrise and not self.rescale:
            return weights, member
        params = {}
        for name, weight in weights.items():
            decades = _uniform(count, generator) * self.reparametrise + common
            member[name] = 10**-decades
            params[name] = weight * _spread(10**decades, weight)
        return params, member

    def noise(self, batch: Tensors, classes: int, generator: torch.Generator) -> Tensors:
        """Add to a batch the noise that members may take.

        Args:
            batch: `x` and `y`, `(members, batch_size, ...)` each.
            classes: Number of classes, 0 if targets are real.
            generator: The only source of randomness.

        Returns:
            The batch with `noise` as `x`, if that is real; `other` as `y`, another target or noise on it; and `chance`
            as `y`, the number below which a member's label noise must be to keep the first.
        """
        added: Tensors = {}
        if self.pixel_noise and batch["x"].is_floating_point():
            added["noise"] = _normal(batch["x"], generator)
        if self.label_noise and classes:
            shape, device = batch["y"].shape, batch["y"].device
            added["other"] = torch.randint(classes, shape, generator=generator).to(device)
            added["chance"] = torch.rand(shape, generator=generator).to(device)
        elif self.label_noise:
            added["other"] = _normal(batch["y"], generator)
        return batch | added

    @staticmethod
    def weights(params: Params, member: Tensors) -> Params:
        """The weights that the members' networks see, `(count, *shape)` by name."""
        return {name: p * _spread(member[name], p) if name in member else p for name, p in params.items()}

    @staticmethod
    def examples(member: Tensors, batch: Tensors) -> tuple[Tensor, Tensor]:
        """Inputs and targets as the members see them, `(count, batch_size, ...)` each."""
        x, y = batch["x"], batch["y"]
        if "noise" in batch:
            x = x + _spread(member["pixel_noise"], x) * batch["noise"]
        if "chance" in batch:
            y = torch.where(batch["chance"] < _spread(member["label_noise"], y), batch["other"], y)
        elif "other" in batch:
            y = y + _spread(member["label_noise"], y) * batch["other"]
        return x, member["labels"].gather(1, y.flatten(1)).view_as(y) if "labels" in member else y

    @staticmethod
    def scaled(losses: Tensor, member: Tensors) -> Tensor:
        """The losses `(count,)` in the members' units."""
        return losses * member["loss_scale"] if "loss_scale" in member else losses


def _spread(value: Tensor, like: Tensor) -> Tensor:
    """`(count,)` made to broadcast against `(count, ...)`."""
    return value.reshape(-1, *(1,) * (like.dim() - 1))


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    """`(count,)`, uniform between -1 and 1."""
    return torch.rand(count, generator=generator) * 2 - 1


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the same shape: a piece of `_normals`, or drawn where that is faster or too short."""
    if not FEW < like.numel() < NORMALS // 2:
        return torch.randn(like.shape, generator=generator).to(like)
    place = int(torch.randint(NORMALS - like.numel(), (), generator=generator))
    return _normals(like.device, like.dtype)[place : place + like.numel()].view(like.shape)


@lru_cache(maxsize=4)
def _normals(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers `(NORMALS,)`, always the same."""
    return torch.randn(NORMALS, generator=torch.Generator().manual_seed(0)).to(device, dtype)
