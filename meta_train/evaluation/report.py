"""Reports in Markdown and JSON.

`NAME.md` has the summary and a comparison of the main optimizers per task, `NAME_tasks.md` every task and optimizer.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from meta_train.evaluation.figures import Row, Summary
from meta_train.evaluation.interquartile import Estimate
from meta_train.evaluation.scores import MIN_LOSS_REDUCTION, MISS, PROFILE_END
from meta_train.evaluation.splits import Split


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *body]) + "\n"


def format_loss(value: float) -> str:
    """A loss, to four digits."""
    return f"{value:.4g}" if value < 1e4 else "diverged"  # noqa: PLR2004 - no loss of these tasks is that large


def mean_and_range(values: Sequence[float]) -> str:
    """Mean and range of losses."""
    return f"{format_loss(statistics.mean(values))} ({format_loss(min(values))} to {format_loss(max(values))})"


def median_reduction(values: Sequence[float]) -> str:
    """The median of step reductions; "never" for zero."""
    middle = statistics.median(values)
    return f"{middle:.2f}" if middle > 0 else "never"


def interval(e: Estimate) -> str:
    """An estimate with its interval."""
    return f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f})"


def score_table(summaries: Sequence[Summary]) -> str:
    """One line per optimizer: the scores of `meta_train.evaluation.scores`."""
    titles = list(summaries[0].against)
    head = (
        "optimizer",
        "targets missed",
        "geometric mean, steps",
        "geometric mean, loss",
        *(f"against {title}, {what}" for title in titles for what in ("steps", "loss")),
        "AlgoPerf's score, steps",
        "in wall-clock",
    )
    return table(
        head,
        [
            [
                s.optimizer,
                f"{100 * s.missed:.0f} %",
                *map(interval, (s.geometric_reduction, s.geometric_loss_reduction)),
                *(interval(e) for title in titles for e in s.against[title]),
                *(f"{score:.2f}" for score in (s.profile, s.wall_profile)),
            ]
            for s in summaries
        ],
    )


def summary_table(summaries: Sequence[Summary]) -> str:
    """One line per optimizer."""
    head = (
        "optimizer",
        "settings tried",
        "step reduction",
        "in wall-clock",
        "loss reduction",
        "loss as good",
        "held-out as good",
        "accuracy as good",
        "beats AdamW defaults",
        "diverged",
    )
    return table(
        head,
        [
            [
                s.optimizer,
                str(s.settings),
                interval(s.reduction),
                interval(s.wall_reduction),
                interval(s.loss_reduction),
                *(
                    "" if share is None else f"{100 * share:.0f} %"
                    for share in (s.as_good, s.generalises, s.accurate, s.beats_defaults)
                ),
                f"{s.diverged} of {s.runs}",
            ]
            for s in summaries
        ],
    )


def side_by_side(split: Split, rows: Sequence[Row], main: Sequence[str]) -> str:
    """One line per task: the reference, then final loss and step reduction of the main optimizers."""
    by = {(row.task, row.optimizer): row for row in rows}
    columns = list(next(iter(split.published.values()), {}))
    lines = []
    for task in split.tasks:
        reference = by[task.name, split.reference.name]
        line = [task.name, f"{format_loss(statistics.mean(reference.loss))} ({reference.setting})"]
        for name in main:
            row = by[task.name, name]
            line.append(f"{format_loss(statistics.mean(row.loss))} · {median_reduction(row.reduction)}")
        lines.append([*line, *(f"{split.published[task.name][column]:.2f}" for column in columns)])
    return table(["task", split.reference.name, *main, *(f"published: {column}" for column in columns)], lines)


def long_table(rows: Sequence[Row]) -> str:
    """One line per task and optimizer."""
    head = ("task", "optimizer", "setting", "loss", "held-out loss", "accuracy, %", "step reduction", "ms a step")
    lines = []
    for row in rows:
        accuracy = f"{100 * statistics.mean(row.accuracy):.1f}" if row.accuracy else ""
        reduction = f"{median_reduction(row.reduction)} ({min(row.reduction):.2f} to {max(row.reduction):.2f})"
        losses = (mean_and_range(row.loss), mean_and_range(row.held_out))
        seconds = f"{1e3 * row.seconds:.2f}"
        lines.append([row.task, row.optimizer, row.setting, *losses, accuracy, reduction, seconds])
    return table(head, lines)


def page(split: Split, rows: Sequence[Row], summaries: Sequence[Summary], main: Sequence[str], about: str) -> str:
    """The text of `NAME.md`.

    Args:
        split: The benchmark.
        rows: Of all tasks and optimizers.
        summaries: Of all optimizers.
        main: The optimizers to compare with the reference per task.
        about: A line on the versions, machine and seeds.
    """
    caption = (
        f"{about} *Step reduction*: steps of {split.reference.name} over the steps to {split.judge.target}; *loss "
        f"reduction*: {split.judge.loss} over the optimizer's own; interquartile means over {len(split.tasks)} tasks "
        f"of the median over seeds (95 % bootstrap interval over tasks and seeds). Tuned: the best setting on seed 0 "
        f"of each task.\n"
    )
    explained = (
        f"*Geometric means*: a missed target counts as {MISS}, a divergence as {MIN_LOSS_REDUCTION}; in interquartile "
        f"means both count as 0. *Against*: the reductions in terms of the baseline with the lowest loss on each task. "
        f"*AlgoPerf's score*: area under the performance profile up to {PROFILE_END:g} times the fastest; targets are "
        f"the lowest held-out losses of {split.reference.name}, misses are infinite.\n"
    )
    wide = side_by_side(split, rows, main)
    tables = [caption, summary_table(summaries), explained, score_table(summaries)]
    return "\n".join([*tables, "Loss, mean over seeds · step reduction, median:\n", wide])


def write(folder: Path, name: str, texts: Mapping[str, str], content: Mapping[str, Any]) -> None:
    """Write pages and `NAME.json`.

    Args:
        folder: Output folder.
        name: Of the report.
        texts: Pages by the name of their file, without its ending.
        content: Of the JSON file; infinite numbers become null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for title, text in texts.items():
        (folder / f"{title}.md").write_text(text, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")


def json_of(rows: Sequence[Row], summaries: Sequence[Summary]) -> dict[str, Any]:
    """Rows and summaries as JSON."""
    return {"summary": [asdict(summary) for summary in summaries], "rows": [asdict(row) for row in rows]}


def _finite(value: Any) -> Any:
    """Replace infinite numbers, which JSON lacks, by None."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
