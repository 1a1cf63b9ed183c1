"""The learning curve of a meta-training run, from its TensorBoard events to a small table and a plot.

    python -m meta_train train digits --out runs/digits --minutes 10 --tasks 2
    python benchmarks/meta_curve.py runs/digits --name digits

Writes `meta_curve_NAME.csv`, `.md` and `.png` to `benchmarks/results/`: over minutes of wall-clock time the objective
(mean over `ITERATIONS_PER_POINT` iterations) and the score on validation tasks, which are other members of the family
or other kinds: the mean of log(final loss / that of AdamW at the best of four learning rates); negative: better.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ITERATIONS_PER_POINT = 10  # of the objective
OBJECTIVE, SCORE, TASK_SCORE = "meta/objective", "validation/score", "validation_score/"


def main() -> None:
    """Read the events; write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--name", default="default_1")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    events = EventAccumulator(str(args.run), size_guidance={"scalars": 0})
    events.Reload()
    started = events.Scalars(SCORE)[0].wall_time  # before the first iteration

    def minutes(tag: str) -> np.ndarray:
        return np.array([(event.wall_time - started) / 60 for event in events.Scalars(tag)])

    def values(tag: str) -> np.ndarray:
        return np.array([event.value for event in events.Scalars(tag)])

    rows = [
        (event.step, minute, event.value) for event, minute in zip(events.Scalars(SCORE), minutes(SCORE), strict=True)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"meta_curve_{args.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["iteration", "minutes", SCORE])
        writer.writerows([step, f"{minute:.2f}", f"{score:.4f}"] for step, minute, score in rows)
    lines = ["| iteration | minutes | score on validation tasks | final loss over AdamW's |", "|---|---|---|---|"]
    lines += [f"| {step} | {minute:.1f} | {score:.3f} | {np.exp(score):.2f} |" for step, minute, score in rows]
    (args.out / f"meta_curve_{args.name}.md").write_text("\n".join(lines) + "\n")

    mpl.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), constrained_layout=True)
    whole = len(values(OBJECTIVE)) // ITERATIONS_PER_POINT * ITERATIONS_PER_POINT
    means = (
        column[:whole].reshape(-1, ITERATIONS_PER_POINT).mean(1) for column in (minutes(OBJECTIVE), values(OBJECTIVE))
    )
    left.plot(*means)
    left.set(title="objective, log of mean loss", xlabel="minutes")
    for tag in sorted(tag for tag in events.Tags()["scalars"] if tag.startswith(TASK_SCORE)):
        right.plot(minutes(tag), values(tag), alpha=0.5, label=tag.removeprefix(TASK_SCORE))
    right.plot(minutes(SCORE), values(SCORE), color="black", label="mean")
    right.axhline(0, color="grey", linestyle=":")
    right.set(title="log(final loss / that of AdamW, best of four)", xlabel="minutes")
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(args.out / f"meta_curve_{args.name}.png", dpi=100)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
