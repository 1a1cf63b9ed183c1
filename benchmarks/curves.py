"""The figure of the README: training curves on four of the test tasks.

    python benchmarks/curves.py --data FOLDER

AdamW at its defaults, AdamW with the settings that `benchmarks/results/test_default_1.json` chose for each task, and
NFNOptimizer as it ships, with and without `total_steps`. The tasks are of four kinds; the SIREN is the one on which
NFNOptimizer loses either way. Writes `curves.json` (running means of the training loss, `POINTS` of each) and
`curves.png` into `benchmarks/results`; with `--draw` only the picture, from the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from meta_train.evaluation.curve import running_mean
from meta_train.evaluation.optimizers import contenders_of
from meta_train.evaluation.splits import SPLITS
from meta_train.evaluation.study import Study

RESULTS = Path(__file__).parent / "results"
TASKS = ("CIFAR 16x16, ViT", "sympy text, GRU", "CIFAR 16x16, MLP 768-512-256-10", "photograph, SIREN")
NAMES = ("AdamW, tuned for each task", "AdamW, defaults", "NFNOptimizer", "NFNOptimizer, total_steps")
COLOURS = dict(zip(NAMES, ("#d95f02", "#b8b8b8", "#74add1", "#1f4e9c"), strict=True))
POINTS = 200  # of a curve
WIDE = 10.0  # ratio of losses above which ticks are 1, 2 and 5 times powers of ten


def measured(data: Path, cache: Path, seeds: int, workers: int) -> dict[str, Any]:
    """Train, as far as the runs are not in the cache; running means by task and optimizer, `(seeds, POINTS)`."""
    split = SPLITS["test"]
    contenders = (*split.baselines(thorough=False), *contenders_of("default", "default", thorough=False))
    names = dict(zip((contender.name for contender in contenders), NAMES, strict=True))
    rows = json.loads((RESULTS / "test_default_1.json").read_text())["rows"]
    selected = {(r["task"], r["optimizer"]): r["setting"] for r in rows if r["optimizer"] == split.reference.name}
    tasks = [task for task in split.tasks if task.name in TASKS]
    results = Study(tasks, contenders, seeds, data, cache, selected=selected).run(workers)
    panels: dict[str, dict[str, Any]] = {name: {} for name in TASKS}
    for result in results:
        means = np.array([running_mean(run.losses) for run in result.runs])  # (seeds, steps)
        at = np.unique(np.linspace(0, means.shape[1] - 1, POINTS).astype(int))
        lines = [[float(f"{value:.4g}") for value in line] for line in means[:, at]]
        panels[result.task.name] |= {"steps": (at + 1).tolist(), names[result.contender.name]: lines}
    return {"torch": torch.__version__, "seeds": seeds, "tasks": panels}


def draw(content: dict[str, Any], path: Path) -> None:
    """A panel for every task: mean and range over seeds."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415 - after the choice of where to draw
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter  # noqa: PLC0415

    figure, axes = plt.subplots(2, 2, figsize=(8.3, 5.2), layout="constrained")
    for axis, (task, panel) in zip(axes.flat, content["tasks"].items(), strict=True):
        lines = {name: np.array(panel[name]) for name in NAMES}
        for name, values in lines.items():
            axis.plot(panel["steps"], values.mean(0), color=COLOURS[name], linewidth=1.8, label=name)
            axis.fill_between(panel["steps"], values.min(0), values.max(0), color=COLOURS[name], alpha=0.2, linewidth=0)
        axis.set(yscale="log", xlim=(0, panel["steps"][-1]))
        axis.set_title(task, fontsize=10)
        low, high = axis.get_ylim()
        wide = high > WIDE * low
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if wide else MaxNLocator(6))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("training loss", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    """Measure and draw, or draw only."""
    parser = argparse.ArgumentParser(description="the figure of the README")
    parser.add_argument("--data", type=Path, help="folder with fashion_mnist.npz and cifar10.npz")
    parser.add_argument("--cache", type=Path, default=Path("runs/evaluation"), help="finished runs are kept here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--draw", action="store_true", help="draw only, from curves.json")
    given = parser.parse_args()
    path = RESULTS / "curves.json"
    if not given.draw:
        if given.data is None:
            parser.error("expected --data FOLDER, or --draw to draw curves.json again")
        content = measured(given.data, given.cache, given.seeds, given.workers)
        path.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    draw(json.loads(path.read_text()), RESULTS / "curves.png")


if __name__ == "__main__":
    main()
