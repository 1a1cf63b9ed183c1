"""NFLinear: every equivariant linear map between weight spaces.

    N batch, C channels, K entries of the axes in a *key*
    y_T  =  sum over keys k   heard_T,k( W_k [ pooled_k(x_1), pooled_k(x_2), ... ] )

A key is a set of neuron axes that two tensors can have in common: none, one axis, the two axes of a matrix. For each
key the tensors are pooled to it in all the ways there are, the channels of all of them are mixed by one matrix with a
coefficient for every pair, and each tensor hears its share in all the ways there are
(`nfn_optim.layers.equality_pattern` says why
this is every equivariant map). Only the key that keeps all the axes of a tensor works at the tensor's size; everything
else happens on pooled vectors.

A fixed axis has coefficients of its own for every position, or pair of positions. Whether the neurons of the input and
output may be permuted, which is the paper's NP, or may not, its HNP, is therefore the symmetry's to say:
`NFLinear(free_ends(symmetry), ...)` or `NFLinear(symmetry, ...)`; likewise taps.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2.2 and App. B, arXiv:2302.14040
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from nfn_optim.layers.block import Block, Partition
from nfn_optim.layers.broadcasting import Term, spread
from nfn_optim.layers.equality_pattern import Structure, View, views_of
from nfn_optim.layers.pooling import Pooled
from nfn_optim.symmetry import Symmetry


@dataclass(frozen=True)
class Share:
    """Which channels of a key belong to which view of which block: `start ... start + width`."""

    block: Block
    view: View
    start: int
    width: int


@dataclass
class Key:
    """All that is pooled to the same axes, and all that hears it.

    Attributes:
        name: The axes, as one text.
        sources: What is pooled.
        targets: What hears.
    """

    name: str
    sources: list[Share] = field(default_factory=list)
    targets: list[Share] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Channels of all that is pooled."""
        return sum(share.width for share in self.sources)

    @property
    def own(self) -> bool:
        """Whether it is that of all the axes of one block, which has at least two and shares them with no other."""
        alone = len(self.sources) == len(self.targets) == 1
        return alone and self.sources[0].view.full and len(self.sources[0].view.kept) > 1

    @property
    def height(self) -> int:
        """Channels of all that is heard."""
        return sum(share.width for share in self.targets)


class NFLinear(nn.Module):
    """All linear maps that commute with the permutations of a symmetry, channels to channels.

    Args:
        symmetry: The tensors and their axes.
        in_channels: Channels of every tensor's features.
        out_channels: Channels that come out.
        bias: Whether to add what is constant over the neurons.
        pointwise: Let every term but the one from a tensor's entry to the same entry start at zero.

    Attributes:
        weights: For every key, `(channels heard, channels pooled)`.
        bias: `(channels heard,)` of the key without axes, or None.

    Example:
        >>> s = Symmetry({"w": ("h", "in"), "b": ("h",)}, sizes={"h": 3, "in": 2}, fixed=frozenset({"in"}))
        >>> layer = NFLinear(s, in_channels=1, out_channels=4)
        >>> out = layer({"w": torch.randn(5, 3, 2, 1), "b": torch.randn(5, 3, 1)})
        >>> {name: tuple(x.shape) for name, x in out.items()}
        {'w': (5, 3, 2, 4), 'b': (5, 3, 4)}
    """

    def __init__(
        self, symmetry: Symmetry, in_channels: int, out_channels: int, *, bias: bool = True, pointwise: bool = False
    ) -> None:
        super().__init__()
        self.symmetry, self.in_channels, self.out_channels = symmetry, in_channels, out_channels
        self._partitions = {name: Partition(symmetry, name) for name in symmetry.dims}
        self._keys = _keys_of(self._partitions, in_channels, out_channels)
        self.weights = nn.ParameterDict(
            {key.name: nn.Parameter(torch.empty(key.height, key.width)) for key in self._keys}
        )
        heights = [key.height for key in self._keys if key.name == _TOTAL]
        self.bias = nn.Parameter(torch.empty(heights[0])) if bias and heights else None
        self.reset_parameters(pointwise=pointwise)

    def reset_parameters(self, *, pointwise: bool = False) -> None:
        """Draw new coefficients.

        Args:
            pointwise: Only from a tensor's entry to the same entry; all other coefficients are zero. Otherwise uniform
                within one over the root of how many numbers an entry hears, as the paper's code has it.
        """
        heard: dict[tuple[str, int], int] = {}
        for key in self._keys:
            for share in key.targets:
                place = share.block.tensor, share.block.number
                heard[place] = heard.get(place, 0) + key.width
        with torch.no_grad():
            for key in self._keys:
                weight = self.weights[key.name]
                weight.zero_()
                for share in key.targets:
                    bound = 1 / math.sqrt(heard[share.block.tensor, share.block.number])
                    rows = slice(share.start, share.start + share.width)
                    if not pointwise:
                        weight[rows].uniform_(-bound, bound)
                    elif share.view.full:
                        self._draw_pointwise(weight, key, share)
                    if key.name == _TOTAL and self.bias is not None:
                        self.bias[rows].uniform_(-bound, bound)
            if pointwise and self.bias is not None:
                self.bias.zero_()

    def _draw_pointwise(self, weight: Tensor, key: Key, target: Share) -> None:
        for source in key.sources:
            if source.block == target.block and source.view == target.view:
                bound, positions = 1 / math.sqrt(self.in_channels), target.block.positions
                rows = weight[target.start : target.start + target.width]
                both = rows[:, source.start : source.start + source.width]
                for n in range(positions):
                    row, column = n * self.out_channels, n * self.in_channels
                    both[row : row + self.out_channels, column : column + self.in_channels].uniform_(-bound, bound)

    def coefficients(self, target: str, source: str, axes: tuple[str, ...] = ()) -> Tensor:
        """The coefficients by which a tensor hears another one along some axes, to be read or written.

        Args:
            target: Which tensor hears.
            source: Which tensor is heard: its mean over all the neurons but those of `axes`.
            axes: Free axes that the tensors share.

        Returns:
            A part of a parameter, `(P * out_channels, P' * in_channels)`, positions of fixed axes slower than channels.

        Raises:
            ValueError: There is no such pair, or more than one (an axis occurs twice, or there are several blocks).
        """
        found = []
        for key in self._keys:
            heard = [t for t in key.targets if t.block.tensor == target and _axes_of(t) == sorted(axes)]
            given = [s for s in key.sources if s.block.tensor == source and _axes_of(s) == sorted(axes)]
            found += [(key, t, s) for t in heard for s in given]
        if len(found) != 1:
            raise ValueError(f"expected one way for {target!r} to hear {source!r} along {axes}, found {len(found)}")
        key, t, s = found[0]
        weight: Tensor = self.weights[key.name]
        return weight[t.start : t.start + t.width, s.start : s.start + s.width]

    def constants(self, target: str) -> Tensor:
        """What is added to a tensor whatever the features are, to be read or written: `(P * out_channels,)`.

        Raises:
            ValueError: The layer has no bias, or more than one for this tensor (as for `coefficients`).
        """
        found = [t for key in self._keys for t in key.targets if t.block.tensor == target and not t.view.kept]
        if len(found) != 1 or self.bias is None:
            raise ValueError(f"expected one constant for {target!r}, found {0 if self.bias is None else len(found)}")
        return self.bias[found[0].start : found[0].start + found[0].width]

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the layer.

        Args:
            features: Tensor name -> `(*batch, *shape, in_channels)`.

        Returns:
            Tensor name -> `(*batch, *shape, out_channels)`.
        """
        batch = batch_of(self._partitions, features)
        pooled: dict[tuple[str, int], Pooled] = {}
        for name, partition in self._partitions.items():
            flat = features[name].reshape(-1, *partition.shape, self.in_channels)  # (N, *shape, C)
            for block, x in zip(partition.blocks, partition.cut(flat), strict=True):
                pooled[name, block.number] = Pooled(block, x)
        terms: dict[tuple[str, int], list[Term]] = {place: [] for place in pooled}
        wholes: dict[tuple[str, int], tuple[Term, bool]] = {}
        for key in self._keys:
            if key.own:
                share = key.sources[0]
                place = share.block.tensor, share.block.number
                y = pooled[place].mixed(share.view, self.weights[key.name])
                wholes[place] = (key.targets[0].view, y), False
        for key in self._keys:
            if key.own:
                continue
            parts = [pooled[s.block.tensor, s.block.number].by(s.view.classes, s.view.kept) for s in key.sources]
            x = parts[0] if len(parts) == 1 else torch.cat(parts, -1)  # (N, *K, channels pooled)
            y = linear(x, self.weights[key.name], self.bias if key.name == _TOTAL else None)
            for t in key.targets:
                alone = len(key.targets) == 1
                term = t.view, (y if alone else y.narrow(-1, t.start, t.width))
                place = t.block.tensor, t.block.number
                if t.view.full:
                    wholes[place] = term, not alone
                else:
                    terms[place].append(term)
        out = {}
        for name, partition in self._partitions.items():
            pieces = []
            for block in partition.blocks:
                whole, shared = wholes.pop((name, block.number))
                pieces.append(spread(block, whole, terms.pop((name, block.number)), shared))
            y = partition.join(pieces)
            out[name] = y.reshape(*batch, *partition.shape, self.out_channels)
        return out

    def extra_repr(self) -> str:
        """Channels and coefficients."""
        count = sum(p.numel() for p in self.parameters())
        return f"{self.in_channels}, {self.out_channels}, tensors={len(self._partitions)}, coefficients={count}"


_TOTAL = "on nothing"


def batch_of(partitions: Mapping[str, Partition], features: Mapping[str, Tensor]) -> torch.Size:
    """The leading dimensions that all the tensors share.

    Raises:
        ValueError: The tensors are not those of the symmetry, or do not have the same leading dimensions.
    """
    if set(features) != set(partitions):
        missing, unknown = sorted(set(partitions) - set(features)), sorted(set(features) - set(partitions))
        raise ValueError(f"expected the tensors of the symmetry: missing {missing}, not in the symmetry {unknown}")
    found: torch.Size | None = None
    for name, partition in partitions.items():
        shape, last = features[name].shape, -1 - len(partition.shape)
        batch = shape[:last]
        if len(shape) + last < 0 or shape[last:-1] != partition.shape or found not in (None, batch):
            raise ValueError(
                f"expected {name!r} of shape (*batch, {', '.join(map(str, (*partition.shape, 'channels')))}) and the "
                f"same batch for all, found {tuple(shape)} after batch {None if found is None else tuple(found)}"
            )
        found = batch
    return found or torch.Size()


def _axes_of(share: Share) -> list[str]:
    return sorted(share.block.atoms[share.view.classes[n][0]].axis for n in share.view.kept)


def _name_of(structure: Structure) -> str:
    axes = [axis + (f"[{','.join(map(str, above))}]" if above else "") for axis, above in structure]
    return f"on {' '.join(axes)}".replace(".", "/") if axes else _TOTAL


def _keys_of(partitions: Mapping[str, Partition], in_channels: int, out_channels: int) -> list[Key]:
    """All keys, and who takes part in each; the key of fewest axes first."""
    sources: dict[Structure, list[tuple[Block, View]]] = {}
    targets: dict[Structure, list[tuple[Block, View]]] = {}
    for partition in partitions.values():
        for block in partition.blocks:
            for structure, views in views_of(block):
                targets.setdefault(structure, []).append((block, views[0]))
                sources.setdefault(structure, []).extend((block, view) for view in views)
    keys = []
    for structure in sorted(sources, key=lambda s: (len(s), s)):
        order = _layout(targets[structure], len(structure))
        key = Key(_name_of(structure))
        for made, given, channels in (
            (key.sources, sources[structure], in_channels),
            (key.targets, targets[structure], out_channels),
        ):
            start = 0
            for block, view in given:
                width = block.positions * channels
                made.append(Share(block, View(view.classes, tuple(view.kept[n] for n in order)), start, width))
                start += width
        keys.append(key)
    return keys


def _layout(targets: list[tuple[Block, View]], count: int) -> list[int]:
    """In which order the largest tensor that keeps all its axes has them."""
    whole = [(math.prod(block.shape), block, view) for block, view in targets if view.full]
    if not whole:
        return list(range(count))
    _, _, view = max(whole, key=lambda entry: entry[0])
    return sorted(range(count), key=lambda n: view.classes[view.kept[n]][0])
