"""A task from an arbitrary module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meta_train.tasks.augment import Augment
from meta_train.tasks.data import Data
from meta_train.tasks.supervised import Loss, SupervisedTask
from meta_train.tasks.task import Params
from nfn_optim.symmetry import symmetry_of


class ModuleTask(SupervisedTask):
    """A module with a data set and a loss.

    Args:
        build: Constructs the module, with initial weights from torch's global generator, which is seeded for it. Its
            forward must work under `vmap` and be twice differentiable: attention without fused kernels, no dropout,
            batch normalisation without running statistics.
        data: The data set.
        loss: Function of its output and the targets.
        batch_size: Examples in a batch.
        augment: Augmentation of its members; none by default.
        name: Name in logs; by default the class of the module.

    Raises:
        ValueError: The module has running statistics, which members cannot share.

    Example:
        >>> from meta_train.tasks.images import digits
        >>> from meta_train.tasks.losses import cross_entropy
        >>> task = ModuleTask(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits(), cross_entropy)
        >>> params, member = task.draw(3, torch.Generator().manual_seed(0))
        >>> params["1.weight"].shape, task.symmetry.free
        (torch.Size([3, 10, 64]), ())
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        data: Data,
        loss: Loss,
        batch_size: int = 32,
        augment: Augment | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(data, loss, batch_size, augment or Augment(0.0, 0.0, 0.0))
        self._build = build
        self._module = self._build_with_seed(0)
        if any(getattr(part, "track_running_stats", False) for part in self._module.modules()):
            raise ValueError(
                f"expected a module without running statistics, found some in {type(self._module).__name__}; "
                f"build it with track_running_stats=False"
            )
        x = data.batch((1, 2), torch.Generator().manual_seed(0))["x"][0]
        self.symmetry = symmetry_of(self._module, x).restrict(dict(self._module.named_parameters()))
        self.name = name or type(self._module).__name__.lower()

    def init(self, count: int, generator: torch.Generator) -> Params:
        """The parameters of `count` modules, each built with its own seed."""
        seeds = torch.randint(2**31, (count,), generator=generator).tolist()
        built = [dict(self._build_with_seed(seed).named_parameters()) for seed in seeds]
        return {name: torch.stack([params[name].detach() for params in built]) for name in self.symmetry.dims}

    def output(self, weights: Params, x: Tensor) -> Tensor:
        """The module's output."""
        output: Tensor = functional_call(self._module, weights, (x,))
        return output

    def to(self, device: torch.device | str) -> None:
        """Move the module's buffers too."""
        super().to(device)
        self._module.to(self.device)

    def _build_with_seed(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._build()
