"""What the tracer knows of an op in advance, from its schema and the table of rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from nfn_optim.symmetry.layer_rules import batch_norm
from nfn_optim.symmetry.op_call import Rule
from nfn_optim.symmetry.op_rules import PRESERVE_FILL, RULES, each, filled, pointwise
from nfn_optim.symmetry.shape_rules import as_strided, expand, repeat

_IGNORED = ("prim::", "profiler::", "aten::_assert", "aten::sym_", "aten::is_", "aten::_has_")
_COMMUNICATION = ("c10d::", "_c10d_functional::", "fsdp::")
"""Ops whose schemas do not say what they write to. Parameters that they gather are known by name."""
_VARYING = ("_pack_padded_sequence", "_pad_packed_sequence")
"""Ops whose output has a shape that depends on the values of their inputs, without a tag that says so."""


@dataclass(frozen=True)
class OpPlan:
    """How an op is traced.

    Args:
        full_name: Its name with the namespace.
        rule: Its rule; None if there is none.
        ignored: Whether the op has no part in the function of a network.
        communicates: Whether it exchanges tensors with other processes.
        writes: Whether it writes to one of its arguments.
        reshapes: Whether it changes the shape of its first argument in place.
        preserves_fill: Whether it returns tensors of equal entries if all its inputs have equal entries.
        writes_to_inputs: Whether its rule covers tensors that it writes to and does not return.
        reads: Whether it depends on the values of its inputs, or returns copies of them.
        allocates: Whether it returns memory without values.
        selects: Whether it is `select`, whose last argument is the index of an entry.
        repeatable: Whether two calls with inputs of the same dimensions have outputs of the same dimensions.
    """

    full_name: str
    rule: Rule | None
    ignored: bool
    communicates: bool
    writes: bool
    reshapes: bool
    preserves_fill: bool
    writes_to_inputs: bool
    reads: bool
    allocates: bool
    selects: bool
    repeatable: bool

    @property
    def uses_numbers(self) -> bool:
        """Whether the rule depends on arguments that are no tensors."""
        return self.rule is not pointwise

    @property
    def needs_strides(self) -> bool:
        """Whether the rule depends on strides."""
        return self.rule is as_strided

    def is_fake_grouped_mm(self, inputs: Sequence[Tensor]) -> bool:
        """Whether this is a grouped matrix product of fake tensors."""
        return self.full_name == "aten::_grouped_mm" and isinstance(inputs[0], FakeTensor)


@cache
def plan_of(func: OpOverload) -> OpPlan:
    """How an op is traced."""
    full_name = func._schema.name
    namespace, name = full_name.split("::")
    communicates = full_name.startswith(_COMMUNICATION)
    writes = communicates or any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    base_name = name.removesuffix("_") if writes and not name.endswith("__") else name
    rule = RULES.get(base_name) if namespace in {"aten", "prims"} else None
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = pointwise
    reshapes = writes and torch.Tag.inplace_view in func.tags
    makes_free_axes = rule in (None, filled, expand, repeat, as_strided)
    varies = torch.Tag.dynamic_output_shape in func.tags or base_name in _VARYING
    is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.returns)
    return OpPlan(
        full_name,
        rule,
        ignored=full_name.startswith(_IGNORED),
        communicates=communicates,
        writes=writes,
        reshapes=reshapes,
        preserves_fill=rule in PRESERVE_FILL and torch.Tag.nondeterministic_seeded not in func.tags,
        writes_to_inputs=rule in (batch_norm, each, pointwise),
        reads=rule is not filled and not is_view,
        allocates=rule is filled and "empty" in base_name,
        selects=full_name == "aten::select",
        repeatable=not (makes_free_axes or varies or reshapes),
    )
