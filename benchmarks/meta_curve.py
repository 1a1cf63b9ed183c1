"""Keep the curve of a meta-training run: from its TensorBoard events to a small table and a picture.

    python benchmarks/meta_curve.py runs/digits --name default

Writes `meta_curve_NAME.csv` (means over `EVERY` iterations) and `.png` to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EVERY = 10  # iterations in a row of the table
TAGS = ("meta/objective", "meta/gradient_norm", "meta/dropped", "meta/restarted")


def main() -> None:
    """Read, average, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--name", default="default")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    events = EventAccumulator(str(given.run), size_guidance={"scalars": 0})
    events.Reload()
    steps = np.array([event.step for event in events.Scalars(TAGS[0])])
    columns = {tag: np.array([event.value for event in events.Scalars(tag)]) for tag in TAGS}
    rows = len(steps) // EVERY
    means = {tag: values[: rows * EVERY].reshape(rows, EVERY).mean(1) for tag, values in columns.items()}
    last = steps[: rows * EVERY].reshape(rows, EVERY)[:, -1]
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / f"meta_curve_{given.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["iteration", *TAGS])
        writer.writerows([step, *(f"{means[tag][i]:.5g}" for tag in TAGS)] for i, step in enumerate(last))
    mpl.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), constrained_layout=True)
    for axis, tag in zip(axes, TAGS, strict=False):
        axis.plot(last, means[tag])
        axis.set(title=tag, xlabel="iteration")
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    figure.savefig(given.out / f"meta_curve_{given.name}.png", dpi=100)


if __name__ == "__main__":
    main()
