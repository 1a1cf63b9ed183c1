"""Input and output axes of a network: fixed (HNP) or free (NP).

    HNP    only hidden neurons are permuted, inputs and outputs have positions   NFLinear(symmetry, ...)
    NP     inputs and outputs are permuted, too: fewer coefficients and less     NFLinear(free_ends(symmetry), ...)
           expressive, unless their positions are encoded in the features

Kernel taps are fixed axes, too, and have coefficients for every pair of positions: 81 times as many for 3 x 3 kernels.
`free_taps` shares them; an encoding of positions tells taps apart again.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2.2, arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Iterable

from nfn_optim.layers.incidence import role_of
from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.expression import axes_of


def ends_of(symmetry: Symmetry) -> tuple[str, ...]:
    r"""The input and output axes: fixed axes that are a row or column dimension of a matrix or kernel.

    Axes that also occur as a tap, or within a product or sum, are excluded.

    Example:
        >>> ends_of(Symmetry.parse("w  h in ky\nfree  h=3\nfixed  in=2 ky=3"))
        ('in',)
    """
    roles = _roles_of(symmetry)
    ends, others = {"row", "column"}, {"tap", "factor"}
    return tuple(a for a in symmetry.sizes if a in symmetry.fixed and roles[a] & ends and not roles[a] & others)


def free_ends(symmetry: Symmetry, ends: Iterable[str] | None = None) -> Symmetry:
    """The symmetry in which inputs and outputs may be permuted, too (NP).

    Args:
        symmetry: The tensors and their axes.
        ends: The fixed axes to free; default `ends_of(symmetry)`.

    Raises:
        ValueError: One of the axes is not fixed.
    """
    freed = set(ends_of(symmetry) if ends is None else ends)
    if unknown := freed - symmetry.fixed:
        raise ValueError(f"expected fixed axes, some of {sorted(symmetry.fixed)}, found {sorted(unknown)}")
    return Symmetry(symmetry.dims, symmetry.sizes, symmetry.fixed - freed, symmetry.nested)


def taps_of(symmetry: Symmetry) -> tuple[str, ...]:
    r"""The kernel taps: fixed axes that are nothing but the third or a later dimension of kernels.

    Example:
        >>> taps_of(Symmetry.parse("w  h in ky\nfree  h=3\nfixed  in=2 ky=3"))
        ('ky',)
    """
    return tuple(a for a, roles in _roles_of(symmetry).items() if a in symmetry.fixed and roles == {"tap"})


def free_taps(symmetry: Symmetry) -> Symmetry:
    """The symmetry in which kernel taps may be permuted, too: far fewer coefficients for convolutions."""
    return free_ends(symmetry, taps_of(symmetry))


def _roles_of(symmetry: Symmetry) -> dict[str, set[str]]:
    """What an axis is in the tensors that have it: roles of `incidence`, or "factor" within a product or sum."""
    roles: dict[str, set[str]] = {axis: set() for axis in symmetry.sizes}
    for name, dims in symmetry.dims.items():
        for d, expression in enumerate(symmetry.expressions_of(name)):
            if isinstance(expression, str):
                roles[expression].add(role_of(d, len(dims)))
            else:
                for axis in axes_of(expression):
                    roles[axis].add("factor")
    return roles
