"""The ends of a network: its input and output neurons, permutable (NP) or not (HNP).

    HNP    hidden neurons are permuted, inputs and outputs have positions       NFLinear(symmetry, ...)
    NP     inputs and outputs are permuted too: fewer coefficients, less         NFLinear(free_ends(symmetry), ...)
           expressive; encodings of the positions give back what is lost

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2.2, arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Iterable

from nfn_optim.layers.incidence import role_of
from nfn_optim.symmetry import Symmetry
from nfn_optim.symmetry.expression import axes_of


def ends_of(symmetry: Symmetry) -> tuple[str, ...]:
    r"""The fixed axes that are the whole first or second dimension of a matrix or kernel, and never a tap.

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
    wanted, other = {"row", "column"}, {"tap", "factor"}
    return tuple(a for a in symmetry.sizes if a in symmetry.fixed and roles[a] & wanted and not roles[a] & other)


def free_ends(symmetry: Symmetry, ends: Iterable[str] | None = None) -> Symmetry:
    """The symmetry in which inputs and outputs may be permuted too.

    Args:
        symmetry: Of a network.
        ends: The fixed axes to set free; `ends_of(symmetry)` if not given.

    Raises:
        ValueError: One of them is not a fixed axis.
    """
    freed = set(ends_of(symmetry) if ends is None else ends)
    if unknown := freed - symmetry.fixed:
        raise ValueError(f"expected fixed axes, some of {sorted(symmetry.fixed)}, found {sorted(unknown)}")
    return Symmetry(symmetry.dims, symmetry.sizes, symmetry.fixed - freed, symmetry.nested)
