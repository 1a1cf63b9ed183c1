"""The statistics of an evaluation, on examples with known results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from meta_train.evaluation import plots, report, tiny
from meta_train.evaluation.cache import Run
from meta_train.evaluation.curve import diverged, running_mean, step_reduction, step_reduction_to_best
from meta_train.evaluation.figures import rows_of, summaries_of
from meta_train.evaluation.interquartile import estimate, interquartile_mean
from meta_train.evaluation.optimizers import DEFAULTS, MUONS, Contender, Setting, adamw
from meta_train.evaluation.rivals import sgd
from meta_train.evaluation.scores import geometric_mean, held_out_target, profile_scores, steps_to, strongest
from meta_train.evaluation.splits import Split
from meta_train.evaluation.study import Result
from meta_train.evaluation.task import Task

ROOT = Path(__file__).parent.parent
INF = math.inf


# -------------------------------------------------------------------------------------------------------- curves


def test_the_running_mean_is_that_of_the_last_batches() -> None:
    losses = np.random.default_rng(0).random(2000).tolist()
    means = running_mean(losses)
    for step in (1, 7, 60, 61, 2000):
        assert means[step - 1] == pytest.approx(np.mean(losses[max(0, step - 60) : step]))  # 60 is 3 % of 2,000


@pytest.mark.parametrize(
    ("curve", "reference", "expected"),
    [
        ([10.0] * 20 + [1.0] * 180, [10.0] * 100 + [1.0] * 100, 200 / 50),  # 30 batches of 1 after the first 20
        ([10.0] * 100 + [1.0] * 100, [0.5] * 200, 0.0),
        ([3.0] * 100, [3.0] * 100, 100.0),  # reached at the first step
        ([1.0] * 50 + [INF] * 50, [1.0] * 100, 100.0),
        ([INF] * 100, [1.0] * 100, 0.0),
        ([5.0] * 99 + [1.0], [2.0] * 99 + [INF], 100.0),  # of a reference that broke off
    ],
)
def test_step_reductions(curve: list[float], reference: list[float], expected: float) -> None:
    assert step_reduction(curve, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([(10, 3.0), (20, 1.0), (30, 0.5)], 40 / 20),
        ([(10, 3.0), (20, 1.1), (30, 1.1)], 0.0),
        ([(50, 0.9)], 40 / 50),
    ],
)
def test_step_reductions_to_the_best_held_out_loss(scores: list[tuple[int, float]], expected: float) -> None:
    reference = [(20, 2.0), (40, 1.0), (60, 1.5), (80, 1.0)]
    assert step_reduction_to_best(scores, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([1.0] * 100, False),
        ([1.0] * 50 + [1.9] * 50, False),
        ([1.0] * 50 + [2.1] * 50, True),
        ([1.0] * 99 + [INF], True),
        ([1.0] * 99 + [math.nan], True),
        ([1.0, 500.0] + [0.1] * 98, False),  # an early peak is not divergence
    ],
)
def test_divergence(curve: list[float], expected: bool) -> None:
    assert diverged(curve) is expected


# ------------------------------------------------------------------------------------------- interquartile means


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 22])
def test_the_interquartile_mean_is_the_trimmed_mean(n: int) -> None:
    from scipy.stats import trim_mean

    values = np.random.default_rng(n).normal(size=(5, n))
    assert interquartile_mean(values) == pytest.approx(trim_mean(values, 0.25, axis=1))


def test_outliers_do_not_change_the_interquartile_mean() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert interquartile_mean(values) == 4.5
    assert interquartile_mean(np.where(values == 8, 1e9, values)) == 4.5


def test_the_interval_of_two_tasks_is_known() -> None:
    assert estimate(np.array([[0.0], [1.0]])) == (
        0.5,
        0.0,
        1.0,
    )  # resampled means: 0, 1/2 and 1 with probability 1/4, 1/2 and 1/4


def test_the_interval_has_the_theoretical_width() -> None:
    scores = np.random.default_rng(1).uniform(size=(400, 1))
    found = estimate(scores)
    middle = np.sort(scores[:, 0])[100:300]
    winsorised = np.concatenate([np.full(100, middle[0]), middle, np.full(100, middle[-1])])
    error = winsorised.std() / (0.5 * math.sqrt(400))  # of a trimmed mean
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.low < found.value < found.high


def test_more_seeds_narrow_the_interval_and_equal_scores_close_it() -> None:
    noise = np.random.default_rng(0).normal(size=(12, 9))
    few, many = (estimate(noise[:, :n]) for n in (1, 9))
    assert many.high - many.low < few.high - few.low
    assert estimate(np.full((5, 3), 1.7)) == pytest.approx((1.7, 1.7, 1.7))


# -------------------------------------------------------------------------------------------------------- scores


def test_geometric_means_count_misses_as_the_floor() -> None:
    assert geometric_mean(np.array([2.0, 8.0]), 0.25) == pytest.approx(4)
    assert geometric_mean(np.array([[4.0, 0.0], [0.0, 0.0], [1.0, 0.1]]), 0.25) == pytest.approx([1, 0.25, 0.5])
    found = estimate(np.array([[1.0], [4.0]]), lambda x: geometric_mean(x, 0.25))
    assert found == pytest.approx((2, 1, 4))  # resampled means: 1, 2 and 4


def test_the_profile_score_is_the_area_under_the_profile() -> None:
    times = np.array([[10.0, 30.0, 8.0], [20.0, 20.0, INF], [INF, 80.0, 32.0], [50.0, INF, 10.0]])
    # ratios: (1, 1.5, 1), (2, 1, never), (never, 4, 4), (5, never, 1.25)
    expected = [(1 + 2.5 / 3 + 1) / 3, (2 / 3 + 1 + 0) / 3, 0.0, (0 + 0 + 2.75 / 3) / 3]
    assert profile_scores(times) == pytest.approx(expected)
    ratios = times / times.min(0)
    taus = np.linspace(1, 4, 30_001)
    area = [(row[:, None] <= taus).mean(0).mean() for row in ratios]
    assert profile_scores(times) == pytest.approx(area, abs=1e-4)


def test_a_target_that_nobody_reaches_scores_nothing() -> None:
    assert profile_scores(np.array([[INF, 1.0], [INF, 1.0]])) == pytest.approx([0.5, 0.5])


def test_targets_on_held_out_loss() -> None:
    runs = [[(10, 3.0), (20, 2.0), (30, 2.5)], [(10, 1.0)], [(10, INF)]]
    assert held_out_target(runs) == 2
    assert [steps_to(2.0, run) for run in runs] == [20, 10, INF]
    assert steps_to(INF, runs[2]) == INF
    assert held_out_target([[], []]) == INF


def test_the_strongest_has_the_lowest_mean() -> None:
    assert strongest({"a": [1.0, 1.2], "b": [0.1, INF], "c": [0.5, 1.5]}) == "c"


# ------------------------------------------------------------------------------------------------------- figures


def results_of(curves: dict[str, list[list[float]]], split: Split) -> list[Result]:
    """Optimizer -> a curve for each seed, the same on every task of a split."""
    contenders = {name: Contender(name, (Setting(adamw if name == "AdamW tuned" else sgd),)) for name in curves}
    contenders |= {split.reference.name: split.reference, DEFAULTS.name: DEFAULTS}
    return [
        Result(
            task,
            contenders[name],
            contenders[name].grid[0],
            [Run(c, [(len(c), {"loss": c[-1], "accuracy": 1 / c[-1]})], 1.0) for c in seeds],
        )
        for task in split.tasks
        for name, seeds in curves.items()
    ]


def test_rows_and_summaries_of_known_curves() -> None:
    split = Split((Task("one", "kind", tiny.wave, 100), Task("two", "kind", tiny.quadrants, 100)))
    slow, fast = [4.0] * 60 + [1.0] * 40, [4.0] * 10 + [1.0] * 90
    results = results_of(
        {
            "AdamW tuned": [slow, slow],
            "AdamW defaults": [[2.0] * 100] * 2,
            "fast": [fast, fast],
            "broken": [slow, [4.0] * 99 + [INF]],
        },
        split,
    )
    seconds = {(task.name, r.setting.make): 1.0 for task in split.tasks for r in results}
    seconds |= {(task.name, sgd): 2.0 for task in split.tasks}
    rows = rows_of(split, results, seconds)
    assert len(rows) == 2 * 4
    found = {s.optimizer: s for s in summaries_of(split, rows, dict.fromkeys([r.optimizer for r in rows], 1))}
    reached = 60 + 30  # the first step after which the last 30 batches are all 1
    assert found["AdamW tuned"].reduction == pytest.approx((100 / reached,) * 3)
    assert found["fast"].reduction.value == pytest.approx(100 / 40)
    assert found["fast"].wall_reduction.value == pytest.approx(100 / 40 / 2)
    assert found["AdamW defaults"].reduction.value == 0
    assert found["AdamW defaults"].loss_reduction.value == pytest.approx(0.5)
    assert found["broken"].loss_reduction.value == pytest.approx(0.5)  # the median of 1 and 0
    assert [s.as_good for s in found.values()] == [1, 0, 1, 0]
    assert [s.generalises for s in found.values()] == [1, 0, 1, 0]
    assert [s.accurate for s in found.values()] == [1, 0, 1, 0]
    assert [s.beats_defaults for s in found.values()] == [1, 1, 1, 0]
    assert [(s.diverged, s.runs) for s in found.values()] == [(0, 4), (0, 4), (0, 4), (2, 4)]
    assert [s.missed for s in found.values()] == [0, 1, 0, 0]
    assert found["AdamW defaults"].geometric_reduction == pytest.approx((0.25,) * 3)
    assert found["AdamW defaults"].geometric_loss_reduction == pytest.approx((0.5,) * 3)
    assert all(s.against == {} for s in found.values()), "no rival but AdamW took part"
    # the only check is after the last step: reached at once or never; in seconds half as fast; the median of 100 and
    # never is never
    assert [s.profile for s in found.values()] == [1, 0, 1, 0]
    assert [s.wall_profile for s in found.values()] == pytest.approx([1, 0, 2 / 3, 0])


def test_a_rule_is_compared_with_the_strongest_rival_of_each_task() -> None:
    split = Split((Task("one", "kind", tiny.wave, 100),), others=MUONS)
    curves = {"AdamW tuned": [3.0] * 100, "AdamW defaults": [4.0] * 100, "rule": [3.0] * 20 + [1.0] * 80}
    curves |= {MUONS[0].name: [3.0] * 100, MUONS[1].name: [4.0] * 50 + [2.0] * 50}
    results = results_of({name: [curve] for name, curve in curves.items()}, split)
    rows = {row.optimizer: row for row in rows_of(split, results, {("one", r.setting.make): 1.0 for r in results})}
    for title in ("tuned Muon", "best rival"):
        found = rows["rule"].against[title]
        assert found.rival == MUONS[1].name
        assert found.reduction == pytest.approx([100 / 35])  # 15 of the last 30 batches are 1, as many 3: a mean of 2
        assert found.loss_reduction == pytest.approx([2])
        assert rows["AdamW tuned"].against[title].reduction == [0]
    summary = {s.optimizer: s for s in summaries_of(split, list(rows.values()), dict.fromkeys(rows, 1))}["rule"]
    assert summary.against["best rival"][1].value == pytest.approx(2)
    assert "against best rival, steps" in report.score_table([summary])


def test_plots_and_pages_of_diverged_runs(tmp_path: Path) -> None:
    split = Split((Task("one", "kind", tiny.wave, 4),))
    curves = {"AdamW tuned": [3.0, 2.0, 1.0, 1.0], "AdamW defaults": [3.0, 9.0, INF, INF], "broken": [INF] * 4}
    results = results_of({name: [curve, curve] for name, curve in curves.items()}, split)
    rows = rows_of(split, results, {("one", r.setting.make): 1.0 for r in results})
    plots.curves(results, tmp_path / "curves.png")
    plots.profile(rows, tmp_path / "profile.png")
    summaries = summaries_of(split, rows, dict.fromkeys(curves, 1))
    text = report.page(split, rows, summaries, ["broken"], "About.")
    assert "| one | 1.75 (lr 0.0005) | diverged · never |" in text
    report.write(
        tmp_path, "name", {"name": text, "name_tasks": report.long_table(rows)}, report.json_of(rows, summaries)
    )
    assert [row["loss"] for row in json.loads((tmp_path / "name.json").read_text())["rows"]][1:] == [[None, None]] * 2
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("curves", "profile"))
