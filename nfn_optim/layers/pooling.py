"""What a block is pooled to: means that keep some of its neurons, each computed once.

    N batch, C channels, P joint positions of the fixed axes
    x        (N, *atoms, C)                    a block
    pooled   (N, *kept classes, P * C)         fixed positions count as channels

A mean that keeps less is computed from one that keeps more, so that a large tensor is read once for every neuron axis,
not once for every pair of tensors that wants to know.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nfn_optim.layers.block import Block
from nfn_optim.layers.equality_pattern import View
from nfn_optim.layers.mixing import mix_and_sum


class Pooled:
    """A block and its means.

    Args:
        block: What it is.
        x: Its features, `(N, *atoms, C)`.
    """

    def __init__(self, block: Block, x: Tensor) -> None:
        self._block = block
        self._x = x
        self._made: dict[tuple[tuple[tuple[int, ...], ...], frozenset[int]], Tensor] = {}

    def by(self, classes: tuple[tuple[int, ...], ...], kept: Sequence[int]) -> Tensor:
        """Mean over the classes that are not kept, on the diagonals of all.

        Args:
            classes: Positions of the atoms of every class.
            kept: Numbers of the classes to keep, in the order wanted.

        Returns:
            `(N, *kept, P * C)`.
        """
        means = self._mean(classes, frozenset(kept))  # (N, *kept ascending, *fixed, C)
        places = [sorted(kept).index(n) for n in kept]
        rest = range(1 + len(kept), means.dim())
        if places != sorted(places):
            means = means.permute(0, *(1 + place for place in places), *rest)
        return means if len(rest) == 1 else means.flatten(1 + len(kept))

    def mixed(self, view: View, weight: Tensor) -> Tensor:
        """Mix the channels of the whole block, and remember the means that come with reading it.

        Args:
            view: One that keeps every atom.
            weight: `(G, P * C)`.

        Returns:
            `(N, *kept classes, G)`.
        """
        x = self.by(view.classes, view.kept)
        above = {n: {m for m in view.kept if view.classes[m][0] in self._parents(view, n)} for n in view.kept}
        inmost = [n for n in view.kept if not any(n in parents for parents in above.values())]
        y, *sums = mix_and_sum(x, weight, tuple(1 + view.kept.index(n) for n in inmost))
        for n, total in zip(inmost, sums, strict=True):
            rest = [m for m in view.kept if m != n]
            mean = total * (1.0 / self._block.atoms[view.classes[n][0]].size)
            mean = mean.permute(0, *(1 + rest.index(m) for m in sorted(rest)), mean.dim() - 1)
            sizes = [self._block.atoms[m].size for m in self._block.fixed]
            self._made[view.classes, frozenset(rest)] = mean.reshape(*mean.shape[:-1], *sizes, -1) if sizes else mean
        return y

    def _parents(self, view: View, n: int) -> tuple[int, ...]:
        return self._block.atoms[view.classes[n][0]].parents

    def _mean(self, classes: tuple[tuple[int, ...], ...], kept: frozenset[int]) -> Tensor:
        key = classes, kept
        if key not in self._made:
            self._made[key] = self._diagonal(classes) if len(kept) == len(classes) else self._reduced(classes, kept)
        return self._made[key]

    def _reduced(self, classes: tuple[tuple[int, ...], ...], kept: frozenset[int]) -> Tensor:
        """From the smallest mean that keeps one class more."""
        atoms = self._block.atoms
        class_of = {atom: n for n, members in enumerate(classes) for atom in members}
        outermost = [
            n
            for n, members in enumerate(classes)
            if n not in kept and all(class_of[p] in kept for p in atoms[members[0]].parents)
        ]
        size = {n: atoms[classes[n][0]].size for n in outermost}
        made = [n for n in outermost if (classes, kept | {n}) in self._made]
        n = sorted(made or outermost, key=size.__getitem__)[0]
        above = self._mean(classes, kept | {n})
        dim = 1 + sum(k < n for k in kept)
        return above.sum(dim) * (1.0 / size[n])  # not mean(), whose gradient is as large as what was pooled

    def _diagonal(self, classes: tuple[tuple[int, ...], ...]) -> Tensor:
        """`(N, *classes, *fixed, C)`."""
        x, labels = self._x, [-1, *range(len(self._block.atoms)), -2]
        for members in classes:
            for other in members[1:]:
                x = x.diagonal(dim1=labels.index(members[0]), dim2=labels.index(other))
                labels = [label for label in labels if label not in (members[0], other)] + [members[0]]
        wanted = [-1, *(members[0] for members in classes), *self._block.fixed, -2]
        return x if wanted == labels else x.permute([labels.index(label) for label in wanted])
