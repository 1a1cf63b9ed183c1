"""Numerical check of a symmetry: permute the neurons of a real network and compare its outputs.

The optional search looks for symmetry that is not claimed. It permutes fixed axes, alone and in pairs of equal size
that might be one axis, and permutes the inner axes of products differently for each entry of the outer axis.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from nfn_optim.symmetry.expression import axes_of, products_of
from nfn_optim.symmetry.module import find_tensors, restored, tensors_of, training_output, unwrap_with_prefix
from nfn_optim.symmetry.symmetry import Symmetry

MAX_TRIALS = 400
"""Forward passes in the search for symmetry that is not claimed."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """How much the output of a real network changes when each free axis is permuted.

    Args:
        errors: Axis -> largest change of an output, relative to the largest output.
        tolerance: Largest error that is attributed to rounding.
        missed: Descriptions of symmetry that is not claimed; empty without a search.
        reason: Why the network could not be run; empty if it could.
    """

    errors: Mapping[str, float]
    tolerance: float
    missed: tuple[str, ...] = ()
    reason: str = ""

    @property
    def broken(self) -> tuple[str, ...]:
        """The axes whose permutation changes the function."""
        return tuple(axis for axis, error in self.errors.items() if not error <= self.tolerance)

    @property
    def ok(self) -> bool:
        """Whether the network ran and no permutation changed it."""
        return not self.reason and not self.broken

    def __str__(self) -> str:
        """One line per axis, then the verdict."""
        if self.reason:
            return f"not certified: {self.reason}"
        lines = [
            f"{axis:<8}{error:.1e}{'  changes the function' * (axis in self.broken)}"
            for axis, error in self.errors.items()
        ]
        verdict = "certified" if self.ok else "not certified"
        return "\n".join(
            [*lines, *self.missed, f"{verdict}: {len(self.errors)} free axes, tolerance {self.tolerance:.0e}"]
        )


def certify(
    module: nn.Module, symmetry: Symmetry, *inputs: Any, seed: int = 0, search: bool = False, **kwargs: Any
) -> Certificate:
    """Permute every free axis of a real network in turn and compare its outputs.

    Runs a copy in eval mode and float64, or in its own dtypes if float64 fails. Parameters and buffers are perturbed,
    because tensors of zeros or ones are invariant under all permutations.

    Args:
        module: The network; it is not changed.
        symmetry: The claimed symmetry; it may leave out tensors.
        *inputs: Positional arguments of its forward.
        seed: Seed of the permutations, the perturbation and the network's own randomness.
        search: Whether to look for symmetry that is not claimed, with at most `MAX_TRIALS` forward passes.
        **kwargs: Keyword arguments of its forward.

    Returns:
        The certificate. If the network cannot be run, its `reason` is the error; `certify` does not raise.
    """
    reasons = []
    for dtype, tolerance in ((torch.float64, 1e-8), (None, 1e-3)):
        try:
            trial = _Trial(module, symmetry, (inputs, kwargs), dtype, seed)
            errors = {axis: trial.error({axis: _shuffled(trial.claimed, axis, trial.generator)}) for axis in trial.free}
            return Certificate(errors, tolerance, tuple(trial.missed(tolerance)) if search else ())
        except Exception as error:  # the forward of an arbitrary module may raise anything
            reasons.append(f"{type(error).__name__}: {error}")
    return Certificate({}, 0.0, reason=reasons[-1])


class _Float64Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces dtypes of lower precision by float64 in all ops; some normalisations compute in float32."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value in (torch.float16, torch.bfloat16, torch.float32) else value

        args, kwargs = tree_map_only(torch.dtype, widened, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


class _Trial:
    """A copy of a network that is run with permuted tensors.

    Args:
        module: The network.
        symmetry: The claimed symmetry.
        call: Positional and keyword arguments of its forward.
        dtype: Dtype of parameters, buffers and inputs; None for their own.
        seed: Seed of all random numbers.
    """

    def __init__(
        self, module: nn.Module, symmetry: Symmetry, call: tuple[Any, Any], dtype: torch.dtype | None, seed: int
    ) -> None:
        inner, prefix = unwrap_with_prefix(module)
        self.network = copy.deepcopy(inner).eval()
        self.in_float64, self.seed = dtype is not None, seed
        if dtype is not None:
            self.network = self.network.to(dtype)
            call = tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, call)
        self.call = call
        self.tensors = {name: t for name, t in tensors_of(self.network).items() if prefix + name in symmetry.dims}
        described = symmetry.restrict(prefix + name for name in self.tensors)
        self.claimed = described.rename({prefix + name: name for name in self.tensors})
        self.free = self.claimed.free
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in self.tensors.values():
                if tensor.is_floating_point():
                    noise = torch.rand(tensor.shape, generator=self.generator).to(tensor)
                    tensor.copy_(tensor * (1 + 0.2 * noise) + 0.1 * noise)
        self.values = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self.claimed.check(self.values)
        self.expected = self.outputs()

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """The outputs of the network with its current tensors."""
        float64 = _Float64Mode() if self.in_float64 else contextlib.nullcontext()  # type: ignore[no-untyped-call]
        args, kwargs = self.call
        with torch.random.fork_rng(), restored(self.network), float64:
            torch.manual_seed(self.seed)
            random.seed(self.seed)
            output = self.network(*args, **kwargs)
        tensors = find_tensors(training_output(output))
        return [(torch.view_as_real(out) if out.is_complex() else out).double().clone() for out in tensors]

    @torch.no_grad()
    def error(self, permutations: Mapping[str, Tensor], claimed: Symmetry | None = None) -> float:
        """The largest relative change of an output when axes are permuted."""
        permuted = (claimed or self.claimed).permute(self.values, permutations)
        for name, value in permuted.items():
            if value is not self.values[name]:
                self.tensors[name].copy_(value)
        error = max(_distance(a, b) for a, b in zip(self.outputs(), self.expected, strict=True))
        for name, value in self.values.items():
            if permuted[name] is not value:
                self.tensors[name].copy_(value)
        return error

    def missed(self, tolerance: float) -> Iterator[str]:
        """Descriptions of symmetry that is not claimed."""
        claimed = self.claimed
        all_free = Symmetry(claimed.dims, claimed.sizes, nested=claimed.nested)
        parameters = {name for name, _ in self.network.named_parameters()} & set(claimed.dims)
        carried = {axis for name in parameters for axis in claimed.axes_of(name)}
        fixed = [axis for axis in claimed.axes if axis in claimed.fixed & carried and claimed.sizes[axis] > 1]
        alone: set[str] = set()
        trials = MAX_TRIALS
        for axis in fixed[:trials]:
            trials -= 1
            if self.error({axis: _shuffled(all_free, axis, self.generator)}, all_free) <= tolerance:
                alone.add(axis)
                yield f"{axis} could be free"
        channels = {axis for name in parameters for e in claimed.expressions_of(name)[:2] for axis in axes_of(e)}
        remaining = [axis for axis in fixed if axis in channels - alone]
        pairs = [(a, b) for a, b in itertools.combinations(remaining, 2) if claimed.sizes[a] == claimed.sizes[b]]
        for a, b in pairs[:trials]:
            trials -= 1
            order = _shuffled(all_free, a, self.generator)
            if self.error({a: order, b: order}, all_free) <= tolerance:
                yield f"{a} and {b} could be one free axis"
        nestable = {
            (inner, outer)
            for name in parameters
            for e in claimed.expressions_of(name)
            for product in products_of(e)
            for outer, inner in itertools.combinations([f for f in product.factors if isinstance(f, str)], 2)
            if inner in claimed.free and outer not in claimed.nested.get(inner, ()) and inner != outer
        }
        for inner, outer in sorted(nestable)[:trials]:
            more_nested = Symmetry(claimed.dims, claimed.sizes, claimed.fixed, {**claimed.nested, inner: (outer,)})
            with contextlib.suppress(ValueError):  # the inner axis also occurs without the outer one
                if self.error({inner: _shuffled(more_nested, inner, self.generator)}, more_nested) <= tolerance:
                    yield f"{inner} could be nested in {outer}"


def _shuffled(symmetry: Symmetry, axis: str, generator: torch.Generator) -> Tensor:
    """A random permutation of an axis, not the identity, for every entry of the axes that it is nested in."""
    size = symmetry.sizes[axis]
    copies = []
    for _ in range(symmetry.copies_of(axis)):
        order = torch.randperm(size, generator=generator)
        copies.append(order.roll(1) if torch.equal(order, torch.arange(size)) else order)
    outer = [symmetry.sizes[parent] for parent in symmetry.nested.get(axis, ())]
    return torch.stack(copies).reshape(*outer, size)


def _distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the largest entry; entries that are not finite must agree exactly."""
    if torch.equal(actual, expected):
        return 0.0
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()) or not torch.equal(
        actual[~finite].nan_to_num(), expected[~finite].nan_to_num()
    ):
        return float("inf")
    return float((actual - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(1e-12))
