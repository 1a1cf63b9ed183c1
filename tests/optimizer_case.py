"""What PyTorch's checks of optimizers need to know about one, and the layer that they train.

References:
    torch.testing._internal.common_optimizers
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from nfn_optim.optimizer import NFNOptimizer

if TYPE_CHECKING:  # importing it takes seconds, so it is not done before a test runs
    from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerInfo, OptimizerInput

Schedulers = list[Callable[[torch.optim.Optimizer], Any]]


ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "adamw": {"rule": "adamw"},
    "lr": {"lr": 0.01},
    "tensor lr": {"lr": torch.tensor(0.001)},
    "weight decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "maximize, weight decay": {"weight_decay": 0.1, "maximize": True},
    "horizon": {"total_steps": 50},
}
"""What an NFNOptimizer may be constructed with besides parameters."""


def inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """`ARGUMENTS` in torch's form; so are the arguments."""
    from torch.testing._internal.common_optimizers import OptimizerInput

    return [OptimizerInput(params=None, kwargs=value, desc=name) for name, value in ARGUMENTS.items()]


def error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """What must be refused."""
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerInput,
        get_error_inputs_for_all_optims,
    )

    p = nn.Parameter(torch.randn(2, device=device, dtype=dtype))
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"lr": -1.0}, ValueError, "expected lr >= 0"),
        ({"lr": "0.1"}, TypeError, "expected lr as a number"),
        ({"weight_decay": -1.0}, ValueError, "expected weight_decay >= 0"),
        ({"total_steps": 0.5}, ValueError, "positive whole number"),
    ]
    return get_error_inputs_for_all_optims(device, dtype) + [
        ErrorOptimizerInput(OptimizerInput([p], kwargs), error_type=kind, error_regex=says)
        for kwargs, kind, says in cases
    ]


@cache
def infos() -> dict[str, OptimizerInfo]:
    """What torch wants to know of ours, and knows of its own."""
    from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

    ours = OptimizerInfo(
        NFNOptimizer,
        optim_inputs_func=inputs,
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=(
            [lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10)],
            [lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10), lr_scheduler.ReduceLROnPlateau],
            [lambda o: lr_scheduler.LinearLR(o, start_factor=0.4, end_factor=0.6, total_iters=4)],
            [lambda o: lr_scheduler.PolynomialLR(o, power=0.9, total_iters=30)],
        ),
        supported_impls=(),
        not_og_supported_flags=("maximize", "total_steps", "skipped_steps", "steps_taken"),
    )
    theirs = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
    return {"NFNOptimizer": ours, "AdamW": theirs}


class Linear:
    """Weight and bias of one linear layer as bare tensors, and the loss that torch's checks use.

    Args:
        contiguous: Whether the tensors are.
    """

    def __init__(self, contiguous: bool = True) -> None:
        strides = (...,) if contiguous else (..., 0)
        tail = () if contiguous else (2,)
        self.weight = nn.Parameter(torch.randn(10, 5, *tail)[strides])
        self.bias = nn.Parameter(torch.randn(10, *tail)[strides])
        self.x = torch.randn(5)

    @property
    def params(self) -> list[nn.Parameter]:
        """Both."""
        return [self.weight, self.bias]

    def named(self, names: bool) -> list[Any]:
        """Both, with names if wanted."""
        return [(f"name{i}", p) for i, p in enumerate(self.params)] if names else list(self.params)

    def twin(self) -> Linear:
        """Equal but not identical."""
        return copy.deepcopy(self)

    def closure(self) -> Tensor:
        """The loss, after fresh gradients."""
        self.weight.grad = self.bias.grad = None
        loss = (self.weight.mv(self.x) + self.bias).square().sum()
        torch.autograd.backward(loss)
        return loss.detach()


class Case:
    """One optimizer class with one set of arguments.

    Args:
        info: What torch wants to know about the optimizer.
        given: The arguments.
    """

    def __init__(self, info: OptimizerInfo, given: OptimizerInput) -> None:
        self.info, self.kwargs, self.name = info, given.kwargs, given.desc

    def make(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        """An optimizer of these parameters, with arguments of its own."""
        optimizer: torch.optim.Optimizer = self.info.optim_cls(params, **copy.deepcopy({**self.kwargs, **more}))
        return optimizer

    def made(self, steps: int = 0, **more: Any) -> tuple[Linear, torch.optim.Optimizer]:
        """A linear layer and its optimizer after some steps."""
        layer = Linear()
        optimizer = self.make(layer.params, **more)
        for _ in range(steps):
            optimizer.step(layer.closure)  # type: ignore[arg-type]
        return layer, optimizer

    def improved(self, before: Tensor, after: Tensor) -> bool:
        """Whether a loss went where it should."""
        return bool(after > before if self.kwargs.get("maximize") else after < before)


def run_with(schedulers: Schedulers, optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> None:
    """Twenty steps under several schedulers at once."""
    made = [scheduler(optimizer) for scheduler in schedulers]
    for _ in range(20):
        loss = optimizer.step(closure)  # type: ignore[arg-type]
        for scheduler in made:
            scheduler.step(*[loss][: isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)])


def equal(one: Any, other: Any) -> None:
    """Assert that two nests of tensors and numbers are bit-equal."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def without_names(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict without names."""
    groups = [{key: value for key, value in group.items() if key != "param_names"} for group in state["param_groups"]]
    return {**state, "param_groups": groups}
