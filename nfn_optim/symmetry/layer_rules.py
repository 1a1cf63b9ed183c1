"""Rules of the ops that layers with parameters are made of: matrix products, attention, convolutions, normalisations.

See `nfn_optim.symmetry.op_rules` for the definition of a rule and the table of all rules.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nfn_optim.symmetry.axes import TAP, Dim, Dims, fresh, size_of
from nfn_optim.symmetry.op_call import OpCall, broadcast
from nfn_optim.symmetry.unification import concat_dims, fix, unify

# --------------------------------------------------------------------------------------------------------- contractions


def matmul(call: OpCall) -> Sequence[Dims]:
    """Matrix products, batched or not, with or without a summand: the contracted axis is shared and stays free."""
    names = [name for name in ("mat1", "mat2", "batch1", "batch2", "mat", "vec", "vec2", "tensor") if name in call.args]
    if "self" in call.args and len(names) == 1:
        names = ["self", *names]
    left, right = (call.dims(name) for name in names)
    column = right[-2:-1] if len(right) > 1 else right
    batch = tuple(left[: max(len(left) - 2, 0)])
    for a, b in zip(batch, right[:-2], strict=True):  # first, as other axes may differ between parts of these
        unify(a, b)
    unify(left[-1], column[0])
    product = (*batch, *left[-2:-1], *(right[-1:] if len(right) > 1 else ()))
    call.add_index_space((*product, left[-1]))
    if "self" in call.args and "self" not in names:
        product = broadcast([product, call.dims("self")], call.shape())
    return [product]


def grouped_matmul(call: OpCall) -> Sequence[Dims]:
    """Rows (S, K), grouped by their index, times one matrix per group, (G, K, N)."""
    rows, matrices = call.dims("self"), call.dims("mat2")
    fix(rows[0], matrices[0])
    unify(rows[1], matrices[1])
    call.add_index_space((rows[0], *matrices))
    return [(rows[0], matrices[2])]


def trilinear(call: OpCall) -> Sequence[Dims]:
    """The product of three tensors with dimensions of size 1 inserted (`expand1`, ...), summed over `sumdim`."""
    sides: list[Dims] = []
    for i in (1, 2, 3):
        dims = list(call.dims(f"i{i}"))
        for position in sorted(call.args[f"expand{i}"]):
            dims.insert(position, ())
        sides.append(tuple(dims))
    product = broadcast(sides, [max(size_of(dim) for dim in dims) for dims in zip(*sides, strict=True)])
    call.add_index_space(product)
    return [tuple(dim for d, dim in enumerate(product) if d not in call.args["sumdim"])]


def attention(call: OpCall) -> Sequence[Dims]:
    """Fused attention; queries (B, H, L, E), keys (B, H, S, E), values (B, H, S, V) -> (B, H, L, V)."""
    q, k, v = call.dims("query"), call.dims("key"), call.dims("value")
    for a, b in ((q[0], k[0]), (q[0], v[0]), (k[1], v[1]), (q[-1], k[-1]), (k[2], v[2])):
        unify(a, b)
    (group,) = fresh([size_of(q[1]) // size_of(k[1])])
    unify(q[1], k[1] + group)  # grouped-query attention: each key head has a group of query heads
    scores = (*q[:3], k[2])
    for index_space in (q[:3], scores, (*scores, q[3]), (*scores, v[3])):
        call.add_index_space(index_space)
    if call.args.get("is_causal"):
        fix(q[2], k[2])
    for name in ("attn_mask", "attn_bias"):
        if isinstance(call.args.get(name), Tensor):
            broadcast([scores, call.dims(name)], tuple(size_of(dim) for dim in scores))
    for extra in call.outs[1:]:
        call.fix_on_use(extra, [*q, *k, *v])
    return [(*q[:3], v[3]), *(fresh(tuple(out.shape), fixed=True) for out in call.outs[1:])]


def convolution(call: OpCall) -> Sequence[Dims]:
    """Input (batch, in, *space), weight (out, in / groups, *taps) or, if transposed, (in, out / groups, *taps).

    Input channels are (group contracted), output channels are (group made).
    """
    source, weight, groups = call.dims("input"), call.dims("weight"), call.args["groups"]
    taps, (group,) = weight[2:], fresh([groups])
    fix(*taps, role=TAP)
    made = fresh([call.shape()[1] // groups])[0]
    inner, outer = (weight[0], weight[1]) if call.args["transposed"] else (weight[1], weight[0])
    if call.args["transposed"]:
        unify(inner, source[1])
        unify(outer, made)
        contracted = fresh([size_of(inner) // groups])[0]
        unify(inner, group + contracted)
        out = group + made
    else:
        contracted, out = inner, outer
        unify(out, group + made)
        unify(source[1], group + contracted)
    call.add_index_space((source[0], group, made, contracted, *taps))
    if isinstance(call.args.get("bias"), Tensor):
        unify(call.dims("bias")[0], out)
    space: list[Dim] = []
    for d, dim in enumerate(source[2:]):
        geometry = [call.args[name][d % len(call.args[name])] for name in ("stride", "padding", "output_padding")]
        if size_of(taps[d]) == 1 and geometry == [1, 0, 0]:
            space.append(dim)
        else:
            fix(dim)
            space += fresh([call.shape()[2 + d]], fixed=True)
    return [(source[0], out, *space)]


# ------------------------------------------------------------------------------------------------------- normalisations


def batch_norm(call: OpCall) -> Sequence[Dims]:
    """Batch norm over all but dimension 1; weight, bias and running statistics belong to the channels."""
    source = call.dims("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(call.args.get(name), Tensor):
            unify(call.dims(name)[0], source[1])
    shapes = [tuple(out.shape) for out in call.outs[1:]]
    return [source, *((source[1],) if shape == (size_of(source[1]),) else fresh(shape, fixed=True) for shape in shapes)]


def batch_statistics(call: OpCall) -> Sequence[Dims]:
    """The parts of a batch norm over several processes: statistics of the channels, and their application."""
    source = call.dims("input")
    for name in ("weight", "bias", "mean", "invstd", "running_mean", "running_var"):
        if isinstance(call.args.get(name), Tensor):
            unify(call.dims(name)[-1], source[1])
    return [source if len(call.shape(out)) == len(source) else (source[1],) for out in range(len(call.outs))]


def layer_norm(call: OpCall) -> Sequence[Dims]:
    """Layer norm and RMS norm over the last dimensions, each of which stays free."""
    source, count = call.dims("input"), len(call.args["normalized_shape"])
    for name in ("weight", "bias"):
        if isinstance(call.args.get(name), Tensor):
            for a, b in zip(call.dims(name), source[-count:], strict=True):
                unify(a, b)
    statistics = source[:-count] + ((),) * count
    return [source, *(statistics for _ in call.outs[1:])]


def group_norm(call: OpCall) -> Sequence[Dims]:
    """Channels are (group channel); each group is normalised separately."""
    source, groups = call.dims("input"), call.args["group"]
    for name in ("weight", "bias"):
        if isinstance(call.args.get(name), Tensor):
            unify(call.dims(name)[0], source[1])
    group, within = fresh([groups])[0], fresh([size_of(source[1]) // groups])[0]
    unify(source[1], group + within)
    return [source, *((source[0], group) for _ in call.outs[1:])]


def weight_norm(call: OpCall) -> Sequence[Dims]:
    """`g * v / |v|` for each entry of dimension `dim`."""
    v, g = call.dims("v"), call.dims("g")
    for a, b in zip(g, v, strict=False):
        if size_of(a) == size_of(b):
            unify(a, b)
    return [v, *(g for _ in call.outs[1:])]


def fused_cell(call: OpCall) -> Sequence[Dims]:
    """One step of an LSTM or GRU; gates are (gate hidden), state (batch, hidden), workspace (batch, ? hidden)."""
    lstm = "cx" in call.args
    batch, hidden = call.dims("cx" if lstm else "hx")
    for name in ("input_gates", "hidden_gates", "input_bias", "hidden_bias"):
        if isinstance(call.args.get(name), Tensor):
            gates = call.dims(name)[-1]
            unify(gates, concat_dims([hidden] * (4 if lstm else 3)))
            unify(call.dims(name)[0], batch if name.endswith("gates") else gates)
    workspace = concat_dims([hidden] * (call.shape(len(call.outs) - 1)[1] // size_of(hidden)))
    return [*((batch, hidden) for _ in call.outs[:-1]), (batch, workspace)]
