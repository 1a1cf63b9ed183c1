"""Rules of the ops that read or write entries by their index.

See `nfn_optim.symmetry.op_rules` for the definition of a rule and the table of all rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nfn_optim.symmetry.axes import IN, Dims, fresh, size_of
from nfn_optim.symmetry.op_call import OpCall, broadcast
from nfn_optim.symmetry.unification import fix, unify


def index_select(call: OpCall) -> Sequence[Dims]:
    """Selects entries along one dimension by index."""
    d = call.dim_indices("dim")[0]
    fix(call.first[d])
    picked = call.dims("index") or ((),)
    call.add_index_space((*picked, *call.first))
    return [(*call.first[:d], picked[0], *call.first[d + 1 :])]


def embedding(call: OpCall) -> Sequence[Dims]:
    """Selects rows of a table by index."""
    table = call.dims("weight")
    fix(table[0], role=IN)
    call.add_index_space((*call.dims("indices"), *table))
    return [(*call.dims("indices"), table[1])]


def index(call: OpCall) -> Sequence[Dims]:
    """Advanced indexing, read or written: fixes the indexed dimensions.

    A mask indexes as many dimensions as it has. Writing one value by a mask of all dimensions fixes none.
    """
    dims = call.dims("self")
    indexed: list[int] = []
    indices: list[Dims] = []
    d = 0
    for value in call.args["indices"]:
        if value is None:
            d += 1
        elif value.dtype in (torch.bool, torch.uint8):
            mask = call.lookup(value)
            if len(mask) == len(dims) and "values" in call.args and call.args["values"].numel() == 1:
                return [broadcast([dims, mask], call.shape())]
            fix(*mask)
            indexed += range(d, d + len(mask))
            indices.append(fresh([_count_of(call, d, len(dims) - len(mask))], fixed=True))
            d += len(mask)
        else:
            indexed.append(d)
            indices.append(call.lookup(value))
            d += 1
    fix(*(dims[d] for d in indexed))
    rank = max(len(dims) for dims in indices)
    shape = tuple(max(size_of(i[d]) for i in ((((),) * (rank - len(i))) + i for i in indices)) for d in range(rank))
    picked = broadcast(indices, shape)
    rest = tuple(dim for d, dim in enumerate(dims) if d not in indexed)
    start = indexed[0] if indexed == list(range(indexed[0], indexed[0] + len(indexed))) else 0
    read = (*rest[:start], *picked, *rest[start:])
    call.add_index_space((*read, *(dims[d] for d in indexed)))
    if "values" not in call.args:
        return [read]
    fix(*picked)  # entries are written in order
    broadcast([read, call.dims("values")], tuple(size_of(dim) for dim in read))
    return [dims]


def gather(call: OpCall) -> Sequence[Dims]:
    """Reads (`gather`) or writes (`scatter`) along one dimension by index; the others are shared."""
    d, indices, writes = call.dim_indices("dim")[0], call.dims("index"), "sparse_grad" not in call.args
    fix(call.first[d])
    operands = [call.first, indices] + [call.dims(name) for name in ("src", "value") if name in call.args]
    for operand in operands[1:]:
        for i, (dim, other) in enumerate(zip(operand, operands[0], strict=False)):
            if i != d and size_of(dim) == size_of(other):
                unify(dim, other)
            elif i != d:
                fix(dim, other)
            elif writes:
                fix(dim)
    call.add_index_space((*indices, call.first[d]))
    return [call.first if writes else indices]


def _count_of(call: OpCall, d: int, others: int) -> int:
    """How many entries a mask picks that indexes from dimension `d` on, beside a number of other dimensions.

    Raises:
        ValueError: It cannot be told from the shape of what is read or written.
    """
    if sum(value is not None for value in call.args["indices"]) > 1:
        raise ValueError("expected a mask without further indices")
    shape = call.shape() if "values" not in call.args else tuple(call.args["values"].shape)
    if len(shape) != others + 1:
        raise ValueError("expected values for every entry that the mask picks")
    return int(shape[d])


def index_write(call: OpCall) -> Sequence[Dims]:
    """Writes or adds slices along one dimension by index (`index_add`, `index_copy`, `index_fill`)."""
    dims, d = call.dims("self"), call.dim_indices("dim")[0]
    fix(dims[d], *call.dims("index"))
    if "source" in call.args:
        source = call.dims("source")
        fix(*source[d : d + 1])
        for i, (dim, other) in enumerate(zip(source, dims, strict=True)):
            if i != d:
                unify(dim, other)
    call.add_index_space((*call.dims("index"), *dims))
    return [dims]


def positions(call: OpCall) -> Sequence[Dims]:
    """Positions of entries, or a selection of entries by their values, which depends on the order of all dimensions."""
    for tensor in call.tensors:
        fix(*call.lookup(tensor))
    return [fresh(call.shape(out), fixed=True) for out in range(len(call.outs))]


def pack(call: OpCall) -> Sequence[Dims]:
    """Sequences (batch, time, ...) or (time, batch, ...) laid end to end, and back; the rest is shared."""
    packs = "input" in call.args
    dims = call.dims("input") if packs else call.dims("data")
    kept = dims[2:] if packs else dims[1:]
    fix(*dims[: len(dims) - len(kept)])
    lead = fresh(call.shape()[: len(call.shape()) - len(kept)], fixed=True)
    return [(*lead, *kept), *(fresh(call.shape(out), fixed=True) for out in range(1, len(call.outs)))]
