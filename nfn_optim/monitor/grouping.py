"""Groups of tensors that share a curve in a chart, so that the charts of a large network stay readable.

The tree of names is cut into *parts*, at most as many as a chart has curves. Repeated blocks in a part are then merged,
so that its curves are the *kinds* of tensors in it:

    blocks.0.mlp.weight, blocks.1.mlp.weight, ... blocks.11.mlp.weight      blocks.0-11.mlp.weight
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_CURVES = 6  # in a chart; TensorBoard draws all of them in one colour
MAX_SINGLE_TENSORS = 128  # in networks with a group for every single tensor
WHOLE_NETWORK = "all"  # the group of all tensors

Group = tuple[str, ...]
"""Names of the tensors in a group."""


def parts_of(names: Sequence[str]) -> dict[str, Group]:
    """Cut the tree of names into at most `MAX_CURVES` parts.

    Every round cuts the parts with the most tensors, all parts of that size or none. A part that holds more than half
    of the names and has too many children for a curve each is cut into ranges.

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
    while parts and (largest := max(map(len, parts))) > 1:
        cut = [_children(part) if len(part) == largest else [part] for part in parts]
        if sum(map(len, cut)) > MAX_CURVES and 2 * largest > len(names):
            cut = [_ranges(children, MAX_CURVES - len(parts) + 1) for children in cut]
        if not len(parts) < sum(map(len, cut)) <= MAX_CURVES:
            break
        parts = [child for children in cut for child in children]
    return {_label(part, names): part for part in parts}


def groups_of(part: Group) -> dict[str, Group]:
    """The groups shown in the charts of a part: single tensors or, if these are too many, parts or merged kinds of it.

    Args:
        part: Names of its tensors.

    Returns:
        At most `MAX_CURVES` labels -> tensors.

    Example:
        >>> part = [f"blocks.{k}.{name}" for k in range(3) for name in ("mlp.weight", "mlp.bias", "norm.weight")]
        >>> list(groups_of(tuple(part)))
        ['blocks.0-2.mlp.weight', 'blocks.0-2.mlp.bias', 'blocks.0-2.norm.weight']
    """
    if len(part) <= MAX_CURVES:
        return {name: (name,) for name in part}
    kinds = kinds_of(part)
    return {
        label: tuple(name for kind in found for name in kinds[kind]) for label, found in parts_of(list(kinds)).items()
    }


def all_groups(names: Sequence[str]) -> dict[str, Group]:
    """Every group that is written: the network, its parts, the groups of these, and the tensors.

    Args:
        names: Of the tensors. If there are more than `MAX_SINGLE_TENSORS`, the kinds in each part replace the tensors.

    Returns:
        Label -> tensors.
    """
    parts = parts_of(names)
    groups = {WHOLE_NETWORK: tuple(names), **parts}
    for part in parts.values():
        groups |= groups_of(part)
        groups |= kinds_of(part) if len(names) > MAX_SINGLE_TENSORS else {name: (name,) for name in part}
    return groups


def kinds_of(part: Group) -> dict[str, Group]:
    """Merge repeated blocks: names that differ only in the number behind their common prefix.

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


def _children(part: Group) -> list[Group]:
    """The children of a part, by the word behind the common prefix."""
    depth = len(_prefix(part))
    children: dict[str, list[str]] = {}
    for name in part:
        children.setdefault(name.split(".")[depth], []).append(name)
    return [tuple(child) for child in children.values()]


def _ranges(children: Sequence[Group], count: int) -> list[Group]:
    """Join adjacent children into at most `count` groups."""
    each = -(-len(children) // max(count, 1))
    ranges = [children[first : first + each] for first in range(0, len(children), each)]
    return [tuple(name for child in found for name in child) for found in ranges]


def _label(part: Group, names: Sequence[str]) -> str:
    """The common prefix and, if other names share it, the first and the last child."""
    if len(part) == 1:
        return part[0]
    prefix = _prefix(part)
    words = [name.split(".")[len(prefix)] for name in part]
    is_shared = sum(name.split(".")[: len(prefix)] == prefix for name in names) > len(part)
    return ".".join([*prefix, *([f"{words[0]}-{words[-1]}"] if is_shared else [])]) or WHOLE_NETWORK


def _prefix(names: Sequence[str]) -> list[str]:
    """The words that all names begin with; at least one word of each name is not part of it."""
    split = [name.split(".")[:-1] for name in names]
    prefix = []
    for words in zip(*split, strict=False):
        if len(set(words)) > 1:
            break
        prefix.append(words[0])
    return prefix
