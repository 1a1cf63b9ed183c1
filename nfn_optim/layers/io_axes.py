"""Input and output axes of a network: fixed (HNP) or free (NP).

    HNP    only hidden neurons are permuted, inputs and outputs have positions   NFLinear(symmetry, ...)
    NP     inputs and outputs are permuted, too: fewer coefficients and less     NFLinear(free_ends(symmetry), ...)
           expressive, unless their positions are encoded in the features

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
    roles: dict[str, set[str]] = {axis: set() for axis in symmetry.sizes}
    for name, dims in symmetry.dims.items():
        for d, expression in enumerate(symmetry.expressions_of(name)):
            if isinstance(expression, str):
                roles[expression].add(role_of(d, len(dims)))
            else:
                for axis in axes_of(expression):
                    roles[axis].add("factor")
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
