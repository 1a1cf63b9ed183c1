"""From modules to features on weight space, and back.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2, arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nfn_optim.symmetry import Symmetry


def weight_features(
    models: nn.Module | Mapping[str, Tensor] | Sequence[nn.Module | Mapping[str, Tensor]],
    symmetry: Symmetry | None = None,
) -> dict[str, Tensor]:
    """The weights of networks of one architecture, as features of one channel.

    Args:
        models: Modules or state dicts; one alone is a batch of one.
        symmetry: Which tensors to take, and their shapes; the parameters of the first model if not given.

    Returns:
        Name -> `(models, *shape, 1)`. Gradients flow back to modules' parameters.

    Raises:
        ValueError: There is no model, or one lacks a tensor or has it in another shape.
    """
    alone = isinstance(models, nn.Module | Mapping)
    batch: list[nn.Module | Mapping[str, Tensor]] = [models] if alone else list(models)  # type: ignore[list-item, arg-type]
    if not batch:
        raise ValueError("expected at least one model, found none")
    tensors = [_tensors_of(model) for model in batch]
    first = batch[0]
    own = [name for name, _ in first.named_parameters()] if isinstance(first, nn.Module) else list(first)
    names = own if symmetry is None else list(symmetry.dims)
    for number, found in enumerate(tensors):
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"expected every model to have {missing}, number {number} has {list(found)}")
        for name in names:
            shape = tensors[0][name].shape if symmetry is None else torch.Size(symmetry.shape_of(name))
            if found[name].shape != shape:
                raise ValueError(
                    f"expected {name!r} of shape {tuple(shape)} in every model, found {tuple(found[name].shape)} in "
                    f"number {number}; networks of several shapes need a batch each"
                )
    return {name: torch.stack([found[name] for found in tensors]).unsqueeze(-1) for name in names}


def state_dicts_of(features: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The inverse of `weight_features`: one dict of tensors for each network.

    Args:
        features: Name -> `(models, *shape, 1)`.

    Raises:
        ValueError: There is more than one channel.
    """
    if wide := {name: x.shape[-1] for name, x in features.items() if x.shape[-1] != 1}:
        raise ValueError(f"expected one channel to be a weight, found {wide}; end with a layer of one channel out")
    return [
        dict(zip(features, parts, strict=True)) for parts in zip(*(_parts(x) for x in features.values()), strict=True)
    ]


def _parts(x: Tensor) -> Iterable[Tensor]:
    return x.squeeze(-1).unbind(0)


def _tensors_of(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return dict(model)
