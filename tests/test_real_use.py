"""The benchmark of real use: augmentation, adapters, networks trained before, accumulated gradients, held-out loss."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from data_folder import with_random_images
from inline import Pool
from torch import nn

from meta_train.evaluate import Extent, Folders, evaluate
from meta_train.evaluation import losses, pretraining, real, step_time
from meta_train.evaluation.accumulation import Accumulated
from meta_train.evaluation.adapters import Adapted, adapt
from meta_train.evaluation.adversarial import GAN, NOISE, adversarial, frechet_distance
from meta_train.evaluation.augmentation import cropped_and_flipped
from meta_train.evaluation.cache import Run
from meta_train.evaluation.datasets import Examples
from meta_train.evaluation.gpt import GPT
from meta_train.evaluation.loop import compute_gradients, scores_of
from meta_train.evaluation.networks import mlp
from meta_train.evaluation.splits import SPLITS
from meta_train.evaluation.task import Training
from nfn_optim import NFNOptimizer

ROOT = Path(__file__).parent.parent
SPLIT = SPLITS["real"]
INF = math.inf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_random_images(tmp_path_factory.mktemp("data"))


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=generator), torch.randint(3, (60,), generator=generator)
    return Examples(x[:40], y[:40], x[40:], y[40:])


def test_images_are_shifted_and_reflected_and_nothing_else() -> None:
    x = torch.arange(1.0, 3 * 36 + 1).reshape(1, 3, 6, 6).expand(400, -1, -1, -1)
    found = cropped_and_flipped(x, 2, torch.Generator().manual_seed(0))
    wide = torch.nn.functional.pad(x[0], (2,) * 4)
    views = [wide[:, top : top + 6, left : left + 6] for top in range(5) for left in range(5)]
    both = torch.stack([*views, *(view.flip(-1) for view in views)])
    same = (found[:, None] == both).flatten(2).all(-1)
    assert same.sum(1).eq(1).all()
    assert same.any(0).all(), "every shift and reflection occurs"
    assert torch.equal(found, cropped_and_flipped(x, 2, torch.Generator().manual_seed(0)))
    flat = cropped_and_flipped(x, 0, torch.Generator().manual_seed(0))
    assert ((flat == x).flatten(1).all(1) | (flat == x.flip(-1)).flatten(1).all(1)).all()


def test_adapters_start_as_the_network_and_are_all_that_is_trained() -> None:
    torch.manual_seed(0)
    model, x = GPT(20, 8, 16, 2), torch.randint(20, (3, 8))
    before = model(x)
    adapted = adapt(model, real.LINEAR, 2, 4.0)
    assert torch.equal(adapted(x), before)
    layers = [module for module in adapted.modules() if isinstance(module, Adapted)]
    assert len(layers) == 2 * 4
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in trained} == {"a", "b"}
    assert len(trained) == 2 * len(layers)
    with torch.no_grad():
        layers[0].b.weight.fill_(1.0)
    assert not torch.allclose(adapted(x), before)


def test_accumulated_gradients_are_those_of_the_mean_loss() -> None:
    torch.manual_seed(0)
    model = mlp(5, 8, 3)
    plain = losses.classification(model, examples(), 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    several = Accumulated(plain.model, plain.loss, plain.held_out, 3)
    total = compute_gradients(several, [optimizer], torch.Generator().manual_seed(1))
    found = [p.grad for p in model.parameters()]
    batches = torch.Generator().manual_seed(1)
    mean = torch.stack([plain.loss(batches) for _ in range(3)]).mean()
    assert total == pytest.approx(mean.item())
    for grad, expected in zip(found, torch.autograd.grad(mean, list(model.parameters())), strict=True):
        torch.testing.assert_close(grad, expected)


def test_mixed_precision_runs_in_bfloat16_with_weights_and_losses_in_float32() -> None:
    seen = []
    model = nn.Sequential(nn.Linear(5, 3))
    model[0].register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    training = real.mixed_precision(losses.classification(model, examples(), 10), 2)
    loss = training.loss(torch.Generator().manual_seed(0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert isinstance(training, Accumulated)
    assert training.count == 2
    assert math.isfinite(training.held_out()["loss"])
    assert seen == [torch.bfloat16] * 2
    assert loss.dtype == model[0].weight.dtype == torch.float32


def test_a_step_of_a_gan_has_the_gradients_of_both_players() -> None:
    """Those of each player's own loss, with the other one held fixed."""
    torch.manual_seed(0)
    model, images = GAN(4), torch.randn(24, 1, 14, 14)
    training = adversarial(model, images, images, lambda x: x.flatten(1), 6)
    training.loss(torch.Generator().manual_seed(1)).backward()  # type: ignore[no-untyped-call]
    found = [p.grad for p in model.parameters()]
    batches = torch.Generator().manual_seed(1)
    x = images[torch.randint(24, (6,), generator=batches)].requires_grad_()
    made = model(torch.randn(6, NOISE, generator=batches))
    real_score, made_score = model.discriminator(x), model.discriminator(made)
    (slope,) = torch.autograd.grad(real_score.sum(), x, create_graph=True)
    told = -(real_score.sigmoid().log() + (1 - made_score.sigmoid()).log()).mean() + slope.square().sum() / 12
    fooled = -made_score.sigmoid().log().mean()
    players = ((fooled, model.generator), (told, model.discriminator))
    expected = [torch.autograd.grad(loss, [*player.parameters()], retain_graph=True) for loss, player in players]
    for grad, right in zip(found, (g for grads in expected for g in grads), strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-3, atol=1e-6)


def test_the_frechet_distance_is_that_of_normal_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(x, x + 2) == pytest.approx(5 * 4, rel=1e-4)
    scaled = x.T.cov().trace().item() + (x.mean(0)).square().sum().item()
    assert frechet_distance(x, 3 * x) == pytest.approx(4 * scaled, rel=1e-4)  # (3 - 1) squared
    other = torch.randn(200, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    a, b = (y.double().T.cov().numpy() for y in (x, other))
    apart = (x.double().mean(0) - other.double().mean(0)).square().sum().item()
    expected = apart + (a + b - 2 * scipy.linalg.sqrtm(a @ b).real).trace()
    assert frechet_distance(x, other) == pytest.approx(expected)


@pytest.mark.slow
def test_a_gan_learns_and_both_players_are_found() -> None:
    """Players go round each other, so the best of some times counts."""
    torch.manual_seed(2)
    brightness = torch.linspace(-1, 1, 14).expand(40, 1, 14, 14) + 0.3 * torch.randn(40, 1, 14, 14)
    training = adversarial(GAN(4), brightness, brightness, lambda x: F.avg_pool2d(x, 7).flatten(1), 16)
    before = scores_of(training, [])["loss"]
    optimizer = NFNOptimizer(training.model, total_steps=150)
    batches, distances = torch.Generator().manual_seed(0), []
    for step in range(1, 151):
        compute_gradients(training, [optimizer], batches)
        optimizer.step()
        distances += [scores_of(training, [])["loss"]] if step % 50 == 0 else []
    assert min(distances) < 0.3 * before
    symmetry = optimizer.symmetry
    layers = (("generator.2", "generator.4"), ("discriminator.0", "discriminator.2"))
    for first, second in ([f"{layer}.weight" for layer in pair] for pair in layers):
        assert set(symmetry.axes_of(first)) & set(symmetry.axes_of(second)) & set(symmetry.free)


@pytest.mark.usefixtures("short_pretraining")
def test_what_is_trained_further_is_the_same_for_every_seed_and_is_not_changed(folder: Path) -> None:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        trained = pretraining.trained_on_clothes(pretraining.small_cnn, folder)
        assert torch.equal(state, torch.get_rng_state())
        made.append(real.fine_tuned_cnn(folder).model)
    first, second = (dict(model.named_parameters()) for model in made)
    assert not torch.equal(first["9.weight"], second["9.weight"])
    assert torch.equal(first["0.weight"], second["0.weight"])
    first["0.weight"].data.zero_()
    assert trained[0].weight.any()


def test_settings_are_those_of_users_and_held_out_loss_decides() -> None:
    baselines = {contender.name: contender.grid for contender in SPLIT.baselines(thorough=False)}
    assert list(baselines) == ["AdamW tuned", "AdamW defaults", "Muon tuned"]
    for name in ("AdamW tuned", "Muon tuned"):
        assert len({setting.lr for setting in baselines[name]}) == len(baselines[name]) == 4
        assert all(setting.cosine and setting.warmup for setting in baselines[name])
    assert SPLIT.baselines(thorough=True) == SPLIT.baselines(thorough=False)
    run = Run([1.0, 0.1], [(1, {"loss": 3.0}), (2, {"loss": 4.0})], 1.0)
    assert SPLIT.judge.criterion(run) == 4.0
    assert SPLIT.judge.criterion(replace(run, losses=[1.0, INF])) == INF
    faster = replace(run, held_out=[(1, {"loss": 2.0}), (2, {"loss": 4.0})])
    slower = replace(run, held_out=[(1, {"loss": 9.0}), (2, {"loss": 3.0})])
    assert [SPLIT.judge.step_reduction(other, run) for other in (faster, slower)] == [1.0, 0.5]


@pytest.mark.slow
@pytest.mark.usefixtures("short_pretraining")
@pytest.mark.parametrize(
    "tasks", [("fine-tuned",), pytest.param(("adapters", "clusters"), marks=pytest.mark.exhaustive)], ids=" and ".join
)
def test_a_part_of_the_benchmark_is_written(
    tasks: tuple[str, ...],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tiny_gpt(_data: Path) -> Training:
        model = adapt(GPT(pretraining.CODES, 8, 16, 1), real.LINEAR, 2, 4.0)
        return real.mixed_precision(losses.language(model, pretraining.codes("numpy"), 8, 2), 2)

    short = tuple(replace(task, steps=4, checks=2) for task in SPLIT.tasks)
    short = tuple(replace(task, begin=tiny_gpt) if task.kind == "LoRA" else task for task in short)
    monkeypatch.setitem(SPLITS, "real", replace(SPLIT, tasks=short))
    monkeypatch.setattr("meta_train.evaluation.study.ProcessPoolExecutor", Pool)
    for number in ("ROUNDS", "STEPS"):
        monkeypatch.setattr(step_time, number, 1)
    folders = Folders(folder, tmp_path / "cache", tmp_path / "out")
    evaluate("real", ("default",), seeds=1, extent=Extent(tasks=tasks), folders=folders)
    content = json.loads((tmp_path / "out" / "real_part.json").read_text())
    names = ["AdamW tuned", "AdamW defaults", "Muon tuned", "default", "default, horizon known"]
    assert [row["optimizer"] for row in content["summary"]] == names
    assert [row["settings"] for row in content["summary"]] == [4, 1, 4, 1, 1]
    assert len(content["rows"]) == len(tasks) * len(names)
    assert all(row["loss"] == row["held_out"] for row in content["rows"])
    page = capsys.readouterr().out
    assert "steps to its best held-out loss; *loss reduction*: the held-out loss after its last step over" in page
    assert "against tuned Muon, steps" in page
    assert "| task | AdamW tuned | Muon tuned | default | default, horizon known |" in page


@pytest.mark.slow
def test_sensitivity_is_measured_around_the_tuned_setting(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sensitivity = importlib.import_module("sensitivity")
    sensitivity.main(folder, tmp_path, seeds=2, tasks=("fashion 8x8, MLP 64-32-10",), steps=3)
    rows = json.loads((tmp_path / "sensitivity.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * (5 + 3)
    assert len({row["held_out"] for row in rows}) == len(rows), "every point is another run"
    table = (tmp_path / "sensitivity.md").read_text().splitlines()[2:]
    assert table[0].count("|") == 2 + 5 + 3 + 1
    assert table[2].split("|")[4].strip() == "1.000, 1.000"  # AdamW with all factors 1
    doubled = [{**row, "train": 2.0 if row["batches"] == 4 else 1.0} for row in rows]
    assert sensitivity.mean_ratio(doubled, ("NFNOptimizer", 1.0, 4.0), "train") == pytest.approx(2)
    assert sensitivity.mean_ratio(doubled, ("AdamW tuned", 4.0, 1.0), "train") == pytest.approx(1)
    differing = [{**row, "train": math.exp(row["seed"])} for row in rows]
    assert sensitivity.deviation_of(differing, "NFNOptimizer", "train") == pytest.approx(0.5**0.5)
