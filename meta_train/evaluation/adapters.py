"""Low-rank adapters: a trained network stays as it is, products of two narrow matrices are added to its linear layers.

References:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2022), Sec. 4.1, arXiv:2106.09685
"""

from __future__ import annotations

import math

from torch import Tensor, nn


class Adapted(nn.Module):
    """A frozen linear layer W and its adapter: W x + (scale / rank) B A x, where B starts at zero.

    Args:
        layer: The layer; its parameters no longer require gradients.
        rank: Rows of A.
        scale: Alpha in the paper.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.layer, self.factor = layer.requires_grad_(False), scale / rank
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(*batch, inputs) -> (*batch, outputs)`."""
        y: Tensor = self.layer(x) + self.factor * self.b(self.a(x))
        return y


def adapt(model: nn.Module, names: tuple[str, ...], rank: int, scale: float) -> nn.Module:
    """Freeze a network and give adapters to its linear layers of some names; changes and returns it."""
    model.requires_grad_(False)
    found = [
        (owner, name)
        for owner in model.modules()
        for name, layer in owner.named_children()
        if isinstance(layer, nn.Linear) and name in names
    ]
    for owner, name in found:
        setattr(owner, name, Adapted(owner.get_submodule(name), rank, scale))  # type: ignore[arg-type]
    return model
