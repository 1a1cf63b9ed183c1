"""Which tensors share a line in a chart, so that a large network stays readable.

The tree of names is cut into *parts* until there are as many as a chart has room for. Repeated blocks in one part are
then laid on top of each other, so that what is shown of it are the *kinds* of tensors in it:

    blocks.0.mlp.weight, blocks.1.mlp.weight, ... blocks.11.mlp.weight      blocks.0-11.mlp.weight
"""

from __future__ import annotations

from collections.abc import Sequence

ROOM = 6  # lines in a chart, which TensorBoard draws in one colour
MANY = 128  # tensors with a line each
WHOLE = "all"  # the line of the whole network

Part = tuple[str, ...]


def parts_of(names: Sequence[str]) -> dict[str, Part]:
    """Cut the tree of names into at most `ROOM` parts.

    At every turn the parts with the most tensors are cut, all of that size or none. A part that holds more than half of
    the names and has too many children for a line each is cut into ranges.

    Args:
        names: Of the tensors, dotted, in order.

    Returns:
        Name of the part -> its tensors. A part of one tensor has the tensor's name.

    Example:
        >>> names = ["stem.weight", *(f"blocks.{k}.{name}" for k in range(9) for name in ("weight", "bias"))]
        >>> list(parts_of(names))
        ['stem.weight', 'blocks.0-1', 'blocks.2-3', 'blocks.4-5', 'blocks.6-7', 'blocks.8']
    """
    parts = [tuple(names)] if names else []
    while parts and (most := max(map(len, parts))) > 1:
        cut = [_children(part) if len(part) == most else [part] for part in parts]
        if sum(map(len, cut)) > ROOM and 2 * most > len(names):
            cut = [_ranges(children, ROOM - len(parts) + 1) for children in cut]
        if not len(parts) < sum(map(len, cut)) <= ROOM:
            break
        parts = [child for children in cut for child in children]
    return {_label(part, names): part for part in parts}


def lines_of(part: Part) -> dict[str, Part]:
    """What a part is shown as: its tensors or, if there are too many, what it or its kinds are cut into.

    Args:
        part: Names of its tensors.

    Returns:
        At most `ROOM` labels -> tensors.

    Example:
        >>> part = [f"blocks.{k}.{name}" for k in range(3) for name in ("mlp.weight", "mlp.bias", "norm.weight")]
        >>> list(lines_of(tuple(part)))
        ['blocks.0-2.mlp.weight', 'blocks.0-2.mlp.bias', 'blocks.0-2.norm.weight']
    """
    if len(part) <= ROOM:
        return {name: (name,) for name in part}
    kinds = kinds_of(part)
    return {
        label: tuple(name for kind in found for name in kinds[kind]) for label, found in parts_of(list(kinds)).items()
    }


def all_lines(names: Sequence[str]) -> dict[str, Part]:
    """Every line that is written: the network, its parts, what these are shown as, and the tensors.

    Args:
        names: Of the tensors. Of more than `MANY` there is no line for each, but for each kind in a part.

    Returns:
        Label -> tensors.
    """
    parts = parts_of(names)
    lines = {WHOLE: tuple(names), **parts}
    for part in parts.values():
        lines |= lines_of(part)
        lines |= kinds_of(part) if len(names) > MANY else {name: (name,) for name in part}
    return lines


def kinds_of(part: Part) -> dict[str, Part]:
    """Lay repeated blocks on top of each other: names that differ in the number behind their common prefix only.

    Args:
        part: Names of its tensors.

    Returns:
        Kind, with the range of numbers -> tensors.
    """
    depth, kinds = len(_prefix(part)), dict[tuple[str, ...], list[str]]()
    for name in part:
        words = name.split(".")
        words[depth] = "" if words[depth].isdigit() else words[depth]
        kinds.setdefault(tuple(words), []).append(name)
    labelled = {}
    for kind, found in kinds.items():
        numbers = [name.split(".")[depth] for name in found]
        span = numbers[0] if len(found) == 1 else f"{numbers[0]}-{numbers[-1]}"
        labelled[".".join((*kind[:depth], kind[depth] or span, *kind[depth + 1 :]))] = tuple(found)
    return labelled


def _children(part: Part) -> list[Part]:
    """What a part consists of, by the word behind the common prefix."""
    depth = len(_prefix(part))
    children: dict[str, list[str]] = {}
    for name in part:
        children.setdefault(name.split(".")[depth], []).append(name)
    return [tuple(child) for child in children.values()]


def _ranges(children: Sequence[Part], room: int) -> list[Part]:
    """Put neighbours together until there are at most `room`."""
    each = -(-len(children) // max(room, 1))
    ranges = [children[first : first + each] for first in range(0, len(children), each)]
    return [tuple(name for child in found for name in child) for found in ranges]


def _label(part: Part, names: Sequence[str]) -> str:
    """The common prefix and, where others share it, the first and the last of the children."""
    if len(part) == 1:
        return part[0]
    prefix = _prefix(part)
    words = [name.split(".")[len(prefix)] for name in part]
    others = sum(name.split(".")[: len(prefix)] == prefix for name in names) > len(part)
    return ".".join([*prefix, *([f"{words[0]}-{words[-1]}"] if others else [])]) or WHOLE


def _prefix(names: Sequence[str]) -> list[str]:
    """The words that all names begin with; at least one word is left of each."""
    split = [name.split(".")[:-1] for name in names]
    prefix = []
    for words in zip(*split, strict=False):
        if len(set(words)) > 1:
            break
        prefix.append(words[0])
    return prefix
