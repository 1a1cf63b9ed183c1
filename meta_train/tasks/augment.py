"""How the members of one task differ, besides their initial parameters; the same for every kind of task.

    reparametrisation   p = c * w for each tensor w of the network, one constant c for each: the function at the start
                        is the same, the scale on which the optimizer finds it is not
    loss scale          a constant times the loss
    label permutation   the names of the classes
    label noise         targets that are drawn anew in every batch
    pixel noise         on real inputs

It acts on parameters before the network sees them, on a batch by its names `x` and `y`, and on the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meta_train.tasks.task import Params, Tensors


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
        >>> torch.allclose(augment.weights(params, {"w": member["w"][:, None]})["w"], torch.ones(2, 3))
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
            Parameters `(count, *shape)`, and by the same names the constants `(count,)` that make them weights again;
            by further names permutation `(count, classes)`, noise and loss scale `(count,)`.
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
        params = {}
        for name, weight in weights.items():
            decades = _uniform(count, generator) * self.reparametrise + common
            member[name] = 10**-decades
            params[name] = weight * (10**decades).reshape(count, *(1,) * (weight.dim() - 1))
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
            added["other"] = torch.randint(classes, batch["y"].shape, generator=generator)
            added["chance"] = torch.rand(batch["y"].shape, generator=generator)
        elif self.label_noise:
            added["other"] = _normal(batch["y"], generator)
        return batch | added

    @staticmethod
    def weights(params: Params, member: Tensors) -> Params:
        """The weights that a member's network sees, `(*shape)` by name."""
        return {name: p * member[name] for name, p in params.items()}

    @staticmethod
    def examples(member: Tensors, batch: Tensors) -> tuple[Tensor, Tensor]:
        """Inputs and targets as a member sees them, `(batch_size, ...)` each."""
        x, y = batch["x"], batch["y"]
        if "noise" in batch:
            x = x + member["pixel_noise"] * batch["noise"]
        if "chance" in batch:
            y = torch.where(batch["chance"] < member["label_noise"], batch["other"], y)
        elif "other" in batch:
            y = y + member["label_noise"] * batch["other"]
        return x, member["labels"][y] if "labels" in member else y

    @staticmethod
    def scaled(loss: Tensor, member: Tensors) -> Tensor:
        """The loss, 0-d, in a member's units."""
        return loss * member["loss_scale"] if "loss_scale" in member else loss


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    """`(count,)`, uniform between -1 and 1."""
    return torch.rand(count, generator=generator) * 2 - 1


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the same shape."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)
