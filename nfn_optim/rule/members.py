"""The tensors of a network, those divided that hold several: every member is a tensor for the rule.

How a tensor is seen follows from the symmetry:

    w    e h in      h nested in e      a stack of matrices (h, in), one for each entry of e: experts, ensembles, vmap
    qkv  (q + k) in                     a matrix for each part of the first dimension: fused projections
    qkv  in ((h > d) + (h > d))         likewise of the second one, and of a vector, if parts share an axis: those of
                                        concatenated inputs hardly ever do, queries and keys have the same heads

since no neuron of one expert is ever the neuron of another, and parts that the network takes apart are maps of their
own. Members are named after the tensor, `w[0]`, `w[1]`; those of different tensors that share neurons keep sharing
them. A symmetry written by hand decides in the same way.

The state of a divided tensor has its moments and its counter of steps as any other; of every other entry, the members'
values one after the other, `(*batch, sum of their sizes)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from nfn_optim.engine.form import Form
from nfn_optim.engine.moments import MOMENTS, State
from nfn_optim.engine.sharding import Shard, Shards
from nfn_optim.rule.hyperparameters import Hyper
from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.expression import Expression, Sum, axes_of, format_dim, length_of, rename_axes

MAX_STACK = 1024  # more members than this cost more than they are worth
MAX_PARTS = 8
WHOLE = (*MOMENTS, "step")  # entries of the state that are not divided
EntryShapes = Callable[[tuple[int, ...]], Mapping[str, torch.Size]]
"""From the shape of a tensor to the shapes of its state's entries."""


@lru_cache(maxsize=64)
def forms_of(symmetry: Symmetry) -> Mapping[str, Form]:
    """How the tensors are seen that are not whole, by name; each depends on its own dimensions only."""
    forms = {}
    for name in symmetry.dims:
        expressions, stack = list(symmetry.expressions_of(name)), None
        if (dim := _stacked_dim(symmetry, expressions)) is not None:
            stack = dim, symmetry.shape_of(name)[dim]
            del expressions[dim]
        forms[name] = Form(stack, _parts(symmetry, expressions))
    return {name: form for name, form in forms.items() if form.count > 1}


def _stacked_dim(symmetry: Symmetry, expressions: Sequence[Expression]) -> int | None:
    """The dimension in whose axis those of other dimensions are nested."""
    for dim, axis in enumerate(expressions):
        others = [a for other in (*expressions[:dim], *expressions[dim + 1 :]) for a in axes_of(other)]
        nested = isinstance(axis, str) and any(axis in symmetry.nested.get(a, ()) for a in others)
        if nested and axis not in others and 1 < symmetry.sizes[str(axis)] <= MAX_STACK:
            return dim
    return None


def _parts(symmetry: Symmetry, expressions: Sequence[Expression]) -> tuple[int, tuple[int, ...]] | None:
    """The dimension that is divided into parts, and their sizes."""
    for dim, expression in enumerate(expressions[:2]):
        if not isinstance(expression, Sum) or len(expression.parts) > MAX_PARTS:
            continue
        axes = [axis for part in expression.parts for axis in set(axes_of(part))]
        if (dim == 0 and len(expressions) > 1) or len(set(axes)) < len(axes):
            return dim, tuple(length_of(part, symmetry.sizes) for part in expression.parts)
    return None


@dataclass(frozen=True)
class Members:
    """A network whose tensors are the members.

    Attributes:
        forms: Of the divided tensors, by name.
        names: Name of every tensor -> names of its members.
        symmetry: Of all members.
    """

    forms: Mapping[str, Form]
    names: Mapping[str, tuple[str, ...]]
    symmetry: Symmetry

    @classmethod
    def whole(cls, symmetry: Symmetry) -> Members:
        """A network of which no tensor is divided."""
        return cls({}, {name: (name,) for name in symmetry.dims}, symmetry)

    def split(
        self, tensors: Mapping[str, Tensor], batch_dims: int = 0, shards: Shards | None = None
    ) -> dict[str, Tensor]:
        """The members by name, views of tensors `(*batch, *shape)` or of their local parts."""
        members: dict[str, Tensor] = {}
        for name, names in self.names.items():
            members |= zip(names, self._views(name, tensors[name], batch_dims, shards), strict=True)
        return members

    def _views(self, name: str, tensor: Tensor, batch_dims: int, shards: Shards | None) -> list[Tensor]:
        """Views of the members of one tensor, or of their local parts."""
        if (form := self.forms.get(name)) is None:
            return [tensor]
        if (shard := None if shards is None else shards.by_name.get(name)) is None:
            return form.members_of(tensor, batch_dims)
        return [local for local, _ in form.local_members_of(tensor, shard)]

    def join(self, members: Mapping[str, Tensor], batch_dims: int = 0) -> dict[str, Tensor]:
        """The inverse of `split`, for whole tensors."""
        return {
            name: self.forms[name].join([members[n] for n in names], batch_dims)
            if name in self.forms
            else members[name]
            for name, names in self.names.items()
        }

    def split_shards(self, shards: Shards | None, tensors: Mapping[str, Tensor]) -> Shards | None:
        """Which parts of the members are local."""
        if shards is None:
            return None
        by_name: dict[str, Shard] = {}
        for name, shard in shards.by_name.items():
            form = self.forms.get(name)
            of_members = [shard] if form is None else [x for _, x in form.local_members_of(tensors[name], shard)]
            by_name |= zip(self.names[name], of_members, strict=True)
        return Shards(by_name)

    def split_hyper(self, hyper: Hyper) -> Hyper:
        """A hyperparameter by name of the members, if it is by name."""
        if not isinstance(hyper, Mapping):
            return hyper
        return {n: hyper[name] for name, names in self.names.items() for n in names}

    def split_state(
        self, state: State, shapes_of: EntryShapes, batch_dims: int = 0, shards: Shards | None = None
    ) -> State:
        """The state of the members, views of that of the tensors."""
        members: State = {}
        for name, names in self.names.items():
            if name not in self.forms:
                members[name] = state[name]
                continue
            shapes = [shapes_of(tuple(self.symmetry.shape_of(n))) for n in names]
            entries = _unpack({k: x for k, x in state[name].items() if k not in WHOLE}, shapes)
            keys = [key for key in MOMENTS if key in state[name]]
            moments = zip(*(self._views(name, state[name][key], batch_dims, shards) for key in keys), strict=True)
            for n, own, of_member in zip(names, moments, entries, strict=True):
                members[n] = {**dict(zip(keys, own, strict=True)), "step": state[name]["step"], **of_member}
        return members

    def join_state(self, members: State, batch_dims: int = 0) -> State:
        """The inverse of `split_state`, for whole tensors."""
        state: State = {}
        for name, names in self.names.items():
            form, of_members = self.forms.get(name), [members[n] for n in names]
            if form is None:
                state[name] = of_members[0]
                continue
            moments = {k: form.join([x[k] for x in of_members], batch_dims) for k in MOMENTS if k in of_members[0]}
            rest = [{key: x for key, x in of_member.items() if key not in WHOLE} for of_member in of_members]
            state[name] = {**moments, "step": of_members[0]["step"], **pack(rest, batch_dims)}
        return state


def pack(entries: Sequence[Mapping[str, Tensor]], batch_dims: int) -> dict[str, Tensor]:
    """Entries of the members `(*batch, ...)` one after the other, `(*batch, sum of sizes)`."""
    keys = dict.fromkeys(key for of_member in entries for key in of_member)
    return {key: torch.cat([x[key].unsqueeze(-1).flatten(batch_dims) for x in entries if key in x], -1) for key in keys}


def _unpack(packed: Mapping[str, Tensor], shapes: Sequence[Mapping[str, torch.Size]]) -> list[dict[str, Tensor]]:
    """The inverse of `pack`; views."""
    entries: list[dict[str, Tensor]] = [{} for _ in shapes]
    for key, value in packed.items():
        owners = [i for i, of_member in enumerate(shapes) if key in of_member]
        parts = torch.split(value, [shapes[i][key].numel() for i in owners], -1)
        for i, part in zip(owners, parts, strict=True):
            entries[i][key] = part.reshape((*part.shape[:-1], *shapes[i][key]))
    return entries


@lru_cache(maxsize=64)
def members_of(symmetry: Symmetry) -> Members:
    """The members of all tensors of a network."""
    forms = forms_of(symmetry)
    names = {n: tuple(f"{n}[{i}]" for i in range(forms[n].count)) if n in forms else (n,) for n in symmetry.dims}
    if not forms:
        return Members.whole(symmetry)
    dims: dict[str, tuple[str, ...]] = {}
    sizes: dict[str, int] = {}
    fixed: set[str] = set()
    nested: dict[str, dict[str, None]] = {}
    used: set[str] = set()

    def renamed(axis: str, outer: str | None, entry: int) -> str:
        """The axis of one member: another one for each, if it is nested in the stacked axis."""
        parents = symmetry.nested.get(axis, ())
        new = f"{axis}.{entry}" if outer is not None and outer in parents else axis
        sizes[new] = symmetry.sizes[axis]
        fixed.update({new} if axis in symmetry.fixed else ())
        return new

    for name, of_members in names.items():
        form, expressions = forms.get(name, Form()), list(symmetry.expressions_of(name))
        outer = None if form.stack is None else str(expressions.pop(form.stack[0]))
        for i, member in enumerate(of_members):
            parts = list(expressions)
            entry, part = divmod(i, len(form.parts[1]) if form.parts else 1)
            if form.parts is not None:
                divided = parts[form.parts[0]]
                assert isinstance(divided, Sum)
                parts[form.parts[0]] = divided.parts[part]
            for axis in (axis for expression in parts for axis in axes_of(expression)):
                used.add(new := renamed(axis, outer, entry))
                above = [renamed(p, outer, entry) for p in symmetry.nested.get(axis, ()) if p != outer]
                nested.setdefault(new, {}).update(dict.fromkeys(above))
            name_of = partial(renamed, outer=outer, entry=entry)
            dims[member] = tuple(format_dim(rename_axes(e, name_of), {}) for e in parts)
    within = {axis: tuple(p for p in parents if p in used) for axis, parents in nested.items()}
    nesting = {axis: parents for axis, parents in within.items() if parents}
    return Members(forms, names, Symmetry(dims, sizes, frozenset(fixed & used), nesting))
