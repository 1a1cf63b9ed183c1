"""One dimension of a tensor, as an expression in axis names.

    h                 an axis
    (c y x)           a product, as after a flatten: the first factor varies slowest
    (head > dim)      a product whose second axis is *nested* in the first: each head has its own `dim`
    (q + k)           a sum, as after a concatenation: the entries of q, then those of k

Expressions combine: `((head > dim) + x3)`. Nesting is a property of the axis and holds wherever the axis occurs; `>`
declares that the axes of the factor after it are nested in the factor before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

_TOKEN = re.compile(r"\s*([()+>]|[^\s()=>+\[\],]+)")


@dataclass(frozen=True)
class Product:
    """A product of factors; the first varies slowest."""

    factors: tuple[Expression, ...]


@dataclass(frozen=True)
class Sum:
    """Parts laid end to end."""

    parts: tuple[Expression, ...]


Expression: TypeAlias = str | Product | Sum
Nested: TypeAlias = Mapping[str, tuple[str, ...]]
"""Axis name -> the axes that it is nested in."""


@cache
def parse_dim(text: str) -> tuple[Expression, Nested]:
    """Parse one dimension.

    Returns:
        The expression, and the nesting that its `>` declare: axis -> the axis before it.

    Raises:
        ValueError: The text is not one dimension.

    Example:
        >>> parse_dim("(h > (d + e))")
        (Product(factors=('h', Sum(parts=('d', 'e')))), {'d': ('h',), 'e': ('h',)})
    """
    dims = parse_dims(text)
    if len(dims) != 1:
        raise ValueError(f"expected one dimension, {_SYNTAX}, found {text!r}")
    return dims[0]


def parse_dims(text: str) -> list[tuple[Expression, Nested]]:
    """Parse all dimensions of a tensor, e.g. `"out (c y x)"`; one result of `parse_dim` for each."""
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != re.sub(r"\s", "", text):
        raise ValueError(f"expected dimensions, {_SYNTAX}, found {text!r}")
    tokens.reverse()  # so that pop() returns the next token
    dims: list[tuple[Expression, Nested]] = []
    while tokens:
        nested: dict[str, tuple[str, ...]] = {}
        dims.append((_parse_tokens(tokens, nested, text), nested))
    return dims


_SYNTAX = "an axis name such as 'h0', a product such as '(c y x)' or '(head > dim)' or a sum such as '(q + k)'"


def _parse_tokens(tokens: list[str], nested: dict[str, tuple[str, ...]], text: str) -> Expression:
    """Pop one expression off the reversed tokens; adds the nesting that it declares to `nested`."""
    token = tokens.pop()
    if token not in "()+>":
        return token
    items: list[Expression] = []
    operators: list[str] = []
    while token == "(" and tokens and tokens[-1] != ")":
        if items:
            operator = tokens.pop() if tokens[-1] in "+>" else " "
            if not tokens or (operators and (operator == "+") != (operators[-1] == "+")):
                break
            operators.append(operator)
        items.append(_parse_tokens(tokens, nested, text))
        if operators and operators[-1] == ">":
            outer = items[-2]
            for axis in axes_of(items[-1]):
                nested[axis] = (*nested.get(axis, ()), *((outer,) if isinstance(outer, str) else ()))
    if token != "(" or not items or not tokens or tokens.pop() != ")":
        raise ValueError(f"expected dimensions, {_SYNTAX}, found {text!r}")
    return sum_of(items) if "+" in operators else product_of(items)


def product_of(factors: Iterable[Expression]) -> Expression:
    """The product of the factors, with nested products flattened."""
    flat = [f for factor in factors for f in (factor.factors if isinstance(factor, Product) else (factor,))]
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def sum_of(parts: Iterable[Expression]) -> Expression:
    """The sum of the parts, with nested sums flattened."""
    flat = [p for part in parts for p in (part.parts if isinstance(part, Sum) else (part,))]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def format_dim(expression: Expression, nested: Nested) -> str:
    """The text of an expression; the inverse of `parse_dim`."""
    if isinstance(expression, str):
        return expression
    if isinstance(expression, Sum):
        return f"({' + '.join(format_dim(part, nested) for part in expression.parts)})"
    text = ""
    for outer, factor in zip((None, *expression.factors), expression.factors, strict=False):
        is_nested = outer is not None and all(outer in nested.get(axis, ()) for axis in axes_of(factor))
        text += (" > " if is_nested else " " if text else "") + format_dim(factor, nested)
    return f"({text})"


def axes_of(expression: Expression) -> Iterator[str]:
    """The axes of an expression in order, repeated if they occur repeatedly."""
    if isinstance(expression, str):
        yield expression
    else:
        for item in expression.factors if isinstance(expression, Product) else expression.parts:
            yield from axes_of(item)


def products_of(expression: Expression) -> Iterator[Product]:
    """All products in an expression."""
    if isinstance(expression, Product):
        yield expression
    if not isinstance(expression, str):
        for item in expression.factors if isinstance(expression, Product) else expression.parts:
            yield from products_of(item)


def rename_axes(expression: Expression, name_of: Callable[[str], str]) -> Expression:
    """The expression with every axis name replaced by `name_of(axis)`."""
    if isinstance(expression, str):
        return name_of(expression)
    if isinstance(expression, Product):
        return Product(tuple(rename_axes(factor, name_of) for factor in expression.factors))
    return Sum(tuple(rename_axes(part, name_of) for part in expression.parts))


def length_of(expression: Expression, sizes: Mapping[str, int]) -> int:
    """The number of entries of a dimension."""
    if isinstance(expression, str):
        return sizes[expression]
    if isinstance(expression, Product):
        return math.prod(length_of(factor, sizes) for factor in expression.factors)
    return sum(length_of(part, sizes) for part in expression.parts)


def infer_sizes(dims: Iterable[tuple[str, Expression, int]], sizes: Mapping[str, int]) -> dict[str, int]:
    """Solve for the sizes of axes, given the lengths of dimensions.

    Args:
        dims: For each dimension: the name of its tensor, for messages; its expression; its length.
        sizes: Sizes that are known in advance.

    Returns:
        Axis name -> size, for `sizes` and all axes in `dims`.

    Raises:
        ValueError: The lengths do not determine a size, or contradict each other.
    """
    solved = dict(sizes)
    pending = list(dims)
    while pending:
        undetermined = []
        for name, expression, length in pending:
            unknown = {axis for axis in axes_of(expression) if axis not in solved}
            if len(unknown) > 1:
                undetermined.append((name, expression, length))
                continue
            for axis in unknown:  # the length is linear in the size of a single axis
                at_zero, at_one = (length_of(expression, solved | {axis: size}) for size in (0, 1))
                solved[axis] = max(length - at_zero, 0) // max(at_one - at_zero, 1)
            if (expected := length_of(expression, solved)) != length:
                text = format_dim(expression, {})
                raise ValueError(f"expected {expected} entries in {text} of {name!r}, as elsewhere, found {length}")
        if len(undetermined) == len(pending):
            texts = [format_dim(expression, {}) for _, expression, _ in undetermined]
            raise ValueError(f"cannot infer the sizes of the axes in {texts}; pass `sizes`")
        pending = undetermined
    return solved


def nesting_closure(
    axes: Iterable[str], declared: Iterable[Nested], fixed: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """The transitive closure of nesting; fixed axes are nested in none.

    Args:
        axes: All axes, in order of appearance.
        declared: Nesting declared in different places.
        fixed: The axes that must not be permuted.

    Returns:
        Nested axis -> all axes that it is nested in, directly or indirectly, in order of appearance.

    Raises:
        ValueError: An axis is nested in itself.
    """
    order = {axis: index for index, axis in enumerate(axes)}
    parents_of: dict[str, set[str]] = {axis: set() for axis in order}
    for nested in declared:
        for axis, parents in nested.items():
            parents_of[axis] |= set(parents) if axis not in set(fixed) else set()
    closure = {}
    for axis in order:
        ancestors: set[str] = set()
        pending = list(parents_of[axis])
        while pending:
            if (parent := pending.pop()) not in ancestors:
                ancestors.add(parent)
                pending += parents_of[parent]
        if axis in ancestors:
            raise ValueError(f"expected nesting without cycles, found {axis!r} nested in itself")
        if ancestors:
            closure[axis] = tuple(sorted(ancestors, key=order.__getitem__))
    return closure


@dataclass(frozen=True)
class Occurrence:
    """One occurrence of an axis in a dimension.

    Attributes:
        axis: Its name.
        rows: Indices into the dimension of the entries that belong to the axis, `(count,)`, int64.
        entries: The entry of the axis at each of these indices, `(count,)`, int64.
        stride: Distance in the dimension between consecutive entries of the axis.
    """

    axis: str
    rows: Tensor
    entries: Tensor
    stride: int


def occurrences_of(expression: Expression, sizes: Mapping[str, int]) -> list[Occurrence]:
    """All occurrences of axes in a dimension, in order.

    Example:
        >>> expression, _ = parse_dim("(a + b)")
        >>> [(o.axis, o.rows.tolist(), o.entries.tolist()) for o in occurrences_of(expression, {"a": 1, "b": 2})]
        [('a', [0], [0]), ('b', [1, 2], [0, 1])]
    """
    if isinstance(expression, str):
        indices = torch.arange(sizes[expression])
        return [Occurrence(expression, indices, indices, 1)]
    occurrences = []
    if isinstance(expression, Sum):
        start = 0
        for part in expression.parts:
            for o in occurrences_of(part, sizes):
                occurrences.append(Occurrence(o.axis, o.rows + start, o.entries, o.stride))
            start += length_of(part, sizes)
        return occurrences
    outer, inner = 1, length_of(expression, sizes)
    for factor in expression.factors:
        length = length_of(factor, sizes)
        inner //= max(length, 1)
        outer_index, inner_index = torch.arange(outer)[:, None, None], torch.arange(inner)
        for o in occurrences_of(factor, sizes):
            rows = (outer_index * length + o.rows[:, None]) * inner + inner_index  # (outer, count, inner)
            entries = o.entries[:, None].expand(rows.shape)
            occurrences.append(Occurrence(o.axis, rows.reshape(-1), entries.reshape(-1), o.stride * inner))
        outer *= length
    return occurrences


def entries_within(
    occurrence: Occurrence, all_occurrences: Iterable[Occurrence], parents: Iterable[str], sizes: Mapping[str, int]
) -> Tensor | None:
    """The copy of a nested axis that each row of an occurrence belongs to: the flat index of its parents' entries.

    Args:
        occurrence: An occurrence of the nested axis.
        all_occurrences: All occurrences in the same dimension.
        parents: The axes that it is nested in, the first varying slowest.
        sizes: Axis name -> size.

    Returns:
        `(count,)`, from 0 to the product of the parents' sizes; None if a parent does not occur at these rows, or
        occurs twice.
    """
    copies = torch.zeros_like(occurrence.entries)
    row_count = int(occurrence.rows.max()) + 1 if len(occurrence.rows) else 0
    for parent in parents:
        parent_entries = torch.full((row_count,), -1)
        for o in all_occurrences:
            if o.axis == parent:
                in_range = o.rows < row_count
                if (parent_entries[o.rows[in_range]] >= 0).any():
                    return None
                parent_entries[o.rows[in_range]] = o.entries[in_range]
        if (parent_entries[occurrence.rows] < 0).any():
            return None
        copies = copies * sizes[parent] + parent_entries[occurrence.rows]
    return copies
