"""One dimension of a tensor, as an expression of axes.

    h                 an axis
    (c y x)           a product: the first factor varies slowest
    (head > dim)      a product whose second axis is *nested*: every head has a `dim` of its own
    (q + k)           a sum: the entries of q, then those of k

Expressions contain each other: `((head > dim) + x3)`. Whether an axis is nested is a property of the axis, wherever it
occurs; the `>` in front of a factor says that its axes are nested in the factor before it.
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
    """Factors, the first varying slowest."""

    factors: tuple[Expression, ...]


@dataclass(frozen=True)
class Sum:
    """Parts, one behind the other."""

    parts: tuple[Expression, ...]


Expression: TypeAlias = str | Product | Sum
Nested: TypeAlias = Mapping[str, tuple[str, ...]]
"""Axis -> the axes that it is nested in."""


@cache
def parse(text: str) -> tuple[Expression, Nested]:
    """Read one dimension.

    Returns:
        The expression, and what its `>` say: axis -> the axis before it.

    Raises:
        ValueError: The text is not a dimension.

    Example:
        >>> parse("(h > (d + e))")
        (Product(factors=('h', Sum(parts=('d', 'e')))), {'d': ('h',), 'e': ('h',)})
    """
    found = split(text)
    if len(found) != 1:
        raise ValueError(f"expected one dimension, {_EXPECTED}, found {text!r}")
    return found[0]


def split(text: str) -> list[tuple[Expression, Nested]]:
    """Read the dimensions of a tensor, `"out (c y x)"`; each as `parse` does."""
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != re.sub(r"\s", "", text):
        raise ValueError(f"expected dimensions, {_EXPECTED}, found {text!r}")
    tokens.reverse()  # the next one is the last
    found: list[tuple[Expression, Nested]] = []
    while tokens:
        nested: dict[str, tuple[str, ...]] = {}
        found.append((_read(tokens, nested, text), nested))
    return found


_EXPECTED = "an axis name such as 'h0', a product such as '(c y x)' or '(head > dim)' or a sum such as '(q + k)'"


def _read(tokens: list[str], nested: dict[str, tuple[str, ...]], text: str) -> Expression:
    """Take one expression off the end of the reversed tokens."""
    token = tokens.pop()
    if token not in "()+>":
        return token
    items: list[Expression] = []
    signs: list[str] = []
    while token == "(" and tokens and tokens[-1] != ")":
        if items:
            sign = tokens.pop() if tokens[-1] in "+>" else " "
            if not tokens or (signs and (sign == "+") != (signs[-1] == "+")):
                break
            signs.append(sign)
        items.append(_read(tokens, nested, text))
        if signs and signs[-1] == ">":
            before = items[-2]
            for axis in axes_of(items[-1]):
                nested[axis] = (*nested.get(axis, ()), *((before,) if isinstance(before, str) else ()))
    if token != "(" or not items or not tokens or tokens.pop() != ")":
        raise ValueError(f"expected dimensions, {_EXPECTED}, found {text!r}")
    return sum_of(items) if "+" in signs else product_of(items)


def product_of(factors: Iterable[Expression]) -> Expression:
    """The product, products within it written out."""
    flat = [f for factor in factors for f in (factor.factors if isinstance(factor, Product) else (factor,))]
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def sum_of(parts: Iterable[Expression]) -> Expression:
    """The sum, sums within it written out."""
    flat = [p for part in parts for p in (part.parts if isinstance(part, Sum) else (part,))]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def write(expression: Expression, nested: Nested) -> str:
    """The text of an expression; the inverse of `parse`."""
    if isinstance(expression, str):
        return expression
    if isinstance(expression, Sum):
        return f"({' + '.join(write(part, nested) for part in expression.parts)})"
    text = ""
    for before, factor in zip((None, *expression.factors), expression.factors, strict=False):
        inside = before is not None and all(before in nested.get(axis, ()) for axis in axes_of(factor))
        text += (" > " if inside else " " if text else "") + write(factor, nested)
    return f"({text})"


def axes_of(expression: Expression) -> Iterator[str]:
    """The axes as often as they occur, in order."""
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


def rename(expression: Expression, name: Callable[[str], str]) -> Expression:
    """The same expression of other axes."""
    if isinstance(expression, str):
        return name(expression)
    if isinstance(expression, Product):
        return Product(tuple(rename(factor, name) for factor in expression.factors))
    return Sum(tuple(rename(part, name) for part in expression.parts))


def length_of(expression: Expression, sizes: Mapping[str, int]) -> int:
    """The number of entries."""
    if isinstance(expression, str):
        return sizes[expression]
    if isinstance(expression, Product):
        return math.prod(length_of(factor, sizes) for factor in expression.factors)
    return sum(length_of(part, sizes) for part in expression.parts)


@dataclass(frozen=True)
class Occurrence:
    """Where an axis occurs in a dimension.

    Attributes:
        axis: Its name.
        rows: Which entries of the dimension belong to it, `(count,)`, int64.
        entries: Which entry of the axis each of them is, `(count,)`.
        stride: How far apart two neighbours of the axis are.
    """

    axis: str
    rows: Tensor
    entries: Tensor
    stride: int


def occurrences_of(expression: Expression, sizes: Mapping[str, int]) -> list[Occurrence]:
    """All axes of a dimension, in order.

    Example:
        >>> expression, _ = parse("(a + b)")
        >>> [(o.axis, o.rows.tolist(), o.entries.tolist()) for o in occurrences_of(expression, {"a": 1, "b": 2})]
        [('a', [0], [0]), ('b', [1, 2], [0, 1])]
    """
    if isinstance(expression, str):
        span = torch.arange(sizes[expression])
        return [Occurrence(expression, span, span, 1)]
    found = []
    if isinstance(expression, Sum):
        start = 0
        for part in expression.parts:
            for o in occurrences_of(part, sizes):
                found.append(Occurrence(o.axis, o.rows + start, o.entries, o.stride))
            start += length_of(part, sizes)
        return found
    outer, inner = 1, length_of(expression, sizes)
    for factor in expression.factors:
        length = length_of(factor, sizes)
        inner //= max(length, 1)
        above, below = torch.arange(outer)[:, None, None], torch.arange(inner)
        for o in occurrences_of(factor, sizes):
            rows = (above * length + o.rows[:, None]) * inner + below  # (outer, count, inner)
            entries = o.entries[:, None].expand(rows.shape)
            found.append(Occurrence(o.axis, rows.reshape(-1), entries.reshape(-1), o.stride * inner))
        outer *= length
    return found


def entries_within(
    occurrence: Occurrence, all_occurrences: Iterable[Occurrence], parents: Iterable[str], sizes: Mapping[str, int]
) -> Tensor | None:
    """Number the copies of a nested axis: which of its parents' entries every row belongs to.

    Returns:
        `(count,)`, from 0 to the product of the parents' sizes; None if a parent does not occur there, or twice.
    """
    total = torch.zeros_like(occurrence.entries)
    for parent in parents:
        top = int(occurrence.rows.max()) + 1 if len(occurrence.rows) else 0
        here = torch.full((top,), -1)
        for o in all_occurrences:
            if o.axis == parent:
                known = o.rows < top
                if (here[o.rows[known]] >= 0).any():
                    return None
                here[o.rows[known]] = o.entries[known]
        if (here[occurrence.rows] < 0).any():
            return None
        total = total * sizes[parent] + here[occurrence.rows]
    return total
