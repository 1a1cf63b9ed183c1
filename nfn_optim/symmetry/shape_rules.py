"""The rules of the ops that rearrange entries: views, parts of tensors, tensors laid together.

See `nfn_optim.symmetry.op_rules` for what a rule is, and for the table of all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from nfn_optim.symmetry.axes import Dims, Piece, cut, fix, fresh, laid, regroup, side_by_side, size_of, take, unify
from nfn_optim.symmetry.op_call import Call, Result, broadcast

MOST_PARTS = 128  # of a dimension that is taken apart; more of them are fixed


def view(call: Call) -> Sequence[Dims]:
    """Factors are regrouped."""
    return [regroup(call.first, call.shape())]


def permute(call: Call) -> Sequence[Dims]:
    """Dimensions change places."""
    dims = call.first
    if "dim0" in call.args:
        order = list(range(len(dims)))
        a, b = call.args["dim0"], call.args["dim1"]
        order[a], order[b] = order[b], order[a]
    else:
        order = call.axes_of("dims") if "dims" in call.args else list(range(len(dims)))[::-1]
    return [tuple(dims[d] for d in order)]


def squeeze(call: Call) -> Sequence[Dims]:
    """Dimensions of size 1 go."""
    gone = set(call.axes_of("dim"))
    return [tuple(dim for d, dim in enumerate(call.first) if d not in gone or size_of(dim) != 1)]


def unsqueeze(call: Call) -> Sequence[Dims]:
    """A dimension of size 1 comes."""
    dims = list(call.first)
    dims.insert(call.args["dim"] % (len(dims) + 1), ())
    return [tuple(dims)]


def expand(call: Call) -> Sequence[Dims]:
    """Repeats entries along dimensions of size 1, which makes axes that look the same in any order."""
    return [broadcast([call.first, fresh(call.shape())], call.shape())]


def repeat(call: Call) -> Sequence[Dims]:
    """Tiles: copies by entries, the copies looking the same in any order."""
    times = call.args["repeats"]
    padded = ((),) * (len(times) - len(call.first)) + tuple(call.first)
    return [tuple(fresh([count])[0] + dim if count != 1 else dim for count, dim in zip(times, padded, strict=True))]


def slicing(call: Call) -> Sequence[Result]:
    """A part of a dimension: a stretch of it, or every k-th entry of a product with k."""
    dims, d, step = call.first, call.axes_of("dim")[0], call.args["step"]
    length, made = size_of(dims[d]), call.shape()[d]
    start = min(max(start + length if start < 0 else start, 0), length) if (start := call.args["start"]) else 0
    if step == 1 and made:
        return [lambda: _part(dims, d, take(dims[d], start, start + made), made)]
    if made and length % step == 0 and start < step:
        comb, tooth = fresh([length // step])[0], fresh([step])[0]
        unify(dims[d], comb + tooth)
        if (piece := take(tooth, start, start + 1)) is not None:
            return [_part(dims, d, Piece(comb, piece.path), made)]
    return [_part(dims, d, None, made)]


def _part(dims: Dims, d: int, piece: Piece | None, length: int) -> Dims:
    """The dimensions of a part of a tensor; unless it is known which, its order is kept."""
    if piece is None:
        fix(dims[d])
        return (*dims[:d], *fresh([length], fixed=True), *dims[d + 1 :])
    return (*piece.others(dims[:d]), piece.dim, *piece.others(dims[d + 1 :]))


def strided(call: Call) -> Sequence[Dims]:
    """The same entries in the same places, written with other strides where they do not matter.

    Raises:
        ValueError: They are other entries.
    """
    sizes, strides = call.before
    same_places = all(a == b for n, a, b in zip(sizes, strides, call.args["stride"], strict=False) if n != 1)
    if sizes != tuple(call.args["size"]) or not same_places or call.args.get("storage_offset"):
        raise ValueError("expected the entries of the tensor itself")
    return [call.first]


def windows(call: Call) -> Sequence[Dims]:
    """Overlapping windows of one dimension become a new last dimension (`unfold`)."""
    d = call.args["dimension"] % len(call.first)
    fix(call.first[d])
    moved, size = fresh([call.shape()[d], call.shape()[-1]], fixed=True)
    return [(*call.first[:d], moved, *call.first[d + 1 :], size)]


def from_pairs(call: Call) -> Sequence[Dims]:
    """The last dimension holds real and imaginary part."""
    fix(call.first[-1])
    return [call.first[:-1]]


def to_pairs(call: Call) -> Sequence[Dims]:
    """Real and imaginary part become the last dimension."""
    return [(*call.first, *fresh([2], fixed=True))]


def select(call: Call) -> Sequence[Result]:
    """One or all entries of a dimension, each on its own (`select`, `unbind`)."""
    dims, d = call.first, call.axes_of("dim")[0]
    length = size_of(dims[d])
    if "index" in call.args:
        i = call.args["index"] % length
        piece = functools.cache(lambda: take(dims[d], i, i + 1) if length <= MOST_PARTS else None)
        return [lambda: _dropped(_part(dims, d, piece(), 1), d)]
    pieces = cut(dims[d], [1] * length) if length <= MOST_PARTS else None
    parts = [_part(dims, d, pieces[i] if pieces else None, 1) for i in range(length)]
    return [_dropped(part, d) for part in parts]


def _dropped(dims: Dims, d: int) -> Dims:
    return dims[:d] + dims[d + 1 :]


def split(call: Call) -> Sequence[Dims]:
    """Consecutive parts."""
    dims, d = call.first, call.axes_of("dim")[0]
    sizes = [call.shape(out)[d] for out in range(len(call.outs))]
    pieces = cut(dims[d], sizes) if len(sizes) <= MOST_PARTS and all(sizes) else None
    return [_part(dims, d, pieces[i] if pieces else None, size) for i, size in enumerate(sizes)]


def cat(call: Call) -> Sequence[Dims]:
    """Laid end to end; the other dimensions are shared."""
    whole = call.shape()
    d = call.args["dim"] % len(whole)
    parts = [call.lookup(tensor) for tensor in call.tensors if tuple(tensor.shape) != (0,)]
    rest = broadcast([dims[:d] + dims[d + 1 :] for dims in parts], whole[:d] + whole[d + 1 :])
    if len(parts) > MOST_PARTS:
        fix(*(dims[d] for dims in parts))
    return [(*rest[:d], laid([dims[d] for dims in parts]), *rest[d:])]


def stack(call: Call) -> Sequence[Dims]:
    """A new dimension, along which the others may differ as long as nothing looks at them without it."""
    whole = call.shape()
    d = call.args["dim"] % len(whole)
    parts = [call.lookup(tensor) for tensor in call.tensors]
    if len(parts) > MOST_PARTS:
        rest = broadcast(parts, whole[:d] + whole[d + 1 :])
        return [(*rest[:d], *fresh([whole[d]], fixed=True), *rest[d:])]
    which, rest = side_by_side(parts)
    return [(*rest[:d], (which,), *rest[d:])]


def pad(call: Call) -> Sequence[Dims]:
    """A constant around the dimensions that change, or entries off their ends; a free one gets blocks beside it."""
    dims, widths = list(call.first), call.args["pad"]
    for k in range(len(widths) // 2):
        d = len(dims) - 1 - k
        before, after = widths[2 * k], widths[2 * k + 1]
        if not (before or after):
            continue
        piece = take(dims[d], max(-before, 0), size_of(dims[d]) - max(-after, 0))
        if piece is None:
            fix(dims[d])
            dims[d] = fresh([call.shape()[d]], fixed=True)[0]
            continue
        dims = [piece.dim if number == d else dim for number, dim in enumerate(piece.others(tuple(dims)))]
        beside = [fresh([max(width, 0)], fixed=True)[0] for width in (before, after)]
        dims[d] = laid([beside[0], dims[d], beside[1]])
    return [tuple(dims)]


def halves(call: Call) -> Sequence[Dims]:
    """GLU: entry i of the first half meets entry i of the second."""
    d = call.axes_of("dim")[0]
    half = size_of(call.first[d]) // 2
    pieces = cut(call.first[d], [half, half])
    parts = [_part(call.first, d, pieces[i] if pieces else None, half) for i in (0, 1)]
    return [broadcast(parts, call.shape())]
