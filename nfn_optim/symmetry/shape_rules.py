"""Rules of the ops that rearrange entries: views, slices, splits, concatenation, padding.

See `nfn_optim.symmetry.op_rules` for the definition of a rule and the table of all rules.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from nfn_optim.symmetry.axes import Dims, Slice, fresh, long_atoms_of, shape_of, size_of
from nfn_optim.symmetry.op_call import OpCall, Result, broadcast
from nfn_optim.symmetry.reshaping import split_dim, stack_dims, view_as
from nfn_optim.symmetry.unification import concat_dims, differ_by_part, divide_further, fix, slice_dim, unify

MAX_PARTS = 128
"""Parts per dimension; a dimension that is split into more is fixed."""


def view(call: OpCall) -> Sequence[Dims]:
    """Regroups factors; a view of the same shape keeps dimensions of size 1 too."""
    return [call.first if shape_of(call.first) == call.shape() else view_as(call.first, call.shape())]


def permute(call: OpCall) -> Sequence[Dims]:
    """Reorders dimensions (`permute`, `transpose`, `t`)."""
    dims = call.first
    if "dim0" in call.args:
        order = list(range(len(dims)))
        a, b = call.args["dim0"], call.args["dim1"]
        order[a], order[b] = order[b], order[a]
    else:
        order = call.dim_indices("dims") if "dims" in call.args else list(range(len(dims)))[::-1]
    return [tuple(dims[d] for d in order)]


def squeeze(call: OpCall) -> Sequence[Dims]:
    """Removes dimensions of size 1."""
    squeezed = set(call.dim_indices("dim"))
    return [tuple(dim for d, dim in enumerate(call.first) if d not in squeezed or size_of(dim) != 1)]


def unsqueeze(call: OpCall) -> Sequence[Dims]:
    """Inserts a dimension of size 1."""
    dims = list(call.first)
    dims.insert(call.args["dim"] % (len(dims) + 1), ())
    return [tuple(dims)]


def expand(call: OpCall) -> Sequence[Dims]:
    """Repeats entries along dimensions of size 1; the new axes are free, as all their entries are equal."""
    return [broadcast([call.first, fresh(call.shape())], call.shape())]


def repeat(call: OpCall) -> Sequence[Dims]:
    """Tiles: each dimension becomes (copy dim), where the copies are equal and their axis free."""
    times = call.args["repeats"]
    padded = ((),) * (len(times) - len(call.first)) + tuple(call.first)
    return [tuple(fresh([count])[0] + dim if count != 1 else dim for count, dim in zip(times, padded, strict=True))]


def slicing(call: OpCall) -> Sequence[Result]:
    """A contiguous slice of a dimension, or every k-th entry of a product with k."""
    dims, d, step = call.first, call.dim_indices("dim")[0], call.args["step"]
    length, new_length = size_of(dims[d]), call.shape()[d]
    start = min(max(start + length if start < 0 else start, 0), length) if (start := call.args["start"]) else 0
    if step == 1 and new_length:
        if new_length == 1:
            _take_apart(call, d)
        return [lambda: _sliced(dims, d, slice_dim(dims[d], start, start + new_length), new_length)]
    if new_length and length % step == 0 and start < step:
        slow, fast = fresh([length // step])[0], fresh([step])[0]
        unify(dims[d], slow + fast)
        if (piece := slice_dim(fast, start, start + 1)) is not None:
            return [_sliced(dims, d, Slice(slow, piece.path), new_length)]
    return [_sliced(dims, d, None, new_length)]


def _sliced(dims: Dims, d: int, piece: Slice | None, length: int) -> Dims:
    """The dimensions of a tensor after slicing dimension d, which is fixed if the slice is not known."""
    if piece is None:
        fix(dims[d])
        return (*dims[:d], *fresh([length], fixed=True), *dims[d + 1 :])
    return (*piece.localise(dims[:d]), piece.dim, *piece.localise(dims[d + 1 :]))


def as_strided(call: OpCall) -> Sequence[Dims]:
    """The tensor itself: the same shape, and the same strides except along dimensions of size 1.

    Raises:
        ValueError: The entries are rearranged.
    """
    sizes, strides = call.before
    same_strides = all(a == b for n, a, b in zip(sizes, strides, call.args["stride"], strict=False) if n != 1)
    if sizes != tuple(call.args["size"]) or not same_strides or call.args.get("storage_offset"):
        raise ValueError("expected the shape, strides and offset of the tensor itself")
    return [call.first]


def unfold(call: OpCall) -> Sequence[Dims]:
    """Overlapping windows of one dimension become a new last dimension."""
    d = call.args["dimension"] % len(call.first)
    fix(call.first[d])
    window, offset = fresh([call.shape()[d], call.shape()[-1]], fixed=True)
    return [(*call.first[:d], window, *call.first[d + 1 :], offset)]


def view_as_complex(call: OpCall) -> Sequence[Dims]:
    """Removes the last dimension, which holds real and imaginary parts."""
    fix(call.first[-1])
    return [call.first[:-1]]


def view_as_real(call: OpCall) -> Sequence[Dims]:
    """Real and imaginary parts become the last dimension."""
    return [(*call.first, *fresh([2], fixed=True))]


def select(call: OpCall) -> Sequence[Result]:
    """One entry of a dimension (`select`), or each of them (`unbind`)."""
    dims, d = call.first, call.dim_indices("dim")[0]
    length = size_of(dims[d])
    _take_apart(call, d)
    if "index" in call.args:
        i = call.args["index"] % length
        piece = functools.cache(lambda: slice_dim(dims[d], i, i + 1) if length <= MAX_PARTS else None)
        return [lambda: _without_dim(_sliced(dims, d, piece(), 1), d)]
    pieces = split_dim(dims[d], [1] * length) if length <= MAX_PARTS else None
    entries = [_sliced(dims, d, pieces[i] if pieces else None, 1) for i in range(length)]
    return [_without_dim(entry, d) for entry in entries]


def _take_apart(call: OpCall, d: int) -> None:
    """Let the other dimensions of a weight differ between the entries of dimension d, until an op shows otherwise."""
    atoms = long_atoms_of(call.first[d])
    if call.is_weight and len(atoms) == 1 and atoms[0].per_part is None and not atoms[0].fixed:
        for other in long_atoms_of(*_without_dim(call.first, d)):
            if not other.fixed:
                differ_by_part(atoms[0], other)
        divide_further(atoms[0], MAX_PARTS)


def _without_dim(dims: Dims, d: int) -> Dims:
    return dims[:d] + dims[d + 1 :]


def split(call: OpCall) -> Sequence[Dims]:
    """Consecutive slices of a dimension (`split`, `chunk`)."""
    dims, d = call.first, call.dim_indices("dim")[0]
    sizes = [call.shape(out)[d] for out in range(len(call.outs))]
    if set(sizes) == {1}:
        _take_apart(call, d)
    pieces = split_dim(dims[d], sizes) if len(sizes) <= MAX_PARTS and all(sizes) else None
    return [_sliced(dims, d, pieces[i] if pieces else None, size) for i, size in enumerate(sizes)]


def cat(call: OpCall) -> Sequence[Dims]:
    """Concatenates along one dimension; the other dimensions are shared."""
    shape = call.shape()
    d = call.args["dim"] % len(shape)
    parts = [call.lookup(tensor) for tensor in call.tensors if tuple(tensor.shape) != (0,)]
    rest = broadcast([_without_dim(dims, d) for dims in parts], shape[:d] + shape[d + 1 :])
    if len(parts) > MAX_PARTS:
        fix(*(dims[d] for dims in parts))
    return [(*rest[:d], concat_dims([dims[d] for dims in parts]), *rest[d:])]


def stack(call: OpCall) -> Sequence[Dims]:
    """A new dimension; the other dimensions may differ between its entries, as long as no op uses them without it."""
    shape = call.shape()
    d = call.args["dim"] % len(shape)
    parts = [call.lookup(tensor) for tensor in call.tensors]
    if len(parts) > MAX_PARTS:
        rest = broadcast(parts, shape[:d] + shape[d + 1 :])
        return [(*rest[:d], *fresh([shape[d]], fixed=True), *rest[d:])]
    index, rest = stack_dims(parts)
    return [(*rest[:d], (index,), *rest[d:])]


def pad(call: OpCall) -> Sequence[Dims]:
    """Pads dimensions with a constant, or crops them; the padding of a free dimension is a fixed part beside it."""
    dims, widths = list(call.first), call.args["pad"]
    for k in range(len(widths) // 2):
        d = len(dims) - 1 - k
        before, after = widths[2 * k], widths[2 * k + 1]
        if not (before or after):
            continue
        piece = slice_dim(dims[d], max(-before, 0), size_of(dims[d]) - max(-after, 0))
        if piece is None:
            fix(dims[d])
            dims[d] = fresh([call.shape()[d]], fixed=True)[0]
            continue
        dims = [piece.dim if i == d else dim for i, dim in enumerate(piece.localise(tuple(dims)))]
        padding = [fresh([max(width, 0)], fixed=True)[0] for width in (before, after)]
        dims[d] = concat_dims([padding[0], dims[d], padding[1]])
    return [tuple(dims)]


def glu(call: OpCall) -> Sequence[Dims]:
    """Multiplies entry i of the first half by a gate computed from entry i of the second."""
    d = call.dim_indices("dim")[0]
    half = size_of(call.first[d]) // 2
    pieces = split_dim(call.first[d], [half, half])
    halves = [_sliced(call.first, d, pieces[i] if pieces else None, half) for i in (0, 1)]
    return [broadcast(halves, call.shape())]
