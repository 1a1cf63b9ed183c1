"""Augmentation: differences between the members of one task besides their initial parameters; of every kind of task.

    reparametrisation   p = c * w with one constant c per tensor w of the network: the initial function is the same, the
                        scale of the parameters is not
    loss scale          a constant times the loss
    label permutation   a permutation of the classes
    label noise         targets that are redrawn in every batch
    pixel noise         on real inputs

It transforms parameters before the network is applied, a batch by its names `x` and `y`, and the loss, for all members
at once. Noise on real numbers is a slice of one long fixed sequence of normal numbers, at a random offset each time,
since drawing it would take longer than the step of a small network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from meta_train.tasks.task import Params, Tensors

SEQUENCE_LENGTH = 2**21  # of the noise sequence
MIN_SLICE = 2**11  # up to this size, drawing is as fast as slicing


@dataclass(frozen=True)
class Augment:
    """Ranges from which the differences between members are drawn.

    Args:
        reparametrise: Largest change of the scale of a tensor, up or down, in decades.
        label_noise: Largest fraction of labels that are drawn at random in every batch; zero for half of the members.
            With real targets: largest standard deviation of the noise, in their units.
        pixel_noise: Largest standard deviation of noise on real inputs, in their units; zero for half of the members.
        rescale: Largest common change of the scale of all tensors, up or down, in decades.
        loss_scale: Largest change of the scale of the loss, up or down, in decades.

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
        """Draw the differences between members.

        Args:
            weights: Initial weights of the network, `(count, *shape)` by name.
            classes: Number of classes, 0 if targets are real.
            generator: The only source of randomness.

        Returns:
            Parameters `(count, *shape)`; and, by the same names, the factors `(count,)` from parameters to weights, if
            there are any, with permutation `(count, classes)`, noise and loss scale `(count,)` by further names.
        """
        count = len(next(iter(weights.values())))
        member: Tensors = {}
        if classes:
            permutations = [torch.randperm(classes, generator=generator) for _ in range(count)]
            member["labels"] = torch.stack(permutations).argsort(-1)
        for name, maximum in (("label_noise", self.label_noise), ("pixel_noise", self.pixel_noise)):
            member[name] = _uniform(count, generator).clamp(min=0) * maximum
        common = _uniform(count, generator) * self.rescale if self.rescale else torch.zeros(count)
        if self.loss_scale:
            member["loss_scale"] = 10 ** (_uniform(count, generator) * self.loss_scale)
        if not self.reparametrise and not self.rescale:
            return weights, member
        params = {}
        for name, weight in weights.items():
            decades = _uniform(count, generator) * self.reparametrise + common
            member[name] = 10**-decades
            params[name] = weight * _expand(10**decades, weight)
        return params, member

    def noise(self, batch: Tensors, classes: int, generator: torch.Generator) -> Tensors:
        """Add noise to a batch, which members scale.

        Args:
            batch: `x` and `y`, `(members, batch_size, ...)` each.
            classes: Number of classes, 0 if targets are real.
            generator: The only source of randomness.

        Returns:
            The batch with `noise` in the shape of `x`, if that is real; `other` in the shape of `y`, random targets or
            noise; and `chance` in the shape of `y`: the random target is used if it is below a member's label noise.
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
        """The weights of the members' networks, `(count, *shape)` by name."""
        return {name: p * _expand(member[name], p) if name in member else p for name, p in params.items()}

    @staticmethod
    def examples(member: Tensors, batch: Tensors) -> tuple[Tensor, Tensor]:
        """Inputs and targets with the members' noise and labels, `(count, batch_size, ...)` each."""
        x, y = batch["x"], batch["y"]
        if "noise" in batch:
            x = x + _expand(member["pixel_noise"], x) * batch["noise"]
        if "chance" in batch:
            y = torch.where(batch["chance"] < _expand(member["label_noise"], y), batch["other"], y)
        elif "other" in batch:
            y = y + _expand(member["label_noise"], y) * batch["other"]
        return x, member["labels"].gather(1, y.flatten(1)).view_as(y) if "labels" in member else y

    @staticmethod
    def scaled(losses: Tensor, member: Tensors) -> Tensor:
        """The losses `(count,)` times the members' loss scales."""
        return losses * member["loss_scale"] if "loss_scale" in member else losses


def _expand(value: Tensor, like: Tensor) -> Tensor:
    """Reshape `(count,)` to broadcast against `(count, ...)`."""
    return value.reshape(-1, *(1,) * (like.dim() - 1))


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    """`(count,)`, uniform between -1 and 1."""
    return torch.rand(count, generator=generator) * 2 - 1


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of the same shape: a slice of `_noise_sequence`, or drawn for small and large shapes."""
    if not MIN_SLICE < like.numel() < SEQUENCE_LENGTH // 2:
        return torch.randn(like.shape, generator=generator).to(like)
    offset = int(torch.randint(SEQUENCE_LENGTH - like.numel(), (), generator=generator))
    return _noise_sequence(like.device, like.dtype)[offset : offset + like.numel()].view(like.shape)


@lru_cache(maxsize=4)
def _noise_sequence(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers `(SEQUENCE_LENGTH,)`, always the same."""
    return torch.randn(SEQUENCE_LENGTH, generator=torch.Generator().manual_seed(0)).to(device, dtype)
