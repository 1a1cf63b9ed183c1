"""What the networks of a population compute.

References:
    Neural Functional Transformers (Zhou et al., 2023), Sec. 4, arXiv:2305.13546
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap


def outputs(module: nn.Module, params: Mapping[str, Tensor], inputs: Tensor, *, chunk: int | None = 64) -> Tensor:
    """Run every network on the same inputs; differentiable with respect to `params`.

    Args:
        module: The architecture; its own parameters are not used.
        params: Name -> `(N, *shape)`, for example `population.params`.
        inputs: `(batch, ...)`.
        chunk: Networks at a time, which bounds memory; None for all at once.

    Returns:
        `(N, *shape of an output)`.

    Raises:
        ValueError: The networks cannot be run on these inputs.
    """

    def run(values: Mapping[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(module, dict(values), (inputs,))
        return result

    try:
        parts = [dict(zip(params, part, strict=True)) for part in zip(*_chunks(params, chunk), strict=True)]
        return torch.cat([vmap(run)(part) for part in parts])
    except RuntimeError as error:
        raise ValueError(
            f"expected inputs that the networks can be run on, found {tuple(inputs.shape)} for the tensors "
            f"{ {name: tuple(x.shape[1:]) for name, x in params.items()} }: {error}"
        ) from error


def _chunks(params: Mapping[str, Tensor], chunk: int | None) -> list[tuple[Tensor, ...]]:
    return [torch.split(x, chunk or max(len(x), 1)) for x in params.values()]
