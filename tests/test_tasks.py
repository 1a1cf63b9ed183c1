"""Tasks: every family satisfies the interface, can be learned and differentiated, and is rebuilt from descriptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from meta_train import trainer
from meta_train.meta_gradient import Estimation
from meta_train.recipes import broad
from meta_train.tasks import (
    Augment,
    Draws,
    Examples,
    Mixture,
    MLPDistribution,
    ModuleTask,
    QuadraticDistribution,
    Single,
    SupervisedTask,
    Task,
    TaskDistribution,
    Tensors,
    Text,
    ViTDistribution,
    digits,
)
from meta_train.tasks import folder as data_folder
from meta_train.tasks.autoencoder import AutoencoderDistribution
from meta_train.tasks.cnn import CNNDistribution, CNNShape
from meta_train.tasks.gru import GRUDistribution
from meta_train.tasks.images import IMAGES, images, mnist
from meta_train.tasks.inr import INRDistribution
from meta_train.tasks.losses import cross_entropy, huber, one_hot_error, smoothed, squared_error
from meta_train.tasks.ngram import NgramDistribution
from meta_train.tasks.quadratic import Quadratic, QuadraticShape
from meta_train.tasks.tables import TABLES, teacher
from meta_train.tasks.text import TEXTS, tokens_of
from meta_train.tasks.transformer import TransformerDistribution
from meta_train.tasks.vector import VectorDistribution
from meta_train.unroll import start, unroll
from nfn_optim import RuleConfig, UpdateRule
from nfn_optim.symmetry import Symmetry

MEMBERS = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


FAMILIES: list[TaskDistribution[Any]] = [family for family, _ in broad().distribution.parts]  # type: ignore[attr-defined]
FEW = (MLPDistribution, INRDistribution, TransformerDistribution)
by_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=type(family).__name__, marks=[] if isinstance(family, FEW) else [pytest.mark.slow])
        for family in FAMILIES
    ],
)


@by_family
@pytest.mark.parametrize("seed", range(3))
def test_a_task_satisfies_the_interface(family: TaskDistribution[Any], seed: int) -> None:
    """Shapes, leading dimensions, and losses under vmap equal to those of single members."""
    task = family.sample(generator(seed))
    params, member = task.draw(MEMBERS, generator(seed))
    task.symmetry.check(params, batch_dims=1)
    assert list(params) == list(task.symmetry.dims)
    for held_out in (False, True):
        batch = task.batch(MEMBERS, generator(seed), held_out=held_out)
        assert {len(v) for v in (*params.values(), *member.values(), *batch.values())} == {MEMBERS}
        losses = task.losses(params, member, batch)
        assert torch.isfinite(losses).all()
        for i in range(MEMBERS):
            single = task.loss(
                {n: v[i] for n, v in params.items()},
                {n: v[i] for n, v in member.items()},
                {n: v[i] for n, v in batch.items()},
            )
            torch.testing.assert_close(single, losses[i], rtol=1e-4, atol=1e-5)
    assert len(torch.unique(losses)) == MEMBERS, "members are equal"


@by_family
def test_a_task_moves_to_a_device(family: TaskDistribution[Any]) -> None:
    """On "meta", which has shapes only, and does not mix with tensors of another device."""
    for seed in range(3):
        cpu, moved = family.sample(generator(seed)), family.sample(generator(seed))
        moved.to("meta")
        tensors = []
        for task in (cpu, moved):
            params, member = task.draw(MEMBERS, generator())
            batch = task.batch(MEMBERS, generator())
            held = task.batch(MEMBERS, generator(), held_out=True)
            tensors.append([*params.values(), *member.values(), *batch.values(), *held.values()])
            tensors[-1].append(task.losses(params, member, batch))
        assert [(t.shape, t.dtype) for t in tensors[0]] == [(t.shape, t.dtype) for t in tensors[1]]
        assert {t.device.type for t in tensors[0]} == {"cpu"}
        assert {t.device.type for t in tensors[1]} == {"meta"}


def test_noise_is_normal_and_independent() -> None:
    augment, source = Augment(pixel_noise=1.0), generator()
    for shape in ((2, 30, 40), (2, 800, 1000)):  # sliced from the sequence, and drawn because that is too short
        batch = {"x": torch.zeros(shape), "y": torch.zeros(shape[:2], dtype=torch.int64)}
        one, other = (augment.noise(batch, 4, source)["noise"] for _ in range(2))
        assert abs(one.mean()) < 0.1
        assert one.std() == pytest.approx(1, abs=0.05)
        assert abs((one * other).mean()) < 0.1
        assert abs((one[0] * one[1]).mean()) < 0.1


@by_family
def test_permuting_hidden_neurons_keeps_the_loss(family: TaskDistribution[Any]) -> None:
    for seed in range(3):
        task = family.sample(generator(seed))
        params, member = task.draw(MEMBERS, generator(seed))
        batch = task.batch(MEMBERS, generator(seed))
        permuted = task.symmetry.permute(params, task.symmetry.random_permutations(generator()), batch_dims=1)
        before, after = (task.losses(p, member, batch) for p in (params, permuted))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@by_family
def test_a_task_is_rebuilt_from_its_description(family: TaskDistribution[Any]) -> None:
    for seed in range(3):
        task = family.sample(generator(seed))
        description = json.loads(json.dumps(family.describe(task)))
        again = family.rebuild(description)
        assert json.loads(json.dumps(family.describe(again))) == description
        assert (again.name, again.symmetry) == (task.name, task.symmetry)
        first, second = ((*t.draw(2, generator()), t.batch(2, generator())) for t in (task, again))
        for ours, theirs in zip(first, second, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert torch.equal(task.losses(*first), again.losses(*second))


@by_family
def test_the_meta_gradient_is_finite(family: TaskDistribution[Any]) -> None:
    torch.manual_seed(0)
    rule = UpdateRule(RuleConfig(hidden=4, power=1.0))
    for seed in range(2):
        task = family.sample(generator(seed))
        carry = start(rule, task, MEMBERS, 40, generator(seed))
        found = Estimation(window=3)(rule, task, carry, generator(seed))
        assert torch.isfinite(found.samples).all()
        assert (found.samples.abs().amax(1) > 0).all()


@by_family
def test_adamw_lowers_the_loss(family: TaskDistribution[Any]) -> None:
    """Of every member, measured on one batch before and after fifty steps."""
    rule = UpdateRule.adamw()
    task = family.sample(generator(1))
    carry = start(rule, task, MEMBERS, 50, generator(1))
    with torch.no_grad():
        end = unroll(rule, task, carry, 50, generator(2)).carry
        batches = [task.batch(MEMBERS, generator(seed)) for seed in range(3, 11)]
        before, after = (
            torch.stack([task.losses(c.params, carry.member, batch) for batch in batches]).mean(0) for c in (carry, end)
        )
    assert (after < before).all()


# -------------------------------------------------------------------------------------------------------- augmentation

OFF = Augment(0.0, 0.0, 0.0)


def draw(augment: Augment, count: int = 200, classes: int = 4) -> tuple[Tensors, Tensors]:
    weights = {"w": torch.randn(count, 3, 2, generator=generator()), "b": torch.randn(count, 3, generator=generator())}
    params, member = augment.draw(weights, classes, generator(1))
    again = Augment.weights(params, member)
    for name, weight in weights.items():
        torch.testing.assert_close(again[name], weight)
    return params, member


def test_reparametrisation_keeps_the_weights_and_varies_the_scales() -> None:
    _, separate = draw(replace(OFF, reparametrise=1.0))
    _, common = draw(replace(OFF, rescale=1.0))
    for member in (separate, common):
        assert 0.1 <= member["w"].min() < 0.2
        assert 5 < member["w"].max() <= 10
    assert torch.equal(common["w"], common["b"])
    assert not torch.equal(separate["w"], separate["b"])
    assert "w" not in draw(OFF)[1]


def test_labels_are_permuted_and_half_of_the_members_have_noise() -> None:
    augment = Augment(label_noise=0.4, pixel_noise=2.0)
    _, member = draw(augment)
    assert (member["labels"].sort(-1).values == torch.arange(4)).all()
    assert len(member["labels"].unique(dim=0)) == 24
    for name, maximum in (("label_noise", 0.4), ("pixel_noise", 2.0)):
        assert 0.35 < (member[name] == 0).float().mean() < 0.65
        assert 0.8 * maximum < member[name].max() <= maximum
    batch = {"x": torch.zeros(200, 64, 5), "y": torch.zeros(200, 64, dtype=torch.int64)}
    x, y = Augment.examples(member, augment.noise(batch, 4, generator(2)))
    assert (x[member["pixel_noise"] == 0] == 0).all()
    torch.testing.assert_close(x.std((1, 2)), member["pixel_noise"], rtol=0.2, atol=1e-6)
    changed = (y != member["labels"][:, :1]).float().mean(1)
    assert (changed[member["label_noise"] == 0] == 0).all()
    torch.testing.assert_close(changed.mean(), 0.75 * member["label_noise"].mean(), rtol=0.1, atol=0)


def test_real_targets_have_noise_and_tokens_none() -> None:
    augment = Augment(label_noise=0.4, pixel_noise=2.0)
    _, member = draw(augment, classes=0)
    assert "labels" not in member
    batch = {"x": torch.zeros(200, 64, dtype=torch.int64), "y": torch.zeros(200, 64)}
    x, y = Augment.examples(member, augment.noise(batch, 0, generator(2)))
    assert (x == 0).all()
    torch.testing.assert_close(y.std(1), member["label_noise"], rtol=0.4, atol=1e-6)


def test_the_loss_is_scaled() -> None:
    shape = MLPDistribution().shape(Draws(generator()))
    task = MLPDistribution(augment=Augment(loss_scale=2.0)).task(shape)
    params, member = task.draw(MEMBERS, generator())
    batch = task.batch(MEMBERS, generator())
    scale = member["loss_scale"]
    assert ((scale >= 0.01) & (scale <= 100)).all()
    plain = {**member, "loss_scale": torch.ones(MEMBERS)}
    torch.testing.assert_close(task.losses(params, member, batch), task.losses(params, plain, batch) * scale)


def test_no_augmentation_leaves_the_batch_unchanged() -> None:
    batch = digits().batch((2, 3), generator())
    assert OFF.noise(batch, 10, generator()).keys() == batch.keys()


# -------------------------------------------------------------------------------------------------------- distributions


def test_a_mixture_draws_by_weight_and_nests() -> None:
    inner = Mixture(((QuadraticDistribution(), 1.0), (MLPDistribution(width=(4, 8)), 0.0)))
    mixture = Mixture(((MLPDistribution(width=(4, 8)), 3.0), (inner, 1.0)))
    source = generator()
    kinds = []
    for _ in range(100):
        task = mixture.sample(source)
        kinds.append(task.name.split("-")[0])
        again = mixture.rebuild(json.loads(json.dumps(mixture.describe(task))))
        assert again.name == task.name
    assert set(kinds) == {"mlp", "quadratic"}
    assert 60 < kinds.count("mlp") < 90


@pytest.mark.parametrize("weights", [(), (0.0,), (1.0, -1.0)])
def test_a_mixture_without_positive_weights_is_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Mixture(tuple((QuadraticDistribution(), weight) for weight in weights))


def test_draws_cover_their_range() -> None:
    draws = Draws(generator())
    values = [draws.log_uniform(2, 32) for _ in range(1000)]
    assert (min(values), max(values)) == (2, 32)
    assert 380 < sum(v < 8 for v in values) < 620
    assert 200 < sum(draws.one_in(4) for _ in range(1000)) < 300


def test_broad_has_every_family_and_no_benchmark_data() -> None:
    mixture = broad().distribution
    assert isinstance(mixture, Mixture)
    assert all(weight > 0 for _, weight in mixture.parts)
    assert len({type(family) for family, _ in mixture.parts}) == len(mixture.parts) == 10
    package = Path(trainer.__file__).parent
    source = "".join(path.read_text() for path in [package / "recipes.py", *package.glob("tasks/*.py")]).lower()
    assert not any(word in source for word in ("fashion", "cifar"))


@pytest.mark.slow
def test_a_run_over_a_mixture_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = replace(
        broad(), iterations=6, members=2, inner_runs=4, window=2, horizon=(2, 4), rule=RuleConfig(hidden=4)
    )
    config = replace(config, validation=None)
    trainer.train(config, tmp_path / "whole", {})
    trainer.train(replace(config, until=3), tmp_path / "parts", {})
    trainer.train(config, tmp_path / "parts", {}, resume=True)
    assert (tmp_path / "whole" / trainer.THETA).read_bytes() == (tmp_path / "parts" / trainer.THETA).read_bytes()


# -------------------------------------------------------------------------------------------------- a task of one's own


def test_any_module_becomes_a_task() -> None:
    """From a module, a loss and a data loader; as a distribution of a single task."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(50, 4, generator=generator()), torch.arange(50) % 3), batch_size=8
    )
    data = Examples.of("custom", loader, classes=3)
    state = torch.get_rng_state()
    task = ModuleTask(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), data, cross_entropy)
    distribution = Single(task)
    assert distribution.sample(generator()) is task
    assert distribution.rebuild(distribution.describe(task)) is task
    assert len(task.symmetry.free) == 1
    params, _ = task.draw(2, generator())
    assert not torch.equal(params["0.weight"][0], params["0.weight"][1])
    assert torch.equal(torch.get_rng_state(), state), "building members must not move torch's global generator"


def test_a_small_class_becomes_a_task() -> None:
    class Line(SupervisedTask):
        """y = a x."""

        name = "line"
        symmetry = Symmetry.separate({"a": (1,)})

        def init(self, count: int, generator: torch.Generator) -> Tensors:
            return {"a": torch.randn(count, 1, generator=generator)}

        def output(self, weights: Tensors, x: torch.Tensor) -> torch.Tensor:
            return x * weights["a"]

    x = torch.randn(20, 1, generator=generator())
    task: Task = Line(Examples("line", x, 3 * x, 0, 20), squared_error, 5, OFF)
    rule = UpdateRule.adamw()
    carry = start(rule, task, 2, 10, generator())
    with torch.no_grad():
        losses = unroll(rule, task, carry, 10, generator()).losses
    assert torch.isfinite(losses).all()


def test_running_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="track_running_stats=False"):
        ModuleTask(lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)), digits(), cross_entropy)


def test_residual_blocks_and_norms_of_a_cnn() -> None:
    shape = CNNShape("digits", (4, 6, 6), True, "batch", False, "relu", "default", "cross_entropy", 8)
    task = CNNDistribution().task(shape)
    assert task.symmetry.shape_of("convolutions.2.weight") == (6, 6, 3, 3)
    rows = [task.symmetry.dims[f"convolutions.{i}.weight"] for i in range(3)]
    assert rows[2][0] == rows[2][1] == rows[1][0], "a residual block shares the neurons of its stream"
    plain = CNNDistribution().task(replace(shape, residual=False))
    assert plain.symmetry.dims["convolutions.2.weight"][0] != plain.symmetry.dims["convolutions.1.weight"][0]


# ---------------------------------------------------------------------------------------------------------------- data


IN_PACKAGES: dict[str, Callable[[], Examples]] = {
    **{name: IMAGES[name] for name in ("digits", "mnist5k", "mnist14", "mnist16")},
    **TABLES,
    "teacher-3": partial(teacher, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PACKAGES)
def test_examples_are_standardised_and_their_parts_disjoint(name: str) -> None:
    data = IN_PACKAGES[name]()
    assert abs(data.x.mean()) < 0.1
    assert data.x.std() == pytest.approx(1, abs=0.1)
    assert 0.1 < 1 - data.train / len(data.x) < 0.25
    if data.classes:
        assert data.y.min() == 0
        assert data.y.max() == data.classes - 1
        assert len(data.y[data.train :].unique()) == data.classes, "the held-out part lacks a class"
    else:
        assert data.y.std() == pytest.approx(1, abs=0.05)
    index = torch.arange(float(len(data.x)))
    numbered = replace(data, x=index)
    assert numbered.batch((4, 500), generator())["x"].max() < data.train
    assert numbered.batch((4, 500), generator(), held_out=True)["x"].min() >= data.train


def test_examples_check_their_parts() -> None:
    with pytest.raises(ValueError, match="for training"):
        Examples("none", torch.zeros(3, 1), torch.zeros(3, 1), 0, 0)
    with pytest.raises(ValueError, match="held out"):
        Examples("all", torch.zeros(3, 1), torch.zeros(3, 1), 0, 3).batch((1, 1), generator(), held_out=True)


def test_inputs_are_projected_and_reconstructed() -> None:
    projected = digits().projected(20, seed=0)
    assert projected.x.shape == (len(digits().x), 20)
    assert torch.equal(projected.x, digits().projected(20, seed=0).x)
    assert not torch.equal(projected.x, digits().projected(20, seed=1).x)
    itself = digits().reconstruction()
    assert itself.classes == 0
    assert torch.equal(itself.y, digits().x.flatten(1))


@pytest.mark.parametrize("name", ["prose", "code"])
def test_text_is_predicted_from_the_left_and_its_parts_are_disjoint(name: str) -> None:
    data = Text(name, context=6)
    tokens = tokens_of(name)
    assert len(tokens) > 300_000
    assert int(tokens.max()) == data.classes - 1
    batch = data.batch((2, 5), generator())
    assert torch.equal(batch["x"][..., 1:], batch["y"][..., :-1])
    last = replace(data, every_position=False).batch((2, 5), generator())
    assert torch.equal(last["x"], batch["x"])
    assert torch.equal(last["y"], batch["y"][..., -1])
    border = len(tokens) * 9 // 10
    windows = {held: data.batch((1, 400), generator(), held_out=held)["x"][0] for held in (False, True)}
    for held, part in ((False, tokens[:border]), (True, tokens[border:])):
        places = part.unfold(0, 6, 1)
        assert all((places == window).all(-1).any() for window in windows[held][:20])


def test_files_come_from_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data_folder.FOLDER, raising=False)
    for read, file in ((mnist.__wrapped__, "mnist.npz"), (TEXTS["shakespeare"], "tinyshakespeare.txt")):
        with pytest.raises(FileNotFoundError, match=rf"{file}.*{data_folder.FOLDER}"):
            read()
    monkeypatch.setenv(data_folder.FOLDER, str(tmp_path))
    assert not data_folder.has_file("mnist.npz")
    assert "mnist" not in broad().distribution.parts[1][0].data  # type: ignore[attr-defined]
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    np.savez(tmp_path / "mnist.npz", train_x8=pixels[:20], test_x8=pixels[20:], train_y=labels[:20], test_y=labels[20:])
    (tmp_path / "tinyshakespeare.txt").write_text("First Citizen:\n" * 50)
    found = broad().distribution
    assert isinstance(found, Mixture)
    assert "mnist" in found.parts[1][0].data  # type: ignore[attr-defined]
    assert any("shakespeare" in getattr(family, "data", ()) for family, _ in found.parts)
    assert mnist.__wrapped__().batch((1, 2), generator())["x"].shape == (1, 2, 1, 8, 8)
    assert tokens_of.__wrapped__("shakespeare").max() < 64


@pytest.mark.parametrize("argument", ["train", "split"])
def test_data_sets_of_torchvision_are_images_by_name(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colour images, averaged, with the test part held out; networks for them are built."""
    from torchvision import datasets

    def pairs(root: str, part: Any) -> list[tuple[Any, int]]:
        assert root == str(tmp_path / "torchvision")
        count = 40 if part in (True, "train") else 10
        random = np.random.default_rng(count)
        return [(random.integers(0, 256, (12, 12, 3), dtype=np.uint8), i % 5) for i in range(count)]

    def by_train(root: str, train: bool = True) -> list[tuple[Any, int]]:
        return pairs(root, train)

    def by_split(root: str, split: str = "train") -> list[tuple[Any, int]]:
        return pairs(root, split)

    name = f"torchvision.Toys{argument}.8"
    monkeypatch.setattr(datasets, f"Toys{argument}", {"train": by_train, "split": by_split}[argument], raising=False)
    monkeypatch.setenv(data_folder.FOLDER, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="torchvision"):
        images(name)
    (tmp_path / "torchvision").mkdir()
    data = images(name)
    assert (data.x.shape, data.train, data.classes) == ((50, 3, 8, 8), 40, 5)
    for family in (CNNDistribution(data=(name,)), ViTDistribution(data=(name,)), MLPDistribution(data=(name,))):
        task = family.sample(generator())
        assert torch.isfinite(task.losses(*task.draw(2, generator()), task.batch(2, generator()))).all()


def test_an_unknown_name_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torchvision\.NAME\.SIDE"):
        images("nothing")


def test_quadratics_have_the_given_spectrum() -> None:
    data = Quadratic(QuadraticShape(seed=1, inputs=6, outputs=2, hidden=0, decades=1.5))
    values = torch.linalg.eigvalsh(data.x.T @ data.x)
    torch.testing.assert_close(values.log10().diff(), torch.full((5,), 1.5 / 5), rtol=1e-3, atol=1e-4)
    assert values.mean() == pytest.approx(1, rel=1e-4)


def test_losses() -> None:
    output, y = torch.randn(4, 3, 5, generator=generator()), torch.tensor([[0, 1, 2]] * 4)
    expected = nn.functional.cross_entropy(output.flatten(0, 1), y.flatten())
    torch.testing.assert_close(cross_entropy(output, y), expected)
    expected = nn.functional.cross_entropy(output.flatten(0, 1), y.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(smoothed(output, y), expected)
    one_hot = nn.functional.one_hot(y, 5)
    torch.testing.assert_close(one_hot_error(output, y), squared_error(output, one_hot) * 5 / 2)
    error = torch.tensor([0.0, 1e-2, 1e3])
    torch.testing.assert_close(squared_error(error, torch.zeros(3)), error.square().mean())
    torch.testing.assert_close(huber(error[1:2], torch.zeros(1)), error[1].square() / 2, rtol=1e-2, atol=1e-9)
    torch.testing.assert_close(huber(error[2:], torch.zeros(1)), error[2], rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("family", "attribute", "count"),
    [
        (CNNDistribution(), "norm", 3),
        (CNNDistribution(), "residual", 2),
        (CNNDistribution(), "batch_size", 10),
        (CNNDistribution(), "loss", 3),
        (ViTDistribution(), "norm", 2),
        (TransformerDistribution(), "loss", 2),
        (GRUDistribution(), "depth", 2),
        (GRUDistribution(), "norm", 2),
        (NgramDistribution(), "activation", 4),
        (VectorDistribution(), "loss", 5),
        (MLPDistribution(data=("digits", "mnist5k"), losses=("cross_entropy", "smoothed")), "data", 2),
        (VectorDistribution(), "initialisation", 3),
        (VectorDistribution(), "data", 6),
        (AutoencoderDistribution(), "widths", 20),
        (INRDistribution(), "sine", 2),
        (INRDistribution(), "activation", 4),
        (INRDistribution(), "loss", 2),
    ],
)
def test_members_of_a_family_vary(family: Any, attribute: str, count: int) -> None:
    draws = Draws(generator())
    assert len({getattr(family.shape(draws), attribute) for _ in range(60)}) >= count
