"""Standardisation of features by the moments of a training population.

Weights have standard deviations from 0.01 to 1, differently in every tensor; without standardisation a network over
weights hardly learns from the small ones, nor from values beside encodings of order 1.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), App. D.1 (inputs are normalised), arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nfn_optim.layers.feature_dict import module_key
from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.expression import axes_of


class Standardise(nn.Module):
    """Subtract the mean of a training population and divide by its standard deviation, for every tensor and channel.

    Args:
        symmetry: The tensors and their axes.
        channels: Channels of every tensor.
        positions: Separate moments for every position on dimensions without a free axis.
        clip: Largest absolute value of the output; networks that diverged exceed any moments.
        eps: Added to the standard deviation.

    Example:
        >>> s = Symmetry({"w": ("h", "in"), "b": ("h",)}, sizes={"h": 3, "in": 2}, fixed=frozenset({"in"}))
        >>> features = {"w": 5 + 0.1 * torch.randn(100, 3, 2, 1), "b": torch.randn(100, 3, 1)}
        >>> out = Standardise(s, 1).fit(features)(features)
        >>> round(out["w"].std().item(), 1)
        1.0
    """

    def __init__(
        self, symmetry: Symmetry, channels: int, *, positions: bool = False, clip: float = 10.0, eps: float = 1e-8
    ) -> None:
        super().__init__()
        self.clip, self._eps = clip, eps
        self._pooled: dict[str, tuple[int, ...]] = {}  # dimensions that share moments, counted from the last
        for name in symmetry.dims:
            expressions = symmetry.expressions_of(name)
            free = [not positions or any(a not in symmetry.fixed for a in axes_of(e)) for e in expressions]
            shape = [1 if is_free else n for is_free, n in zip(free, symmetry.shape_of(name), strict=True)]
            self._pooled[name] = tuple(d - len(free) - 1 for d, is_free in enumerate(free) if is_free)
            self.register_buffer(f"{module_key(name)} mean", torch.zeros(*shape, channels))
            self.register_buffer(f"{module_key(name)} deviation", torch.ones(*shape, channels))

    @torch.no_grad()
    def fit(self, features: Mapping[str, Tensor]) -> Standardise:
        """Take the moments of a training population.

        Args:
            features: Name -> `(N, *shape, channels)`.

        Raises:
            ValueError: They have another shape, or are not finite.
        """
        for name, dims in self._pooled.items():
            x, mean = features[name], self.get_buffer(f"{module_key(name)} mean")
            over = (0, *(d + x.dim() for d in dims))
            if x.dim() != mean.dim() + 1 or not x.isfinite().all():
                raise ValueError(
                    f"expected finite features {name!r} of {mean.dim() + 1} dimensions, networks first and channels "
                    f"last, found shape {tuple(x.shape)}, all finite: {bool(x.isfinite().all())}"
                )
            mean.copy_(x.mean(over, keepdim=True)[0])
            self.deviation(name).copy_(x.std(over, keepdim=True, correction=0)[0])
        return self

    def deviation(self, name: str) -> Tensor:
        """The standard deviations of a tensor, `(1 or positions, ..., channels)`."""
        return self.get_buffer(f"{module_key(name)} deviation")

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Standardise. Name -> `(*batch, *shape, channels)`, in and out."""
        out = {}
        for name in self._pooled:
            mean = self.get_buffer(f"{module_key(name)} mean")
            out[name] = ((features[name] - mean) / (self.deviation(name) + self._eps)).clamp(-self.clip, self.clip)
        return out
