"""The text form of a symmetry: a table of tensors with their dimensions, then the free and the fixed axes.

    0.weight  h0 in
    0.bias    h0

    free      h0=32
    fixed     in=64

A nested axis is listed together with the axes that it is nested in, `dim[head]=8`. Comments start with `#`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from nfn_optim.symmetry.expression import Nested, format_dim, parse_dims

_AXIS = re.compile(r"([^\s()=>+\[\],]+)(?:\[([^\]]*)\])?=(\d+)")

Fields = tuple[dict[str, tuple[str, ...]], dict[str, int], frozenset[str], dict[str, tuple[str, ...]]]
"""The arguments of a `Symmetry`: dims, sizes, fixed, nested."""


def parse_table(text: str) -> Fields:
    """Parse the text form of a symmetry.

    Raises:
        ValueError: A line has neither form.
    """
    dims: dict[str, tuple[str, ...]] = {}
    sizes: dict[str, int] = {}
    fixed: set[str] = set()
    nested: dict[str, tuple[str, ...]] = {}
    for raw in text.splitlines():
        line = raw.split("#")[0].strip()
        if not line:
            continue
        head, _, rest = line.partition(" ")
        if head in {"free", "fixed"} and (not rest.strip() or "=" in rest):
            if _AXIS.sub("", rest).strip():
                raise ValueError(f"expected '{head} axis=size ...', found {line!r}")
            for axis, parents, size in _AXIS.findall(rest):
                sizes[axis] = int(size)
                if head == "fixed":
                    fixed.add(axis)
                if parents:
                    nested[axis] = tuple(parents.split(","))
        else:
            dims[head] = tuple(format_dim(expression, declared) for expression, declared in parse_dims(rest))
    return dims, sizes, frozenset(fixed), nested


def format_table(
    dims: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], fixed: frozenset[str], nested: Nested
) -> str:
    """The text form of a symmetry; the inverse of `parse_table`."""
    width = max([len(name) for name in dims] + [5]) + 2

    def listed(axes: Iterable[str]) -> str:
        return " ".join(f"{a}[{','.join(nested[a])}]={sizes[a]}" if a in nested else f"{a}={sizes[a]}" for a in axes)

    rows = [(name, " ".join(parts)) for name, parts in dims.items()]
    rows += [("", ""), ("free", listed(axis for axis in sizes if axis not in fixed))]
    rows += [("fixed", listed(axis for axis in sizes if axis in fixed))]
    return "\n".join(f"{head:<{width}}{rest}".rstrip() for head, rest in rows)
