"""Conversion of networks to feature dictionaries and back.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2, arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nfn_optim.symmetry import Symmetry


def weight_features(
    models: nn.Module | Mapping[str, Tensor] | Sequence[nn.Module | Mapping[str, Tensor]],
    symmetry: Symmetry | None = None,
) -> dict[str, Tensor]:
    """The weights of networks of one architecture, as features with one channel.

    Args:
        models: Modules or state dicts; a single one is a batch of one. With a symmetry also one dict of stacked
            tensors `(models, *shape)`, as `torch.func.stack_module_state` and `vmap` give it.
        symmetry: Selects the tensors and checks their shapes; default all parameters of the first model.

    Returns:
        Name -> `(models, *shape, 1)`. Differentiable with respect to the parameters of modules.

    Raises:
        ValueError: There is no model, or one lacks a tensor or has one of another shape.
    """
    if symmetry is not None and isinstance(models, Mapping) and _is_stacked(models, symmetry):
        return {name: models[name].unsqueeze(-1) for name in symmetry.dims}
    is_single = isinstance(models, nn.Module | Mapping)
    batch: list[nn.Module | Mapping[str, Tensor]] = [models] if is_single else list(models)  # type: ignore[list-item, arg-type]
    if not batch:
        raise ValueError("expected at least one model, found none")
    tensors = [_tensors_of(model) for model in batch]
    first = batch[0]
    default = [name for name, _ in first.named_parameters()] if isinstance(first, nn.Module) else list(first)
    names = default if symmetry is None else list(symmetry.dims)
    for index, state in enumerate(tensors):
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"expected every model to have {missing}, model {index} has {list(state)}")
        for name in names:
            shape = tensors[0][name].shape if symmetry is None else torch.Size(symmetry.shape_of(name))
            if state[name].shape != shape:
                raise ValueError(
                    f"expected {name!r} of shape {tuple(shape)} in every model, found {tuple(state[name].shape)} in "
                    f"model {index}; put networks of different shapes into separate batches"
                )
    return {name: torch.stack([state[name] for state in tensors]).unsqueeze(-1) for name in names}


def state_dicts_of(features: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The inverse of `weight_features`: one state dict for each network.

    Args:
        features: Name -> `(models, *shape, 1)`.

    Raises:
        ValueError: A tensor does not have exactly one channel.
    """
    if wide := {name: x.shape[-1] for name, x in features.items() if x.shape[-1] != 1}:
        raise ValueError(f"expected one channel, found {wide}; the last layer needs one output channel")
    by_model = zip(*(x.squeeze(-1).unbind(0) for x in features.values()), strict=True)
    return [dict(zip(features, tensors, strict=True)) for tensors in by_model]


def _is_stacked(tensors: Mapping[str, Tensor], symmetry: Symmetry) -> bool:
    """Whether every tensor has one more dimension than the symmetry says, of one size, before the others."""
    if any(name not in tensors for name in symmetry.dims):
        return False
    shapes = {name: tuple(tensors[name].shape) for name in symmetry.dims}
    stacked = all(shape[1:] == symmetry.shape_of(name) and shape for name, shape in shapes.items())
    return stacked and len({shape[0] for shape in shapes.values()}) == 1


def _tensors_of(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return dict(model)
