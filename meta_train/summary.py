"""A run in TensorBoard.

meta            objective, norm and signal-to-noise ratio of the meta-gradient, fraction of estimates dropped, ...
objective       by family of tasks
validation      score, and by task: score, speed, norm of the learned part
curves          figures of the losses on validation tasks, with AdamW's
theta           histograms of the exported theta
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
    "signal-to-noise ratio": ["^meta/signal_to_noise$"],
    "fraction dropped": ["^meta/dropped$"],
    "inner runs restarted": ["^meta/restarted$"],
    "learning rate": ["^meta/learning_rate$"],
}
SECTIONS = {  # title -> prefix of its tags; one chart per tag, since all curves of a run have the same colour
    "objective by family": "objective/",
    "validation: log(final loss / AdamW's)": "validation_score/",
    "validation: speed, in AdamW's": "validation_speed/",
    "validation: learned over nominal": "learned_over_nominal/",
}


def layout_of(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """The charts of Custom Scalars for these tags, by section."""
    tags = sorted(tags)
    layout = {"meta-training": META | ({"validation": ["^validation/score$"]} if "validation/score" in tags else {})}
    for title, prefix in SECTIONS.items():
        if matches := [tag for tag in tags if tag.startswith(prefix)]:
            layout[title] = {tag.removeprefix(prefix): [f"^{re.escape(tag)}$"] for tag in matches}
    return {
        title: {name: ["Multiline", patterns] for name, patterns in charts.items()} for title, charts in layout.items()
    }


class Summary:
    """Writes the events of a run.

    Args:
        folder: The run's folder.
        iteration: Iterations so far; events of later ones, written before a resume, are purged.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import

        self._writer = SummaryWriter(str(folder), purge_step=iteration + 1)
        self._tags: set[str] = set()

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Write scalars by tag; new tags get charts."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, iteration)
        if not values.keys() <= self._tags:
            self._tags |= values.keys()
            self._writer.add_custom_scalars(layout_of(self._tags))

    def validation(self, rule: UpdateRule, comparisons: Sequence[Comparison], iteration: int) -> None:
        """Write the comparisons on validation tasks, and histograms of theta."""
        values = {"validation/score": score_of(comparisons)}
        for c in comparisons:
            values |= {
                f"validation_score/{c.name}": c.score,
                f"validation_speed/{c.name}": c.speed,
                f"learned_over_nominal/{c.name}": c.learned_over_nominal,
            }
        self.scalars(values, iteration)
        self._writer.add_figure("curves", figure_of(comparisons), iteration)
        for name, p in rule.named_parameters():
            self._writer.add_histogram(f"theta/{name}", p, iteration)

    def hparams(self, config: object, scores: Mapping[str, float]) -> None:
        """Write the configuration with the final scores."""
        values = {f.name: getattr(config, f.name) for f in fields(config)}  # type: ignore[arg-type]
        hparams = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in values.items()}
        self._writer.add_hparams(hparams, dict(scores), run_name="hparams")

    def close(self) -> None:
        """Flush and close the writer."""
        self._writer.close()


def figure_of(comparisons: Sequence[Comparison]) -> Figure:
    """Loss over steps of every validation task: AdamW, and the rule with the horizon unknown and known."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, slow to import

    columns = min(len(comparisons), 3)
    rows = -(-len(comparisons) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), constrained_layout=True)
    axes: Any = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(comparisons) :]:
        axis.remove()
    for axis, c in zip(axes, comparisons, strict=False):
        for label, curve in (
            ("AdamW, best of four", c.adamw),
            ("rule, horizon unknown", c.horizon_unknown),
            ("rule, horizon known", c.horizon_known),
        ):
            width = max(len(curve) // 20, 1)
            axis.plot(range(width, len(curve) + 1), curve.unfold(0, width, 1).mean(1), label=label)
        axis.set(title=c.name, xlabel="step", yscale="log")
    axes[0].set_ylabel("loss, nats")
    axes[0].legend(fontsize=7)
    return figure
