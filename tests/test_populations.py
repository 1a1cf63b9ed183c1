"""Populations: splits keep runs together, files are whole or refused, networks train together as they do alone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nf_symmetries import assert_close
from torch import Tensor, nn
from torch.func import functional_call

from nfn_optim.layers import Editor, Predictor, canonical_signs, function_change
from nfn_optim.populations import (
    ClassifierZoo,
    FitSettings,
    Images,
    Population,
    Report,
    Siren,
    SirenZoo,
    StepSettings,
    apply,
    bootstrap_weights,
    check_disjoint,
    classifiers,
    fit,
    fit_images,
    generate,
    interval,
    kendall_tau,
    load,
    load_images,
    outputs,
    positions,
    render,
    save,
    sirens,
    stacked,
    train_together,
    weighted_mean,
)
from nfn_optim.symmetry import Symmetry, symmetry_of


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


PAGE = Path(__file__).parent.parent / "docs" / "populations.md"
SYMMETRY = symmetry_of(network(), torch.zeros(2, 4))


def population(count: int = 12, runs: int = 6) -> Population:
    models = [network(seed) for seed in range(count)]
    label = torch.stack([m[0].weight.detach().abs().mean() for m in models])
    return Population.of(models, SYMMETRY, {"accuracy": label}, torch.arange(count) % runs, {"name": "test"})


def test_splits_keep_runs_together() -> None:
    whole = population()
    train, test = whole.split([0.5, 0.5], seed=1)
    check_disjoint(train, test)
    assert len(train) == len(test) == 6
    assert set(train.runs.tolist()) | set(test.runs.tolist()) == set(range(6))
    with pytest.raises(ValueError, match="parts 0 and 1 share 3 runs"):
        check_disjoint(whole, test)
    with pytest.raises(ValueError, match="split by run"):
        fit(nn.Identity(), whole, test, lambda *_: torch.zeros(1))
    with pytest.raises(ValueError, match="found none in"):
        whole.split([0.99, 0.01])
    with pytest.raises(ValueError, match="sum of at most 1"):
        whole.split([0.9, 0.9])


def test_networks_and_columns_of_other_sizes_are_refused() -> None:
    whole = population()
    with pytest.raises(ValueError, match=r"expected 12 networks in every tensor and column, found \{'accuracy': 3\}"):
        Population(SYMMETRY, whole.params, {"accuracy": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"expected '0\.weight' of shape"):
        Population.of([network(), nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))], SYMMETRY)
    with pytest.raises(ValueError, match="population 1 has"):
        Population.concatenate([whole, Population(SYMMETRY, whole.params)])


def test_permuted_networks_compute_the_same() -> None:
    whole, x = population(), torch.randn(5, 4)
    moved = whole.permuted(torch.Generator().manual_seed(0))
    assert not torch.equal(moved.params["0.bias"], whole.params["0.bias"])
    torch.testing.assert_close(outputs(network(), moved.params, x, chunk=5), outputs(network(), whole.params, x))
    with pytest.raises(ValueError, match=r"expected inputs that the networks can be run on, found \(5, 7\)"):
        outputs(network(), whole.params, torch.zeros(5, 7))


def test_files_hold_everything(tmp_path: Path) -> None:
    whole = population()
    for dtype, tolerance in ((None, 0.0), (torch.float16, 1e-3)):
        save(whole, tmp_path / "deep" / "p.safetensors", dtype)
        read = load(tmp_path / "deep" / "p.safetensors")
        assert_close(read.features(), whole.features(), tolerance)
        assert read.params["0.bias"].dtype == torch.float32
        assert (read.symmetry, dict(read.about)) == (whole.symmetry, {"name": "test"})
        assert torch.equal(read.runs, whole.runs)
        assert torch.equal(read.columns["accuracy"], whole.columns["accuracy"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["p.safetensors"]
    big = whole.with_features({name: 1e6 * x for name, x in whole.features().items()})
    with pytest.raises(ValueError, match="overflows; save it in float32"):
        save(big, tmp_path / "deep" / "p.safetensors", torch.float16)
    assert_close(load(tmp_path / "deep" / "p.safetensors").features(), whole.features(), 1e-3)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save(population(), path)
    data = path.read_bytes()
    path.write_bytes(data[:-40])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(path)
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(ValueError, match="was changed after it was written"):
        load(path)
    with pytest.raises(FileNotFoundError, match="found none at"):
        load(tmp_path / "missing.safetensors")


KILLED = """
import os, signal, sys, torch
from nfn_optim.populations import Population, generate
from nfn_optim.symmetry import Symmetry
def make(group):
    if group == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    symmetry = Symmetry({"b": ("h",)}, {"h": 3})
    return Population(symmetry, {"b": torch.full((12, 3), float(group))})
generate(sys.argv[1], {"name": "killed"}, 4, make)
"""


@pytest.mark.slow
def test_generation_goes_on_after_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    made: list[int] = []

    def make(group: int) -> Population:
        made.append(group)
        symmetry = Symmetry({"b": ("h",)}, {"h": 3})
        return Population(symmetry, {"b": torch.full((12, 3), float(group))})

    whole = generate(tmp_path, {"name": "killed"}, 4, make)
    assert torch.equal(whole.params["b"][:, 0], torch.arange(4.0).repeat_interleave(12))
    assert made == [2, 3]
    assert len(generate(tmp_path, {"name": "another"}, 1, make)) == 12
    assert made == [2, 3, 0]


@pytest.mark.parametrize("adam", [True, False])
def test_networks_trained_together_are_trained_as_alone(adam: bool) -> None:
    """Against torch's optimizers, with a learning rate and a penalty for each network."""
    models, rates, decays = [network(seed) for seed in range(3)], [0.1, 0.01, 0.03], [0.0, 0.1, 0.01]
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(3, 8, 4, generator=generator), torch.randint(3, (3, 8), generator=generator)) for _ in range(6)
    ]
    settings = StepSettings(torch.tensor(rates), torch.tensor(decays), torch.full((3,), adam))
    start = stacked(models)
    for values in train_together(network(), start, (((x,), y) for x, y in data), F.cross_entropy, settings):
        together = {name: x.detach().clone() for name, x in values.items()}
    for n, model in enumerate(models):
        kwargs: dict[str, Any] = {"lr": rates[n], "weight_decay": decays[n]}
        optimizer = (
            torch.optim.Adam(model.parameters(), **kwargs)
            if adam
            else torch.optim.SGD(model.parameters(), momentum=0.9, **kwargs)
        )
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x[n]), y[n]).backward()
            optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(together[name][n], p.detach(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="network 1 has"):
        stacked([network(), nn.Linear(4, 6)])


def test_a_network_that_diverges_leaves_the_others_alone() -> None:
    models = [network(seed) for seed in range(2)]
    params = stacked(models)
    params["0.bias"][0] = float("inf")
    batches = [((torch.randn(2, 8, 4),), torch.randint(3, (2, 8))) for _ in range(3)]
    for values in train_together(network(), params, batches, F.cross_entropy, StepSettings.same(2, 0.1)):
        last = values
    assert all(x[1].isfinite().all() for x in last.values())
    assert torch.equal(last["2.bias"][0], params["2.bias"][0])
    assert not torch.equal(last["2.bias"][1], params["2.bias"][1])


def images(count: int = 60, side: int = 6) -> Images:
    """Bright in the upper or in the lower half, by class."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(2, (count,), generator=generator)
    pixels = 0.3 * torch.rand(count, 1, side, side, generator=generator)
    pixels[classes == 0, :, : side // 2] += 0.6
    pixels[classes == 1, :, side // 2 :] += 0.6
    return Images("halves", pixels, classes, 20)


@pytest.mark.parametrize(("kind", "sizes"), [("mlp", (36, 8, 2)), ("cnn", (4, 2))])
def test_classifiers_learn_and_are_labelled(kind: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    zoo = ClassifierZoo(kind, sizes, runs=70, steps=30, snapshots=2, batch=8)
    found = classifiers(zoo, images(), tmp_path)
    assert int(found.columns["step"].min()) == 3
    late = found.columns["step"] == 30
    early, trained = found.columns["accuracy"][~late], found.columns["accuracy"][late]
    assert trained.mean() > early.mean() + 0.04
    assert trained.max() == 1
    assert int(found.runs.max()) < 70 <= 2 * len(torch.unique(found.runs))
    again = classifiers(ClassifierZoo(kind, sizes, 20, 30, 2, 8), images(), tmp_path)  # read, not trained
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert torch.equal(
        again.params[next(iter(again.params))], found.select(found.runs < 20).params[next(iter(found.params))]
    )
    module = zoo.module("relu")
    relu = found.select(found.columns["tanh"] == 0)
    logits = functional_call(module, {n: x[0] for n, x in relu.params.items()}, (images().images[-20:],))
    accuracy = (logits.argmax(-1) == images().classes[-20:]).float().mean()
    torch.testing.assert_close(accuracy, relu.columns["accuracy"][0])
    with pytest.raises(ValueError, match="'mlp' or 'cnn'"):
        ClassifierZoo("vit", (1,), 1, 1).module()


def test_sirens_represent_images_and_canonical_signs_keep_them(tmp_path: Path) -> None:
    zoo = SirenZoo((2, 16, 1), count=10, held_out=5, views=2, steps=150, pixels=36, learning_rate=1e-2)
    found = sirens(zoo, images(), tmp_path)
    assert len(found) == 30
    assert found.columns["psnr"].median() > 18
    assert found.columns["test"].sum() == 10
    first = found.select(found.runs == 3)
    assert len(first) == 2
    error = (render(zoo.module(), first.params, 6) - images().images[3]).square().mean()
    assert error < 0.03
    canonical = canonical_signs(found.features(), found.symmetry, half_period=Siren().half_period)
    assert function_change(zoo.module(), found.features(), canonical, positions(6)).max() < 1e-3
    with pytest.raises(ValueError, match="expected at least 100 training"):
        sirens(SirenZoo(count=100), images(), tmp_path)
    with pytest.raises(ValueError, match="expected 2 square images"):
        fit_images(zoo.module(), first.params, images().images[:3, 0], zoo, torch.Generator())


def test_an_editor_learns_to_invert_images(tmp_path: Path) -> None:
    zoo = SirenZoo((2, 8, 1), count=40, held_out=10, steps=100, pixels=36, learning_rate=1e-2)
    found = sirens(zoo, images(), tmp_path)
    found = found.with_columns(target=1 - images().images[found.columns["image"], 0])
    train, test = found.select(~found.columns["test"]), found.select(found.columns["test"])
    module = zoo.module()

    def loss(weights: dict[str, Tensor], columns: dict[str, Tensor]) -> Tensor:
        both = [render(module, {n: x[..., k] for n, x in weights.items()}, 6) for k in range(2)]
        return (sum(both) / 2 - columns["target"]).square().mean((1, 2))

    torch.manual_seed(0)
    editor = Editor(found.symmetry, channels=4, depth=1, outputs=2).fit(train.features())
    before = loss(editor(test.features()), test.columns).mean()
    result = fit(editor, train, test, loss, FitSettings(25, batch=8, learning_rate=1e-2))
    after = loss(apply(editor, test), test.columns).mean()
    assert after < before / 2
    assert after == pytest.approx(result.losses[result.best_epoch - 1], rel=1e-4)
    moved = test.permuted(torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(apply(editor, moved), test.columns).mean(), after, rtol=1e-3, atol=1e-5)


def test_a_predictor_learns_what_no_single_mean_tells() -> None:
    """The largest singular value of the first matrix times the second."""
    models = [network(seed) for seed in range(240)]
    for seed, model in enumerate(models):
        model[0].weight.data *= 0.5 + (seed % 7) / 3
    whole = Population.of(models, SYMMETRY)
    product = whole.params["2.weight"] @ whole.params["0.weight"]
    label = torch.linalg.svdvals(product)[:, 0]
    whole = whole.with_columns(label=(label - label.mean()) / label.std())
    train, validation, test = whole.split([0.6, 0.1, 0.3])

    def loss(out: Tensor, columns: dict[str, Tensor]) -> Tensor:
        return (out[:, 0] - columns["label"]).square()

    torch.manual_seed(0)
    predictor = Predictor(SYMMETRY, channels=4).fit(train.features())
    fit(predictor, train, validation, loss, FitSettings(20, learning_rate=3e-3))
    assert kendall_tau(apply(predictor, test)[:, 0], test.columns["label"]) > 0.8


def test_taus_and_intervals() -> None:
    from scipy.stats import kendalltau

    generator = torch.Generator().manual_seed(0)
    true = torch.randint(8, (60,), generator=generator).float()  # with ties
    predicted = true + 3 * torch.randn(60, generator=generator)
    assert kendall_tau(predicted, true) == pytest.approx(kendalltau(predicted, true)[0], abs=1e-5)
    groups = torch.arange(60) // 3
    weights = bootstrap_weights(groups, 300)
    assert weights.shape == (300, 60)
    assert torch.equal(weights[:, 0], weights[:, 2])
    assert (weights.sum(1) == 60).all()
    index = weights[5].long().nonzero()[:, 0].repeat_interleave(weights[5].long()[weights[5] > 0])
    expected = kendalltau(predicted[index], true[index])[0]
    samples = kendall_tau(predicted, true, weights)
    assert samples[5] == pytest.approx(expected, abs=1e-5)
    low, high = interval(samples)
    assert low < kendall_tau(predicted, true) < high
    assert weighted_mean(true, weights)[5] == pytest.approx(true[index].mean().item())
    with pytest.raises(ValueError, match="two vectors of one length"):
        kendall_tau(true, true[:3])


def test_images_come_from_packages_and_folders(tmp_path: Path) -> None:
    digits = load_images("digits")
    assert digits.images.shape == (1797, 1, 8, 8)
    assert (digits.images.min(), digits.images.max(), digits.train) == (0, 1, 1200)
    assert abs(digits.standardised().images[: digits.train].mean()) < 1e-4
    pixels = np.full((5, 4, 4, 3), 255, np.uint8)
    np.savez(tmp_path / "mine.npz", train_x4=pixels, test_x4=pixels[:2], train_y=np.arange(9), test_y=np.arange(9))
    mine = load_images("mine", tmp_path, 4)
    assert mine.images.shape == (7, 1, 4, 4)
    assert mine.classes.tolist() == [0, 1, 2, 3, 4, 0, 1]
    with pytest.raises(ValueError, match="expected images of side 28"):
        load_images("mine", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_images("other", tmp_path)
    with pytest.raises(ValueError, match="found no folder"):
        load_images("other")


def test_reports_are_the_same_everywhere(tmp_path: Path) -> None:
    made = Report("Errors", ["method", "MSE"], [["ours", "1.0"], ["theirs", "2.0"]], ["a note"], {"mse": [1.0, 2.0]})
    made.write(tmp_path / "out", "errors", {"quick": True})
    assert json.loads((tmp_path / "out" / "errors.json").read_text())["mse"] == [1.0, 2.0]
    text = (tmp_path / "out" / "errors.md").read_text()
    assert "| theirs | 2.0 |" in text
    assert "- a note" in text
    assert "theirs  2.0" in str(made)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["errors.json", "errors.md"]


@pytest.mark.slow
def test_the_tutorial_reaches_boosted_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 300 networks, as `docs/populations.md` says."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(code, scope)
    assert 280 < len(scope["train"]) <= 300
    assert scope["tau"] >= scope["baseline"] > 0.5
