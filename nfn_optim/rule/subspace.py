"""The orthogonal directions of all matrices of a network at one step, wherever their parts are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nfn_optim.engine.blocks import Block, Matrix, Stack, Vectors
from nfn_optim.engine.moments import TINY
from nfn_optim.engine.sharding import Shard, Shards
from nfn_optim.engine.sweep import Sweep
from nfn_optim.rule.orthogonal import Aim, Sketch, aims_of, completed, next_basis


@dataclass(frozen=True)
class Aimed:
    """The orthogonal direction D of the part of a matrix that is here.

    Attributes:
        aim: What makes it.
        seen: Z, of the rows that are here, `(*batch, rows, k)`.
        basis: `(*batch, columns of the array, k)`.
        sketch: Of the whole matrix.
        kept: The basis of the whole matrix as the state keeps it, `(*batch, *shape[1:], k)`.
    """

    aim: Aim
    seen: Tensor
    basis: Tensor
    sketch: Sketch
    kept: Tensor


@dataclass(frozen=True)
class Aiming:
    """Who aims.

    Attributes:
        names: Of all tensors.
        sweep: Who passes over the weights.
        shards: Which parts of the tensors are here.
    """

    names: Sequence[str]
    sweep: Sweep
    shards: Shards | None

    def aims(self, bases: Mapping[str, Tensor | None], batch_dims: int) -> dict[int, Aimed]:
        """By place among the blocks, of those that are matrices.

        Args:
            bases: What the state keeps, None where there is no need for a basis; by name of the tensor.
            batch_dims: How many leading dimensions are batch.
        """
        kept: dict[int, Tensor] = {}
        found: dict[int, Tensor] = {}
        sketches: dict[int, Sketch] = {}
        for place, block in enumerate(self.sweep.blocks):
            layout = block.layout
            if isinstance(layout, Vectors):
                continue
            name = self._name(place)
            shape = self._shape_of(name, block)
            known = [basis for i in layout.numbers if (basis := bases[self.names[i]]) is not None]
            kept[place] = layout.join(known) if known else _identity(shape[1:], block.arrays[3])
            here = kept[place] if self.shards is None else self._part(name, kept[place])
            found[place] = layout.fold_basis(here.expand(*layout.batch, *here.shape[-len(shape) :]))
            seen, energy = self.sweep.project(place, found[place])
            dimension = kept[place].flatten(-len(shape), -2).square().sum((-2, -1)).expand(energy.shape)
            sketches[place] = Sketch((shape[0], shape[1:].numel()), seen, energy, dimension)
        if self.shards is not None:
            by_name = {self._name(k): self._shares(self._name(k), x.seen, x.energy) for k, x in sketches.items()}
            added = self.shards.added(by_name)
            for place, x in sketches.items():
                seen, energy = added[self._name(place)]
                sketches[place] = replace(x, seen=seen, energy=energy)
        aims = aims_of(list(sketches.values()), batch_dims)
        return {
            place: Aimed(aim, self._rows(place, sketches[place].seen), found[place], sketches[place], kept[place])
            for place, aim in zip(found, aims, strict=True)
        }

    def next_bases(self, aims: Mapping[int, Aimed], rows: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The bases of the step after this one: number of the tensor and what the state keeps.

        Args:
            aims: What `aims` found.
            rows: Mean squares of the directions and of the moments m^ of all rows of the whole matrices,
                `(*batch, shape[0], 2)`, by number of the tensor.
        """
        following = {place: aimed for place, aimed in aims.items() if self._needs_basis(aimed)}
        images = {}
        for place, aimed in following.items():
            layout = self.sweep.blocks[place].layout
            assert not isinstance(layout, Vectors)
            columns = aimed.kept.flatten(-aimed.kept.dim() + len(layout.batch), -2).square().sum(-2)
            direction, momentum = layout.join([rows[i] for i in layout.numbers]).unbind(-1)
            inside = aimed.sketch.seen.square().sum(-1) / aimed.sketch.shape[1]
            outside = (1 - inside / (direction + TINY)).clamp(min=0)
            polar = completed(aimed.sketch.seen @ aimed.aim.root, columns, momentum * outside)
            images[self._name(place)] = layout.unfold_basis(self.sweep.image(place, self._rows(place, polar)))
        if self.shards is not None:
            placed = {name: [self._placed_columns(name, image)] for name, image in images.items()}
            images = {name: image for name, (image,) in self.shards.added(placed).items()}
        for place in following:
            layout = self.sweep.blocks[place].layout
            image = images[self._name(place)]
            flat = image.reshape(*layout.batch, -1, image.shape[-1])
            basis = next_basis(flat.detach()).reshape(image.shape).contiguous()
            yield from zip(layout.numbers, basis.unbind() if isinstance(layout, Stack) else [basis], strict=True)

    def _name(self, place: int) -> str:
        """Of the matrix at a place among the blocks, the first one of a stack."""
        return self.names[self.sweep.blocks[place].layout.numbers[0]]

    def _needs_basis(self, aimed: Aimed) -> bool:
        """Whether the subspace is a part of the space."""
        return aimed.kept.shape[-1] < aimed.sketch.shape[1]

    def _shape_of(self, name: str, block: Block) -> torch.Size:
        """Of the whole matrix, without batch dimensions."""
        if (shard := self._shard(name)) is not None:
            return torch.Size(shard.shape)
        return block.tensors[0][0].shape[len(block.layout.batch) if isinstance(block.layout, Matrix) else 0 :]

    def _shard(self, name: str) -> Shard | None:
        """The part of a matrix that is here, if it is divided."""
        return None if self.shards is None else self.shards.by_name.get(name)

    def _part(self, name: str, basis: Tensor) -> Tensor:
        """The part of a basis that belongs to the columns that are here."""
        assert self.shards is not None
        return basis[tuple(self.shards.part(name, dim) for dim in range(1, basis.dim()))]

    def _rows(self, place: int, value: Tensor) -> Tensor:
        """The rows `(*batch, rows, k)` that are here."""
        return value if self.shards is None else value[..., self.shards.part(self._name(place), 0), :]

    def _shares(self, name: str, seen: Tensor, energy: Tensor) -> list[Tensor]:
        """What this process adds to Z and to the energy of the whole."""
        shard = self._shard(name)
        if shard is None:
            return [seen, energy]
        return [shard.placed(seen, 0, 1), energy if shard.counts else torch.zeros_like(energy)]

    def _placed_columns(self, name: str, image: Tensor) -> Tensor:
        """What this process adds to X^T P of the whole."""
        shard = self._shard(name)
        return image if shard is None else shard.placed(image, 1, len(shard.shape))


def hear(heard: Tensor, aimed: Aimed | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Take the second word, the factor of the orthogonal direction, out of what is heard.

    Args:
        heard: `(*batch, rows or 1, words)`.
        aimed: The orthogonal direction, if there is one.

    Returns:
        What is left, `(*batch, rows or 1, words - 1)`, and the direction's share in the subspace as two factors.
    """
    first, factor, others = heard[..., :1], heard[..., 1:2], heard[..., 2:]
    if aimed is None:
        return torch.cat([first, others], -1), None
    rest = aimed.aim.rest[..., None, None]
    return torch.cat([first + factor * rest, others], -1), (factor * (aimed.seen @ aimed.aim.turn), aimed.basis.mT)


def _identity(columns: torch.Size, like: Tensor) -> Tensor:
    """The basis of the whole space, `(*columns, k)`."""
    size = columns.numel()
    return torch.eye(size, dtype=like.dtype, device=like.device).reshape(*columns, size)
