"""For every ATen op, a rule that relates the axes of its outputs to those of its inputs.

An op f is *equivariant* under a permutation P of axes if f(P x) = P f(x). A rule returns the axes of the outputs, and
unifies or fixes axes of the inputs so that f is equivariant under every permutation of the axes that stay free. A rule
may lose symmetry and must never claim too much: an output may have fresh fixed axes only if the input axes that it
depends on are fixed.

Ops that torch tags as pointwise need no rule of their own. Ops without a rule are decomposed by the tracer; if they
have no decomposition, `opaque` fixes all axes of their inputs and outputs.

References:
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from nfn_optim.symmetry.axes import Dims, fresh, size_of
from nfn_optim.symmetry.layer_rules import (
    attention,
    batch_norm,
    batch_statistics,
    convolution,
    fused_cell,
    group_norm,
    grouped_matmul,
    layer_norm,
    matmul,
    trilinear,
    weight_norm,
)
from nfn_optim.symmetry.lookup_rules import embedding, gather, index, index_select, index_write, pack, positions
from nfn_optim.symmetry.op_call import OpCall, Rule, broadcast
from nfn_optim.symmetry.shape_rules import (
    as_strided,
    cat,
    expand,
    glu,
    pad,
    permute,
    repeat,
    select,
    slicing,
    split,
    squeeze,
    stack,
    unfold,
    unsqueeze,
    view,
    view_as_complex,
    view_as_real,
)
from nfn_optim.symmetry.unification import fix

# ------------------------------------------------------------------------------------------------ pointwise, constant


def pointwise(call: OpCall) -> Sequence[Dims]:
    """Entry by entry, with broadcasting."""
    inputs = [call.lookup(tensor) for tensor in call.tensors]
    return [broadcast(inputs, call.shape(out)) for out in range(len(call.outs))]


def each(call: OpCall) -> Sequence[Dims]:
    """Entry by entry, for each tensor of several lists."""
    lists = [value for value in call.args.values() if isinstance(value, list | tuple) and value]
    lists = [value for value in lists if all(isinstance(item, Tensor) for item in value)]
    outs = []
    for tensors in zip(*lists, strict=True):
        shape = max((tuple(tensor.shape) for tensor in tensors), key=len)
        outs.append(broadcast([call.lookup(tensor) for tensor in tensors], shape))
    return outs


def same(call: OpCall) -> Sequence[Dims]:
    """Whether two tensors are equal, which they are in any order of both."""
    broadcast([call.lookup(tensor) for tensor in call.tensors], tuple(call.tensors[0].shape))
    return []


def like_input(call: OpCall) -> Sequence[Dims]:
    """Each output has the dimensions of the first input and is an equivariant function of it alone (copies, casts)."""
    return [call.first for _ in call.outs]


def softmax(call: OpCall) -> Sequence[Dims]:
    """Normalises by a sum over one dimension."""
    d = call.dim_indices("dim")[0] if call.first else 0
    call.add_index_space(call.first[:d] + call.first[d + 1 :])
    return [call.first]


def copy(call: OpCall) -> Sequence[Dims]:
    """Overwrites `self` with a broadcast source."""
    own = call.dims("self")
    return [broadcast([own, call.dims("src")], call.shape())]


def filled(call: OpCall) -> Sequence[Dims]:
    """A new tensor whose entries are all equal, and therefore the same in any order."""
    return [fresh(call.shape(out)) for out in range(len(call.outs))]


def generated(call: OpCall) -> Sequence[Dims]:
    """A new tensor whose entries differ, such as `arange`."""
    return [fresh(call.shape(out), fixed=True) for out in range(len(call.outs))]


def opaque(call: OpCall) -> Sequence[Dims]:
    """Fixes all axes: nothing is known about the op."""
    for tensor in call.tensors:
        fix(*call.lookup(tensor))
    return generated(call)


def loss(call: OpCall) -> Sequence[Dims]:
    """Pointwise between input and target, optionally reduced to a scalar."""
    inputs = [call.lookup(tensor) for tensor in call.tensors]
    merged = broadcast(inputs, max((tuple(t.shape) for t in call.tensors), key=len))
    call.add_index_space(merged)
    return [merged if len(call.shape()) else ()]


# -------------------------------------------------------------------------------------------- reductions and positions


def reduction(call: OpCall) -> Sequence[Dims]:
    """Reduces dimensions in any order, so that their axes stay free."""
    dims = call.first
    reduced = set(call.dim_indices("dim"))
    keep = bool(call.args.get("keepdim"))
    call.add_index_space(dims)
    kept = tuple(() if d in reduced else dim for d, dim in enumerate(dims) if keep or d not in reduced)
    return [kept for _ in call.outs]


def extremum(call: OpCall) -> Sequence[Dims]:
    """Maximum or minimum; the indices that are also returned fix the axis once they are used."""
    if call.overload == "other":
        return pointwise(call)
    outs = reduction(call)
    for indices in call.outs[1:]:
        call.fix_on_use(indices, [call.first[d] for d in call.dim_indices("dim")])
    return outs


def arg_reduction(call: OpCall) -> Sequence[Dims]:
    """A reduction whose result is, or comes with, indices along the dimensions `dim`."""
    fix(*(call.first[d] for d in call.dim_indices("dim")))
    return reduction(call)


def ordered_along(name: str) -> Rule:
    """An op that depends on the order along the dimensions in the argument `name`, and along no other."""

    def rule(call: OpCall) -> Sequence[Dims]:
        ordered = call.dim_indices(name)
        fix(*(call.first[d] for d in ordered))
        return [_resized(call.first, call.shape(out), ordered) for out in range(len(call.outs))]

    return rule


def spatial(count: int) -> Rule:
    """Windows over the last `count` dimensions, separately for each entry of the others (channels, batch)."""

    def rule(call: OpCall) -> Sequence[Dims]:
        dims = call.first
        ordered = list(range(len(dims) - count, len(dims)))
        fix(*(dims[d] for d in ordered))
        return [_resized(dims, call.shape(out), ordered) for out in range(len(call.outs))]

    return rule


def _resized(dims: Dims, shape: Sequence[int], ordered: Sequence[int]) -> Dims:
    """The dimensions of the result of an op along `ordered` dimensions, which are fixed."""
    return tuple(
        fresh([size], fixed=True)[0] if d in ordered and size != size_of(dim) else dim
        for d, (dim, size) in enumerate(zip(dims, shape, strict=True))
    )


def triangular(call: OpCall) -> Sequence[Dims]:
    """Sets entries to zero, depending on their row and column index."""
    fix(*call.first[-2:])
    return [call.first]


# --------------------------------------------------------------------------------------------------------------- table


FOREACH = (
    "abs add addcdiv addcmul ceil clamp_max clamp_min copy cos div erf exp floor lerp log maximum minimum mul neg pow "
    "reciprocal round rsqrt sigmoid sign sin sqrt sub tanh trunc zero"
)
"""Pointwise ops that have a form for lists of tensors."""


def _table(**rules: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in rules.values() for name in names.split()}


RULES: Mapping[str, Rule] = _table(
    like_input=(
        like_input,
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
    filled=(
        filled,
        "zeros ones full empty empty_strided zeros_like ones_like full_like empty_like new_zeros new_ones new_full "
        "new_empty new_empty_strided scalar_tensor empty_permuted",
    ),
    generated=(
        generated,
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
        "any all count_nonzero _is_all_true _is_any_true",
    ),
    extremum=(extremum, "max min"),
    arg_reduction=(arg_reduction, "argmax argmin median nanmedian mode kthvalue"),
    ordered_dim=(ordered_along("dim"), "cumsum cumprod logcumsumexp cummax cummin sort topk argsort"),
    ordered_dims=(ordered_along("dims"), "flip roll"),
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
    triangular=(triangular, "tril triu"),
    glu=(glu, "glu"),
    view=(view, "view _unsafe_view reshape _reshape_alias _reshape_copy view_copy"),
    permute=(permute, "permute transpose t numpy_T permute_copy transpose_copy t_copy"),
    squeeze=(squeeze, "squeeze squeeze_copy"),
    unsqueeze=(unsqueeze, "unsqueeze unsqueeze_copy"),
    expand=(expand, "expand expand_copy"),
    repeat=(repeat, "repeat"),
    slicing=(slicing, "slice slice_copy"),
    as_strided=(as_strided, "as_strided as_strided_copy"),
    unfold=(unfold, "unfold unfold_copy"),
    view_as_complex=(view_as_complex, "view_as_complex"),
    view_as_real=(view_as_real, "view_as_real"),
    select=(select, "select unbind select_copy unbind_copy"),
    split=(split, "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk split_copy"),
    cat=(cat, "cat concat"),
    stack=(stack, "stack"),
    index_select=(index_select, "index_select"),
    embedding=(embedding, "embedding"),
    index=(index, "index index_put _unsafe_index _unsafe_index_put"),
    index_write=(index_write, "index_add index_copy index_fill"),
    positions=(positions, "nonzero masked_select argwhere unique_dim _unique2 unique_consecutive bincount histc"),
    pack=(pack, "_pack_padded_sequence _pad_packed_sequence"),
    each=(each, " ".join(f"_foreach_{name}" for name in FOREACH.split())),
    same=(same, "equal"),
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
    batch_norm=(
        batch_norm,
        "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit _batch_norm_with_update "
        "_native_batch_norm_legit_no_training _batch_norm_no_update "
        "_native_batch_norm_legit_functional",
    ),
    layer_norm=(layer_norm, "native_layer_norm _fused_rms_norm"),
    group_norm=(group_norm, "native_group_norm"),
    batch_statistics=(batch_statistics, "batch_norm_stats batch_norm_gather_stats_with_counts batch_norm_elemt"),
    fused_cell=(fused_cell, "_thnn_fused_lstm_cell _thnn_fused_gru_cell"),
    weight_norm=(weight_norm, "_weight_norm_interface"),
)
"""Op name, without namespace, overload and in-place underscore -> its rule."""

PRESERVE_FILL = frozenset(
    {filled, like_input, pointwise, reduction, view, permute, squeeze, unsqueeze}
    | {expand, repeat, slicing, select, split}
)
"""Rules of ops that return tensors of equal entries if all their inputs have equal entries, unless they are random."""
