"""A run in TensorBoard.

meta            objective, norm and signal-to-noise ratio of the meta-gradient, share of estimates dropped, ...
objective       by family of tasks
validation      score, and by task: score, speed, size of the learned part
curves          pictures of the validation tasks' losses beside AdamW's
theta           histograms of the averaged theta
hparams         the configuration with the final scores
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meta_train.validation import Comparison, score_of
from nfn_optim.rule import UpdateRule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

META = {
    "objective": ["^meta/objective$"],
    "norm of the meta-gradient": ["^meta/gradient_norm$"],
    "signal to noise": ["^meta/signal_to_noise$"],
    "share dropped": ["^meta/dropped$"],
    "inner runs restarted": ["^meta/restarted$"],
    "learning rate": ["^meta/learning_rate$"],
}
SECTIONS = {  # title -> what its tags begin with; every tag has a chart, since lines of one run have one colour
    "objective by family": "objective/",
    "validation: log(final loss / AdamW's)": "validation_score/",
    "validation: speed, in AdamW's": "validation_speed/",
    "validation: learned over nominal": "learned_over_nominal/",
}


def layout_of(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """The charts of Custom Scalars, by section, for the tags that there are."""
    tags = sorted(tags)
    layout = {"meta-training": META | ({"validation": ["^validation/score$"]} if "validation/score" in tags else {})}
    for title, start in SECTIONS.items():
        if found := [tag for tag in tags if tag.startswith(start)]:
            layout[title] = {tag.removeprefix(start): [f"^{re.escape(tag)}$"] for tag in found}
    return {title: {name: ["Multiline", of] for name, of in charts.items()} for title, charts in layout.items()}


class Summary:
    """Writes what a run reports.

    Args:
        folder: Of the run.
        iteration: Iterations done; what an earlier process wrote of later ones is hidden.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import

        self._writer = SummaryWriter(str(folder), purge_step=iteration + 1)
        self._tags: set[str] = set()

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Numbers by tag; where there are new tags they get charts."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, iteration)
        if not values.keys() <= self._tags:
            self._tags |= values.keys()
            self._writer.add_custom_scalars(layout_of(self._tags))

    def validation(self, rule: UpdateRule, found: Sequence[Comparison], iteration: int) -> None:
        """How the rule does on the validation tasks, and its theta."""
        numbers = {"validation/score": score_of(found)}
        for c in found:
            numbers |= {
                f"validation_score/{c.name}": c.score,
                f"validation_speed/{c.name}": c.speed,
                f"learned_over_nominal/{c.name}": c.learned_over_nominal,
            }
        self.scalars(numbers, iteration)
        self._writer.add_figure("curves", figure_of(found), iteration)
        for name, p in rule.named_parameters():
            self._writer.add_histogram(f"theta/{name}", p, iteration)

    def hparams(self, config: object, scores: Mapping[str, float]) -> None:
        """The configuration, as far as it is plain, with what came of it."""
        plain = {f.name: getattr(config, f.name) for f in fields(config)}  # type: ignore[arg-type]
        shown = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in plain.items()}
        self._writer.add_hparams(shown, dict(scores), run_name="hparams")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def figure_of(found: Sequence[Comparison]) -> Figure:
    """Loss over steps of every validation task: AdamW, the rule not told the horizon, and told."""
    from matplotlib.figure import Figure as Made  # noqa: PLC0415 - an extra, slow to import

    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure = Made(figsize=(4 * columns, 3 * rows), constrained_layout=True)
    axes: Any = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(found) :]:
        axis.remove()
    for axis, c in zip(axes, found, strict=False):
        for label, curve in (("AdamW, best of four", c.adamw), ("rule", c.untold), ("rule, told horizon", c.told)):
            width = max(len(curve) // 20, 1)
            axis.plot(range(width, len(curve) + 1), curve.unfold(0, width, 1).mean(1), label=label)
        axis.set(title=c.name, xlabel="step", yscale="log")
    axes[0].set_ylabel("loss, nats")
    axes[0].legend(fontsize=7)
    return figure
