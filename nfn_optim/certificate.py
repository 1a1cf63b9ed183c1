"""Whether a claimed symmetry is one: permute the neurons of a real network and look at its outputs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from nfn_optim.network import find_tensors, minimised, tensors_of, untouched, unwrap
from nfn_optim.symmetry import Symmetry


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What permuting each free axis of a real network did to its output.

    Args:
        errors: Axis -> largest change of an output, relative to the largest output.
        tolerance: What counts as rounding.
        reason: Why the network could not be run; empty if it could.
    """

    errors: Mapping[str, float]
    tolerance: float
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
        return "\n".join([*lines, f"{verdict}: {len(self.errors)} free axes, tolerance {self.tolerance:.0e}"])


def certify(module: nn.Module, symmetry: Symmetry, *inputs: Any, seed: int = 0, **kwargs: Any) -> Certificate:
    """Permute every free axis of a real network in turn and compare its outputs.

    Works on a copy in eval mode and float64, or as it is where float64 does not run, with parameters and buffers moved
    away from zeros and ones, which any permutation would keep.

    Args:
        module: The network; it is not changed.
        symmetry: What is claimed of it; may leave out tensors.
        *inputs: What its forward takes.
        seed: Of the permutations, the noise and the network's own randomness.
        **kwargs: Its keyword arguments.

    Returns:
        The certificate; it says so instead of raising if the network cannot be run.
    """
    reasons = []
    for dtype, tolerance in ((torch.float64, 1e-8), (None, 1e-3)):
        try:
            return Certificate(_errors(module, symmetry, (inputs, kwargs), dtype, seed), tolerance)
        except Exception as error:  # anything may be wrong with a stranger's forward
            reasons.append(f"{type(error).__name__}: {error}")
    return Certificate({}, 0.0, reasons[-1])


class _Wide(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives float64 to whatever asks for less, as normalisations that compute in float32 do."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value in (torch.float16, torch.bfloat16, torch.float32) else value

        args, kwargs = tree_map_only(torch.dtype, widened, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _errors(
    module: nn.Module, symmetry: Symmetry, call: tuple[Any, Any], dtype: torch.dtype | None, seed: int
) -> dict[str, float]:
    """Axis -> relative change of the output."""
    inner, prefix = unwrap(module)
    network = copy.deepcopy(inner).eval()
    if dtype is not None:
        network = network.to(dtype)
        call = tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, call)
    args, kwargs = call
    tensors = {name: t for name, t in tensors_of(network).items() if prefix + name in symmetry.dims}
    claimed = symmetry.restrict(prefix + name for name in tensors).rename({prefix + name: name for name in tensors})
    generator = torch.Generator().manual_seed(seed)
    wide = contextlib.nullcontext() if dtype is None else _Wide()  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.random.fork_rng(), untouched(network), wide:
        for tensor in tensors.values():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator).to(tensor)
                tensor.copy_(tensor * (1 + 0.2 * noise) + 0.1 * noise)
        values = {name: tensor.clone() for name, tensor in tensors.items()}
        claimed.check(values)

        def outputs() -> list[Tensor]:
            torch.manual_seed(seed)
            random.seed(seed)
            found = find_tensors(minimised(network(*args, **kwargs)))
            return [(torch.view_as_real(out) if out.is_complex() else out).double().clone() for out in found]

        expected, errors = outputs(), {}
        for axis in claimed.free:
            for name, value in claimed.permute(values, {axis: _shuffled(claimed, axis, generator)}).items():
                tensors[name].copy_(value)
            errors[axis] = max(_distance(a, b) for a, b in zip(outputs(), expected, strict=True))
            for name, value in values.items():
                tensors[name].copy_(value)
    return errors


def _shuffled(symmetry: Symmetry, axis: str, generator: torch.Generator) -> Tensor:
    """A permutation of an axis for every entry of what it is nested in, none of which leaves all in its place."""
    size = symmetry.sizes[axis]
    copies = []
    for _ in range(symmetry.copies_of(axis)):
        order = torch.randperm(size, generator=generator)
        copies.append(order.roll(1) if torch.equal(order, torch.arange(size)) else order)
    outer = [symmetry.sizes[parent] for parent in symmetry.nested.get(axis, ())]
    return torch.stack(copies).reshape(*outer, size)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest entry; entries that are not finite must agree exactly."""
    if torch.equal(found, expected):
        return 0.0
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()) or not torch.equal(
        found[~finite].nan_to_num(), expected[~finite].nan_to_num()
    ):
        return float("inf")
    return float((found - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(1e-12))
