"""What the pages show: how charts are laid out, how to read them, which rule and which symmetry are at work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from nfn_optim import pretrained
from nfn_optim.monitor.grouping import WHOLE, Part, lines_of
from nfn_optim.monitor.sampling import MOST
from nfn_optim.monitor.writer import Layout
from nfn_optim.rule import UpdateRule
from nfn_optim.symmetry import Symmetry

QUANTITIES = {  # word in the tag -> title of its chart, what that shows
    "update_over_weight": (
        "update / weight (RMS)",
        "how far one step moves the weights, in units of their size: 0.001 is usual, at 0.1 ten steps rebuild a layer",
    ),
    "gain": (
        "gain (1: as AdamW)",
        "what the rule multiplies a direction by: the step size that it chooses, in units of `lr`; geometric mean",
    ),
    "cosine": (
        "cosine to AdamW's update",
        "1: the direction that AdamW would take from here with the same gradients; 0: at a right angle to it",
    ),
    "learned_over_nominal": (
        "learned / nominal (RMS)",
        "how large what the rule adds to Adam's direction is beside that direction; 0: AdamW but for the gain",
    ),
    "gradient_norm": ("gradient norm", "of the gradient that the optimizer gets, after any clipping"),
    "first_moment_norm": ("norm of the first moment", "of the mean gradient of the last ten steps or so"),
    "second_moment_norm": (
        "norm of the root of the second moment",
        "of the gradients of the last thousand steps or so",
    ),
    "fallbacks": (
        "fallbacks",
        "learned updates that were out of range, in place of which a tensor got AdamW's; should stay 0",
    ),
}
IN_A_PART = ("update_over_weight", "gain", "cosine", "learned_over_nominal", "gradient_norm", "first_moment_norm")
OTHERS = {  # title of the chart -> words and lines of the tags, what it shows
    "skipped steps": ({"steps": ["skipped"]}, "steps not taken because a gradient was not finite; should stay 0"),
    "learning rate": ({}, "`lr` of every group of parameters, as schedulers set it"),
    "seconds": ({"seconds": ["training_step", "optimizer_step"]}, "of a whole step of training, and of the optimizer"),
    "optimizer's share of the time": ({"share_of_time": ["optimizer"]}, "in a step of training"),
}
NEURONS = (
    "what the gains of all weights of a neuron have in common, as a power of two: +1 is a step twice as long; "
    "all near 0: the rule tells no neuron from another"
)


def tag(name: str, word: str, line: str) -> str:
    """The tag of a line: charts are grouped by what stands before the slash."""
    return f"{name}.{word}/{line}"


def layout_of(name: str, parts: Mapping[str, Part], groups: int) -> Layout:
    """Lay out the page of custom scalars.

    Args:
        name: Of the optimizer.
        parts: The parts of the network.
        groups: Number of groups of parameters.
    """
    network = {title: _tags(name, word, parts) for word, (title, _) in QUANTITIES.items()}
    for title, (tags, _) in OTHERS.items():
        network[title] = [found for word, lines in tags.items() for found in _tags(name, word, lines)]
    network["learning rate"] += _tags(name, "lr", [f"group{number}" for number in range(groups)])
    layout = {f"{name}: the network": network}
    for part, tensors in parts.items():
        if list(lines := lines_of(tensors)) != [part]:
            layout[f"{name}: {part}"] = {QUANTITIES[word][0]: _tags(name, word, lines) for word in IN_A_PART}
    return layout


def texts_of(rule: UpdateRule, symmetry: Symmetry | None, facts: Mapping[str, object]) -> dict[str, str]:
    """The pages of text.

    Args:
        rule: The rule.
        symmetry: The symmetry, if it is known.
        facts: What else is to be said of the optimizer.

    Returns:
        Title -> Markdown.
    """
    meanings = dict([*QUANTITIES.values(), *((title, meaning) for title, (_, meaning) in OTHERS.items())])
    name = name_of(rule)
    card = pretrained.card(name) if name in pretrained.names()[1:] else "This rule has no card."
    return {
        "1_how_to_read": "\n\n".join(
            [
                "**Custom Scalars** has the charts: in its first section those of the network, with a line for each of "
                "its parts; below it a section for each part. Point at a chart for the names of its lines. The charts "
                "of single tensors are under **Scalars**, final values under **HParams**.",
                _table("chart", "what it shows", meanings),
                f"**Histograms** have the gain by neuron: {NEURONS}. `log2_gain/fc.weight.h0` is about the neurons of "
                f"axis `h0`, which `fc.weight` and all tensors with `h0` in the symmetry below have in common.",
                f"A line over several tensors treats them as one long vector: `{WHOLE}` is the whole network, "
                f"`blocks.0-3.mlp` the tensors of `mlp` in blocks 0 to 3. In a tensor of more than {MOST} entries as "
                f"many of them, chosen at random once, are looked at, except for norms.",
            ]
        ),
        "2_rule": f"{_table('setting', 'value', {**facts, **asdict(rule.config)})}\n\n{card}",
        "3_symmetry": "Which dimensions of which tensors are the same neurons; *free* axes may be permuted.\n\n"
        f"```\n{symmetry if symmetry is not None else 'not known'}\n```",
    }


def name_of(rule: UpdateRule) -> str:
    """What a rule is called inside the package, or "custom"."""
    if not rule.learns:
        return "adamw"
    sha256 = pretrained.digest(rule)
    return next((n for n in pretrained.names() if pretrained.digest(pretrained.load(n)) == sha256), "custom")


def _tags(name: str, word: str, lines: Iterable[str]) -> list[str]:
    """Regular expressions that match exactly the tags of some lines."""
    return [f"{re.escape(tag(name, word, line))}$" for line in lines]


def _table(first: str, second: str, rows: Mapping[str, object]) -> str:
    """A table of two columns in Markdown."""
    lines = [f"| {first} | {second} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines)
