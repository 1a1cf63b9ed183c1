"""Means of a block over free axes, for all equality patterns.

    N batch, C channels, P positions on the fixed axes
    x         (N, *block.shape, C)             a block
    pooled    (N, *kept classes, P * C)        positions count as channels

A mean that keeps fewer classes is computed from one that keeps more, so that a large block is read once per axis and
not once per pattern.
"""

from __future__ import annotations

from torch import Tensor

from nfn_optim.layers.block import Block
from nfn_optim.layers.equality_pattern import Classes, EqualityPattern
from nfn_optim.layers.mixing import mix_and_sum


class PooledBlock:
    """A block and its means, cached.

    Args:
        block: Its dimensions.
        x: Its features, `(N, *block.shape, C)`.
    """

    def __init__(self, block: Block, x: Tensor) -> None:
        self._block = block
        self._x = x
        self._means: dict[tuple[Classes, frozenset[int]], Tensor] = {}  # (N, *kept ascending, *fixed, C)

    def pool(self, pattern: EqualityPattern) -> Tensor:
        """Diagonal of every class, mean over the classes that are not kept: `(N, *kept classes, P * C)`."""
        kept = pattern.kept
        x = self._mean(pattern.classes, frozenset(kept))
        order = [sorted(kept).index(c) for c in kept]
        last = range(1 + len(kept), x.dim())  # (*fixed, C)
        if order != sorted(order):
            x = x.permute(0, *(1 + n for n in order), *last)
        return x if len(last) == 1 else x.flatten(1 + len(kept))

    def mix(self, pattern: EqualityPattern, weight: Tensor) -> Tensor:
        """Mix the channels of the whole block and cache its means; their gradients share one buffer.

        Args:
            pattern: The identity pattern, in any order.
            weight: `(D, P * C)`.

        Returns:
            `(N, *kept classes, D)`.
        """
        x = self.pool(pattern)
        parents = {c: self._parents(pattern, c) for c in pattern.kept}
        innermost = [c for c in pattern.kept if not any(c in above for above in parents.values())]
        y, *sums = mix_and_sum(x, weight, tuple(1 + pattern.kept.index(c) for c in innermost))
        fixed_sizes = [self._block.dims[d].size for d in self._block.fixed_dims]
        for c, total in zip(innermost, sums, strict=True):
            kept = [other for other in pattern.kept if other != c]
            mean = total * (1.0 / self._block.dims[pattern.classes[c][0]].size)
            mean = mean.permute(0, *(1 + kept.index(other) for other in sorted(kept)), mean.dim() - 1)
            mean = mean.reshape(*mean.shape[:-1], *fixed_sizes, -1) if fixed_sizes else mean
            self._means[pattern.classes, frozenset(kept)] = mean
        return y

    def _parents(self, pattern: EqualityPattern, c: int) -> set[int]:
        """Kept classes in which class `c` is nested."""
        dims = self._block.dims[pattern.classes[c][0]].parents
        return {other for other in pattern.kept if pattern.classes[other][0] in dims}

    def _mean(self, classes: Classes, kept: frozenset[int]) -> Tensor:
        key = classes, kept
        if key not in self._means:
            whole = len(kept) == len(classes)
            self._means[key] = self._diagonal(classes) if whole else self._mean_of_larger(classes, kept)
        return self._means[key]

    def _mean_of_larger(self, classes: Classes, kept: frozenset[int]) -> Tensor:
        """From the smallest mean that keeps one class more, a cached one if there is any."""
        dims = self._block.dims
        class_of = {d: c for c, members in enumerate(classes) for d in members}
        candidates = [
            c
            for c, members in enumerate(classes)
            if c not in kept and all(class_of[p] in kept for p in dims[members[0]].parents)
        ]
        size = {c: dims[classes[c][0]].size for c in candidates}
        cached = [c for c in candidates if (classes, kept | {c}) in self._means]
        c = min(cached or candidates, key=size.__getitem__)
        larger = self._mean(classes, kept | {c})
        dim = 1 + sum(other < c for other in kept)
        return larger.sum(dim) * (1.0 / size[c])  # mean() materialises its gradient, sum() expands it

    def _diagonal(self, classes: Classes) -> Tensor:
        """`(N, *classes, *fixed, C)`."""
        batch, channels = -1, -2
        x, labels = self._x, [batch, *range(len(self._block.dims)), channels]
        for members in classes:
            for other in members[1:]:
                x = x.diagonal(dim1=labels.index(members[0]), dim2=labels.index(other))
                labels = [label for label in labels if label not in (members[0], other)] + [members[0]]
        order = [batch, *(members[0] for members in classes), *self._block.fixed_dims, channels]
        return x if order == labels else x.permute([labels.index(label) for label in order])
