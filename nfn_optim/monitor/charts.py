"""Charts and text: titles and meanings of the quantities, the layout of the charts, the rule and the symmetry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from nfn_optim import pretrained
from nfn_optim.monitor.grouping import WHOLE_NETWORK, Group, groups_of
from nfn_optim.monitor.sampling import MAX_ENTRIES
from nfn_optim.monitor.writer import ChartLayout
from nfn_optim.rule import UpdateRule
from nfn_optim.symmetry import Symmetry

QUANTITIES = {  # quantity in the tag -> title of its chart, meaning
    "update_over_weight": (
        "update / weight (RMS)",
        "how far one step moves the weights, in units of their size: 0.001 is usual, at 0.1 ten steps rebuild a layer",
    ),
    "gain": (
        "gain (1: as AdamW)",
        "factor of the update: the step size that the rule chooses, in units of `lr`; geometric mean",
    ),
    "cosine": (
        "cosine to AdamW's update",
        "1: the direction of AdamW's update from the same state with the same gradients; 0: orthogonal to it",
    ),
    "learned_over_nominal": (
        "learned / nominal (RMS)",
        "size of what the rule adds to Adam's direction, relative to that direction; 0: AdamW but for the gain",
    ),
    "gradient_norm": ("gradient norm", "of the gradient that the optimizer gets, after any clipping"),
    "first_moment_norm": ("norm of the first moment", "of the mean gradient of the last ten steps or so"),
    "second_moment_norm": (
        "norm of the root of the second moment",
        "of the gradients of the last thousand steps or so",
    ),
    "fallbacks": (
        "fallbacks",
        "learned updates that were out of range and were replaced by AdamW's; should stay 0",
    ),
}
PART_QUANTITIES = ("update_over_weight", "gain", "cosine", "learned_over_nominal", "gradient_norm", "first_moment_norm")
OTHER_CHARTS = {  # title of the chart -> quantities and last words of the tags, meaning
    "skipped steps": ({"steps": ["skipped"]}, "steps skipped because a gradient was not finite; should stay 0"),
    "learning rate": ({}, "`lr` of every parameter group, as set by schedulers"),
    "seconds": ({"seconds": ["training_step", "optimizer_step"]}, "per training step, and of that in the optimizer"),
    "optimizer's share of the time": ({"share_of_time": ["optimizer"]}, "of a training step"),
}
NEURON_GAIN = (
    "mean over the gains of a neuron's rows, as a power of two: +1 doubles the step; "
    "all near 0: the rule treats all neurons alike"
)


def tag(name: str, quantity: str, group: str) -> str:
    """The tag of a curve; TensorBoard groups charts by the words before the slash."""
    return f"{name}.{quantity}/{group}"


def layout_of(name: str, parts: Mapping[str, Group], param_groups: int) -> ChartLayout:
    """The layout of the Custom Scalars page.

    Args:
        name: Of the optimizer.
        parts: The parts of the network.
        param_groups: Number of parameter groups.
    """
    network = {title: _tags(name, quantity, parts) for quantity, (title, _) in QUANTITIES.items()}
    for title, (tags, _) in OTHER_CHARTS.items():
        network[title] = [found for quantity, words in tags.items() for found in _tags(name, quantity, words)]
    network["learning rate"] += _tags(name, "lr", [f"group{index}" for index in range(param_groups)])
    layout = {f"{name}: the network": network}
    for part, tensors in parts.items():
        if list(groups := groups_of(tensors)) != [part]:
            charts = {QUANTITIES[quantity][0]: _tags(name, quantity, groups) for quantity in PART_QUANTITIES}
            layout[f"{name}: {part}"] = charts
    return layout


def texts_of(rule: UpdateRule, symmetry: Symmetry | None, hparams: Mapping[str, object]) -> dict[str, str]:
    """The entries of the Text page.

    Args:
        rule: The rule.
        symmetry: The symmetry, if it is known.
        hparams: Hyperparameters of the optimizer.

    Returns:
        Title -> Markdown.
    """
    other_meanings = ((title, meaning) for title, (_, meaning) in OTHER_CHARTS.items())
    meanings = dict([*QUANTITIES.values(), *other_meanings])
    name = rule_name_of(rule)
    card = pretrained.card(name) if name in pretrained.names()[1:] else "This rule has no card."
    return {
        "1_how_to_read": "\n\n".join(
            [
                "**Custom Scalars** has the charts: first those of the network, with a curve for each of its parts; "
                "then a section for each part. Hover over a chart for the names of its curves. The charts of single "
                "tensors are under **Scalars**, final values under **HParams**.",
                _table("chart", "meaning", meanings),
                f"**Histograms** show the gain of every neuron: {NEURON_GAIN}. `log2_gain/fc.weight.h0` is for the "
                f"neurons of axis `h0`, which `fc.weight` shares with all tensors with `h0` in the symmetry below.",
                f"A curve of several tensors treats them as one long vector: `{WHOLE_NETWORK}` is the whole network, "
                f"`blocks.0-3.mlp` the tensors of `mlp` in blocks 0 to 3. Of a tensor with more than {MAX_ENTRIES} "
                f"entries a fixed random sample of that many is used, except for norms.",
            ]
        ),
        "2_rule": f"{_table('setting', 'value', {**hparams, **asdict(rule.config)})}\n\n{card}",
        "3_symmetry": "Which dimensions of which tensors are the same neurons; *free* axes may be permuted.\n\n"
        f"```\n{symmetry if symmetry is not None else 'unknown'}\n```",
    }


def rule_name_of(rule: UpdateRule) -> str:
    """The name of a rule inside the package, or "custom"."""
    if not rule.learned:
        return "adamw"
    sha256 = pretrained.digest(rule)
    return next((n for n in pretrained.names() if pretrained.digest(pretrained.load(n)) == sha256), "custom")


def _tags(name: str, quantity: str, groups: Iterable[str]) -> list[str]:
    """Regular expressions that match exactly the tags of some groups."""
    return [f"{re.escape(tag(name, quantity, group))}$" for group in groups]


def _table(first: str, second: str, rows: Mapping[str, object]) -> str:
    """A Markdown table of two columns."""
    lines = [f"| {first} | {second} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines)
