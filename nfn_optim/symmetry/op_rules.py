"""Per ATen op: which axes of its inputs and outputs are the same axis.

An op f is *equivariant* under a permutation P of axes when f(P x) = P f(x). A rule names the axes of the outputs and
unifies or fixes those of the inputs so that this holds for every permutation of what is left free. It may give
away symmetry, and must never claim too much: an output dimension may carry fresh fixed axes only if the inputs it is
computed from are fixed where it matters.

Whatever torch tags as pointwise needs no rule of its own. Ops without a rule are decomposed by the tracer; if that
leads nowhere, `opaque` fixes all they touch.

References:
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nfn_optim.symmetry.axes import IN, Dims, fix, fresh, size_of, unify
from nfn_optim.symmetry.layer_rules import (
    attention,
    channel_norm,
    convolution,
    group_norm,
    grouped_matmul,
    matmul,
    trailing_norm,
    trilinear,
    weight_norm,
)
from nfn_optim.symmetry.op_call import Call, Rule, broadcast
from nfn_optim.symmetry.shape_rules import (
    cat,
    expand,
    from_pairs,
    halves,
    pad,
    permute,
    repeat,
    select,
    slicing,
    split,
    squeeze,
    stack,
    strided,
    to_pairs,
    unsqueeze,
    view,
    windows,
)

# ------------------------------------------------------------------------------------------------ pointwise, constant


def pointwise(call: Call) -> Sequence[Dims]:
    """Entry by entry, with broadcasting."""
    inputs = [call.lookup(tensor) for tensor in call.tensors]
    return [broadcast(inputs, call.shape(out)) for out in range(len(call.outs))]


def same(call: Call) -> Sequence[Dims]:
    """Each output is arranged like the first input and computed from it alone, equivariantly (softmax, copies)."""
    return [call.first for _ in call.outs]


def softmax(call: Call) -> Sequence[Dims]:
    """Normalised by what is summed over one dimension."""
    d = call.axes_of("dim")[0] if call.first else 0
    call.joint(call.first[:d] + call.first[d + 1 :])
    return [call.first]


def copy(call: Call) -> Sequence[Dims]:
    """`self` is overwritten by a broadcast source."""
    own = call.dims("self")
    return [broadcast([own, call.dims("src")], call.shape())]


def uniform(call: Call) -> Sequence[Dims]:
    """A tensor of one repeated value looks the same in any order."""
    return [fresh(call.shape(out)) for out in range(len(call.outs))]


def constant(call: Call) -> Sequence[Dims]:
    """A tensor whose entries differ, made from nothing."""
    return [fresh(call.shape(out), fixed=True) for out in range(len(call.outs))]


def opaque(call: Call) -> Sequence[Dims]:
    """Nothing is known: all axes are fixed."""
    for tensor in call.tensors:
        fix(*call.lookup(tensor))
    return constant(call)


def loss(call: Call) -> Sequence[Dims]:
    """Pointwise between input and target, then perhaps reduced to a number."""
    inputs = [call.lookup(tensor) for tensor in call.tensors]
    merged = broadcast(inputs, max((tuple(t.shape) for t in call.tensors), key=len))
    call.joint(merged)
    return [merged if len(call.shape()) else ()]


# -------------------------------------------------------------------------------------------- reductions and positions


def reduction(call: Call) -> Sequence[Dims]:
    """The reduced axes stay free: the order of the summands does not matter."""
    dims = call.first
    gone = set(call.axes_of("dim"))
    keep = bool(call.args.get("keepdim"))
    call.joint(dims)
    left = tuple(() if d in gone else dim for d, dim in enumerate(dims) if keep or d not in gone)
    return [left for _ in call.outs]


def extremum(call: Call) -> Sequence[Dims]:
    """Maximum or minimum; the positions, returned as well, fix the axis once somebody reads them."""
    if call.overload == "other":
        return pointwise(call)
    outs = reduction(call)
    for indices in call.outs[1:]:
        call.fix_on_use(indices, [call.first[d] for d in call.axes_of("dim")])
    return outs


def position(call: Call) -> Sequence[Dims]:
    """The result is positions along, or a reduction that depends on the order of, the axes `dim`."""
    fix(*(call.first[d] for d in call.axes_of("dim")))
    return reduction(call)


def along(name: str) -> Rule:
    """The order matters along the dimensions that argument `name` gives, and nowhere else."""

    def rule(call: Call) -> Sequence[Dims]:
        ordered = call.axes_of(name)
        fix(*(call.first[d] for d in ordered))
        return [_resized(call.first, call.shape(out), ordered) for out in range(len(call.outs))]

    return rule


def spatial(count: int) -> Rule:
    """Windows over the last `count` dimensions; the others, channels and batch, go through one by one."""

    def rule(call: Call) -> Sequence[Dims]:
        dims = call.first
        ordered = list(range(len(dims) - count, len(dims)))
        fix(*(dims[d] for d in ordered))
        return [_resized(dims, call.shape(out), ordered) for out in range(len(call.outs))]

    return rule


def _resized(dims: Dims, shape: Sequence[int], ordered: Sequence[int]) -> Dims:
    """Dimensions after an op along the (fixed) `ordered` ones."""
    return tuple(
        fresh([size], fixed=True)[0] if d in ordered and size != size_of(dim) else dim
        for d, (dim, size) in enumerate(zip(dims, shape, strict=True))
    )


def triangle(call: Call) -> Sequence[Dims]:
    """Depends on the row and the column."""
    fix(*call.first[-2:])
    return [call.first]


# --------------------------------------------------------------------------------------------------------------- lookup


def index_select(call: Call) -> Sequence[Dims]:
    """Entries along one dimension, by number."""
    d = call.axes_of("dim")[0]
    fix(call.first[d])
    picked = call.dims("index") or ((),)
    call.joint((*picked, *call.first))
    return [(*call.first[:d], picked[0], *call.first[d + 1 :])]


def embedding(call: Call) -> Sequence[Dims]:
    """Rows of a table, by number."""
    table = call.dims("weight")
    fix(table[0], role=IN)
    call.joint((*call.dims("indices"), *table))
    return [(*call.dims("indices"), table[1])]


def index(call: Call) -> Sequence[Dims]:
    """Advanced indexing, read or written: the dimensions that are indexed are fixed.

    Raises:
        ValueError: A mask covers other than the whole tensor.
    """
    dims = call.dims("self")
    tensors = [value for value in call.args["indices"] if isinstance(value, Tensor)]
    masks = [value for value in tensors if value.dtype in (torch.bool, torch.uint8)]
    if masks:
        if masks[0].dim() != len(dims) or call.args["values"].numel() != 1:
            raise ValueError("expected a mask for the whole tensor")
        return [broadcast([dims, call.lookup(masks[0])], call.shape())]
    chosen = [d for d, value in enumerate(call.args["indices"]) if value is not None]
    indices = [call.lookup(value) for value in tensors]
    fix(*(dims[d] for d in chosen))
    rank = max(len(dims) for dims in indices)
    shape = tuple(max(size_of(i[d]) for i in ((((),) * (rank - len(i))) + i for i in indices)) for d in range(rank))
    picked = broadcast(indices, shape)
    left = tuple(dim for d, dim in enumerate(dims) if d not in chosen)
    start = chosen[0] if chosen == list(range(chosen[0], chosen[0] + len(chosen))) else 0
    read = (*left[:start], *picked, *left[start:])
    call.joint((*read, *(dims[d] for d in chosen)))
    if "values" not in call.args:
        return [read]
    fix(*picked)  # where to write has an order
    broadcast([read, call.dims("values")], tuple(size_of(dim) for dim in read))
    return [dims]


def gather(call: Call) -> Sequence[Dims]:
    """Reads (`gather`) or writes (`scatter`) along one dimension, by number; the others are shared."""
    d, indices, writes = call.axes_of("dim")[0], call.dims("index"), "sparse_grad" not in call.args
    fix(call.first[d])
    sides = [call.first, indices] + [call.dims(name) for name in ("src", "value") if name in call.args]
    for side in sides[1:]:
        for number, (dim, other) in enumerate(zip(side, sides[0], strict=False)):
            if number != d and size_of(dim) == size_of(other):
                unify(dim, other)
            elif number != d:
                fix(dim, other)
            elif writes:
                fix(dim)
    call.joint((*indices, call.first[d]))
    return [call.first if writes else indices]


# --------------------------------------------------------------------------------------------------------------- table


def _table(**rules: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in rules.values() for name in names.split()}


RULES: Mapping[str, Rule] = _table(
    same=(
        same,
        "alias detach clone contiguous _to_copy lift lift_fresh lift_fresh_copy "
        "native_dropout fill zero log_sigmoid_forward pin_memory _conj _neg_view resolve_conj resolve_neg detach_copy "
        "alias_copy real imag convert_element_type",
    ),
    softmax=(softmax, "_softmax _log_softmax _safe_softmax"),
    pointwise=(
        pointwise,
        "_prelu_kernel add sub mul div rsub lerp addcmul addcdiv hardswish hardsigmoid softplus elu relu6 clamp "
        "clamp_min clamp_max pow remainder fmod where masked_fill bitwise_and bitwise_or floor_divide bernoulli "
        "rrelu_with_noise polar complex",
    ),
    copy=(copy, "copy"),
    uniform=(
        uniform,
        "zeros ones full empty empty_strided zeros_like ones_like full_like empty_like new_zeros new_ones new_full "
        "new_empty new_empty_strided scalar_tensor empty_permuted",
    ),
    constant=(
        constant,
        "arange rand randn randint randperm eye linspace logspace rand_like randn_like randint_like "
        "tril_indices triu_indices hann_window hamming_window",
    ),
    opaque=(
        opaque,
        "nll_loss_forward nll_loss2d_forward uniform normal random exponential geometric cauchy log_normal "
        "multinomial multi_margin_loss multilabel_margin_loss_forward _ctc_loss",
    ),
    loss=(loss, "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits"),
    reduction=(
        reduction,
        "sum mean nansum nanmean prod amax amin aminmax var std var_mean std_mean norm linalg_vector_norm logsumexp "
        "any all count_nonzero",
    ),
    extremum=(extremum, "max min"),
    position=(position, "argmax argmin median nanmedian mode kthvalue"),
    along_dim=(along("dim"), "cumsum cumprod logcumsumexp cummax cummin sort topk argsort"),
    along_dims=(along("dims"), "flip roll"),
    spatial1=(spatial(1), "avg_pool1d upsample_nearest1d upsample_linear1d reflection_pad1d replication_pad1d"),
    spatial2=(
        spatial(2),
        "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d "
        "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d reflection_pad2d "
        "replication_pad2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    ),
    spatial3=(
        spatial(3),
        "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d "
        "upsample_trilinear3d reflection_pad3d replication_pad3d",
    ),
    pad=(pad, "constant_pad_nd"),
    triangle=(triangle, "tril triu"),
    halves=(halves, "glu"),
    view=(view, "view _unsafe_view reshape _reshape_alias _reshape_copy view_copy"),
    permute=(permute, "permute transpose t numpy_T permute_copy transpose_copy t_copy"),
    squeeze=(squeeze, "squeeze squeeze_copy"),
    unsqueeze=(unsqueeze, "unsqueeze unsqueeze_copy"),
    expand=(expand, "expand expand_copy"),
    repeat=(repeat, "repeat"),
    slicing=(slicing, "slice slice_copy"),
    strided=(strided, "as_strided as_strided_copy"),
    windows=(windows, "unfold unfold_copy"),
    complex=(from_pairs, "view_as_complex"),
    pairs=(to_pairs, "view_as_real"),
    select=(select, "select unbind select_copy unbind_copy"),
    split=(split, "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk split_copy"),
    cat=(cat, "cat concat"),
    stack=(stack, "stack"),
    index_select=(index_select, "index_select"),
    embedding=(embedding, "embedding"),
    index=(index, "index index_put _unsafe_index _unsafe_index_put"),
    gather=(gather, "gather scatter scatter_add scatter_reduce"),
    grouped_matmul=(grouped_matmul, "_grouped_mm"),
    matmul=(matmul, "mm addmm bmm baddbmm mv addmv dot"),
    trilinear=(trilinear, "_trilinear"),
    attention=(
        attention,
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    convolution=(convolution, "convolution _convolution"),
    channel_norm=(
        channel_norm,
        "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit _batch_norm_with_update "
        "_native_batch_norm_legit_no_training _batch_norm_no_update "
        "_native_batch_norm_legit_functional",
    ),
    trailing_norm=(trailing_norm, "native_layer_norm _fused_rms_norm"),
    group_norm=(group_norm, "native_group_norm"),
    weight_norm=(weight_norm, "_weight_norm_interface"),
)
"""Op name without namespace, overload and the underscore of in-place -> its rule."""

KEEP_UNIFORM = frozenset(
    (uniform, same, pointwise, reduction, view, permute, squeeze, unsqueeze, expand, repeat, slicing, select, split)
)
"""Rules of ops that make tensors of one repeated value from such tensors, unless they are random."""
