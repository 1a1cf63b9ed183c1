"""Plots: the loss curves of every task, and the performance profile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from meta_train.evaluation.curve import running_mean
from meta_train.evaluation.figures import Row
from meta_train.evaluation.study import Result

POINTS = 400  # per curve
COLOURS = [f"C{i}" for i in range(10)] + ["black", "gold", "navy", "lime", "indigo", "peru"]


def curves(results: Sequence[Result], path: Path) -> None:
    """Training loss over steps: one panel per task, mean and range over seeds per optimizer.

    Args:
        results: Of all tasks and optimizers.
        path: Of the plot.
    """
    import matplotlib as mpl  # noqa: PLC0415 - an extra, slow to import

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    tasks = list(dict.fromkeys(result.task.name for result in results))
    columns = min(4, len(tasks))
    size = math.ceil(len(tasks) / columns)
    figure = plt.figure(figsize=(4 * columns, 3 * size + 0.6), layout="constrained")
    axes = figure.subplots(size, columns, squeeze=False)
    colours = dict(zip(dict.fromkeys(result.contender.name for result in results), cycle(COLOURS), strict=False))
    for axis, task in zip(axes.flat, tasks, strict=False):
        for result in (result for result in results if result.task.name == task):
            lines = np.array([running_mean(run.losses) for run in result.runs])  # (seeds, steps)
            at = np.unique(np.linspace(0, lines.shape[1] - 1, POINTS).astype(int))
            lines = np.where(np.isfinite(lines), lines, np.nan)[:, at]
            style = {"color": colours[result.contender.name]}
            axis.plot(at + 1, lines.mean(0), label=result.contender.name, linewidth=1, **style)
            axis.fill_between(at + 1, lines.min(0), lines.max(0), alpha=0.15, **style)
        firsts = [run.losses[0] for result in results if result.task.name == task for run in result.runs]
        axis.set(title=task, yscale="log")
        axis.set_ylim(top=1.3 * max(filter(math.isfinite, firsts), default=1.0))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(tasks) :]:
        axis.axis("off")
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("training loss, running mean", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def profile(rows: Sequence[Row], path: Path) -> None:
    """Performance profile: the fraction of runs with at least a given step reduction.

    Args:
        rows: Of all tasks and optimizers.
        path: Of the plot.
    """
    import matplotlib as mpl  # noqa: PLC0415 - an extra, slow to import

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    levels = np.geomspace(0.5, 4.0, 200)
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, colour in zip(dict.fromkeys(row.optimizer for row in rows), cycle(COLOURS), strict=False):
        reductions = np.array([value for row in rows if row.optimizer == name for value in row.reduction])
        axis.plot(levels, (reductions[:, None] >= levels).mean(0), label=name, color=colour)
    axis.set(xscale="log", xlabel="step reduction of at least", ylabel="fraction of runs", ylim=(0, 1.02))
    axis.set_xticks([0.5, 0.7, 1, 1.5, 2, 3, 4], ["0.5", "0.7", "1", "1.5", "2", "3", "4"], minor=False)
    axis.minorticks_off()
    axis.axvline(1, color="gray", linewidth=0.8)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)
