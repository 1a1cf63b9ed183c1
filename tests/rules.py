"""Rules and layers of which nothing is zero, so that no part of a step goes untested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from nfn_optim.rule import RuleConfig, UpdateRule

Module = TypeVar("Module", bound=nn.Module)


def perturbed(module: Module, scale: float | Callable[[str], float] = 0.2, seed: int = 0) -> Module:
    """The module itself, after normal noise was added to all its parameters.

    Args:
        module: Changed in place.
        scale: Standard deviation of the noise, or that of each parameter by its name.
        seed: Of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            deviation = scale(name) if callable(scale) else scale
            p.add_(deviation * torch.randn(p.shape, generator=generator).to(p.dtype))
    return module


def random_rule(
    scale: float | Callable[[str], float] = 0.2, *, config: RuleConfig | None = None, seed: int = 0, **options: Any
) -> UpdateRule:
    """An `UpdateRule(config)` of which nothing is zero, always the same one; torch's global generator stays as it is.

    Args:
        scale: See `perturbed`.
        config: Of the rule; by default `RuleConfig(**options)`, where a `rank` above 0 means orthogonal directions with
            step-size adaptation.
        seed: Of the rule.
        options: Fields of the configuration.
    """
    if options.get("rank"):
        options = {"adapt_rate": options["rank"] / 4, "direction": "orthogonal", **options}
    else:
        options.pop("rank", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return perturbed(UpdateRule(config or RuleConfig(**options)), scale, seed)
