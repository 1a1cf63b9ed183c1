"""`python -m meta_train evaluate`: trainable tasks, optimizers with the documented settings, cached runs."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from data_folder import with_random_images
from inline import Pool
from torch import nn

from meta_train.evaluate import Folders, evaluate, labels_of
from meta_train.evaluation import losses, tiny
from meta_train.evaluation.bare_attention import AttentionLayer, imitation
from meta_train.evaluation.cache import Cache, Run
from meta_train.evaluation.gpt import GPT
from meta_train.evaluation.graphs import points
from meta_train.evaluation.hidden import hidden_matrices
from meta_train.evaluation.loop import scores_of, train
from meta_train.evaluation.muon import Float32Muon
from meta_train.evaluation.networks import CharacterTransformer, mlp
from meta_train.evaluation.optimizers import (
    DEFAULTS,
    PRIOR_ENTRIES,
    REAL_BASELINES,
    TUNED,
    Contender,
    Learned,
    Make,
    Setting,
    adam,
    adamw,
    contenders_of,
    fingerprint,
)
from meta_train.evaluation.recommendation import power_law
from meta_train.evaluation.rivals import (
    ademamix,
    muon,
    muon_for_all,
    muon_in_float32,
    nadamw,
    prodigy,
    schedule_free,
    sgd,
    soap,
    soap_stack,
    stack,
)
from meta_train.evaluation.source_text import source_text
from meta_train.evaluation.splits import SPLITS
from meta_train.evaluation.study import Job, Study, cache_key_of
from nfn_optim import NFNOptimizer, UpdateRule, pretrained

ROOT = Path(__file__).parent.parent
INF = math.inf


# --------------------------------------------------------------------------------------------------- source texts

SOURCE = '''
"""A module."""
RATE = 3
OTHER = 4

def inner(x):
    """A docstring."""
    return x * RATE

class Network:
    def __init__(self):
        self.x = inner(1)

def task(data):
    return Network(), data

def unrelated():
    return OTHER
'''


@pytest.fixture
def module_of(tmp_path: Path) -> Callable[[str], ModuleType]:
    made = []

    def load(source: str) -> ModuleType:
        made.append(source)
        path = tmp_path / f"benchmark_{len(made)}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("benchmark_module", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["benchmark_module"] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("RATE = 3", "RATE = 2", False),
        ("x * RATE", "x + RATE", False),
        ("inner(1)", "inner(2)", False),
        ("Network(), data", "Network(), None", False),
        ("OTHER = 4", "OTHER = 5", True),
        ("return OTHER", "return -OTHER", True),
        ("A docstring.", "Another one.", True),
        ("return x * RATE", "# why\n    return (x *\n            RATE)", True),
    ],
)
def test_a_source_text_has_all_dependencies_and_nothing_else(
    module_of: Callable[[str], ModuleType], old: str, new: str, same: bool
) -> None:
    before = source_text(module_of(SOURCE).task)
    assert SOURCE.count(old) == 1
    assert (source_text(module_of(SOURCE.replace(old, new)).task) == before) is same


# ----------------------------------------------------------------------------------------------- tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_random_images(tmp_path_factory.mktemp("data"))


EVERY_TASK = {task.name: task for split in SPLITS.values() for task in split.tasks}


@pytest.mark.parametrize("name", EVERY_TASK)
@pytest.mark.usefixtures("short_pretraining")
def test_a_task_is_an_ordinary_training_run(name: str, folder: Path) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        training = EVERY_TASK[name].begin(folder)
        loss = training.loss(torch.Generator().manual_seed(4))
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in training.model.parameters() if p.requires_grad]
        assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)
        assert any(bool(g.any()) for g in gradients if g is not None)
        random = torch.get_rng_state()
        scores = scores_of(training, [])
        assert torch.equal(random, torch.get_rng_state())
        assert scores == scores_of(training, [])
        assert math.isfinite(scores["loss"])
        assert 0 <= scores.get("accuracy", 0.5) <= 1
        found.append((loss.item(), scores))
    assert found[0] == found[1]


def test_the_number_of_tasks_is_as_documented() -> None:
    assert len(SPLITS["development"].tasks) == 23
    assert len(SPLITS["test"].tasks) == 30
    assert len(SPLITS["real"].tasks) == 9
    assert len(EVERY_TASK) == sum(len(split.tasks) for split in SPLITS.values()), "two tasks have the same name"
    assert sorted(task.steps for task in SPLITS["test"].tasks)[-3:] == [5000, 5000, 10_000]
    for split in ("development", "test"):
        kinds = {task.kind for task in SPLITS[split].tasks}
        assert {"bare products", "graph", "recommender", "GPT", "zero output", "vocabulary"} <= kinds
        assert [task.weight_decay for task in SPLITS[split].tasks if task.kind == "GPT"] == [0.1]
    assert {task.name for task in SPLITS["published"].tasks} == set(SPLITS["published"].published)


def test_a_teacher_is_the_same_for_all_seeds_and_can_be_imitated_exactly() -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        training = imitation(8, 1.0, fused=True, batch_size=4, length=3)
        training.model.load_state_dict({"out.weight": torch.zeros(8, 8)}, strict=False)
        found.append(training.held_out()["loss"])
    assert found[0] == found[1] > 0.1
    student = AttentionLayer(8, fused=False)
    fused = AttentionLayer(8, fused=True)
    fused.load_state_dict(
        {"qkv.0.weight": torch.cat([part.weight for part in student.qkv]), "out.weight": student.out.weight}
    )
    x = torch.randn(2, 3, 8)
    assert torch.allclose(student(x), fused(x), atol=1e-6)
    generator = torch.Generator().manual_seed(0)  # the weights of the teacher
    training = imitation(8, 1.0, fused=True, batch_size=4, length=3)
    for p in training.model.parameters():
        nn.init.uniform_(p, -1.0, 1.0, generator=generator)
    assert training.held_out()["loss"] == 0


def test_a_gpt_starts_as_people_start_it() -> None:
    torch.manual_seed(0)
    found = {name: p.std().item() for name, p in GPT(96, 64, 128, 4).named_parameters() if p.dim() > 1}
    residual = {name: std for name, std in found.items() if name.endswith(("out.weight", "down.weight"))}
    assert len(residual) == 8
    assert list(residual.values()) == pytest.approx([0.02 / 8**0.5] * 8, rel=0.05)
    assert [std for name, std in found.items() if name not in residual] == pytest.approx([0.02] * 10, rel=0.05)
    assert sum(p.numel() for p in GPT(96, 64, 128, 4).parameters()) == pytest.approx(8e5, rel=0.05)


def test_frequent_ids_follow_the_power_law() -> None:
    ids = power_law(1000, 50_000, torch.Generator().manual_seed(0))
    counts = ids.bincount(minlength=1000).sort(descending=True).values
    assert counts[0].item() / counts[99].item() == pytest.approx(100**0.8, rel=0.15)


def test_the_target_of_a_graph_depends_on_neighbours() -> None:
    graph = points()
    x = torch.cat([graph.x, torch.ones(len(graph.x), 1)], -1)
    own = x @ torch.linalg.lstsq(x, graph.y).solution
    around = torch.cat([x, graph.x[graph.neighbours].mean(1)], -1)
    both = around @ torch.linalg.lstsq(around, graph.y).solution
    assert (graph.y - both).square().mean() < 0.9 * (graph.y - own).square().mean()


def test_recipes_and_benchmarks_share_no_data() -> None:
    benchmark = {"fashion", "cifar", "load_sample_image", "autompg", "make_classification", "scipy", "sympy", "getdoc"}
    benchmark |= {"matplotlib", "networkx"}
    recipes = {
        "mnist.npz",
        "load_digits",
        "load_wine",
        "load_breast_cancer",
        "load_diabetes",
        "mnist_data",
        "pydoc_data",
    }
    training = [*(ROOT / "meta_train" / "tasks").rglob("*.py"), ROOT / "meta_train" / "recipes.py"]
    evaluation = list((ROOT / "meta_train" / "evaluation").rglob("*.py"))
    for paths, words in ((training, benchmark), (evaluation, recipes)):
        assert len(paths) > 1
        for path in paths:
            text = re.sub(r"fashion_mnist\.npz", "fashion", path.read_text().lower())
            assert not [word for word in words if word in text], path


def test_the_policy_gradient_is_the_gradient_of_the_cost() -> None:
    torch.manual_seed(0)
    training = losses.policy_gradient(mlp(18, 16, 4, act=nn.Tanh), 3, 64)
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-2)
    batches = torch.Generator().manual_seed(0)
    before = scores_of(training, [])["loss"]
    for _ in range(40):
        loss = training.loss(batches)
        assert 0 <= loss.item() <= 1
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert scores_of(training, [])["loss"] < 0.7 * before


# ---------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    ("setting", "factors"),
    [
        (Setting(adamw), {0: 1.0, 50: 1.0, 99: 1.0}),
        (Setting(adamw, cosine=True), {0: 1.0, 50: 0.5, 99: 0.5 + 0.5 * math.cos(0.99 * math.pi)}),
        (Setting(adamw, warmup=True), {0: 0.1, 4: 0.5, 9: 1.0, 99: 1.0}),
        (Setting(adamw, cosine=True, warmup=True), {4: 0.5 * (0.5 + 0.5 * math.cos(0.04 * math.pi)), 50: 0.5}),
    ],
)
def test_schedules(setting: Setting, factors: dict[int, float]) -> None:
    for step, factor in factors.items():
        assert setting.factor(step, 100) == pytest.approx(factor)


MUON_MAKES = (muon, muon_for_all, muon_in_float32)
BASELINES = (adamw, sgd, *MUON_MAKES, schedule_free, nadamw, soap, ademamix, stack, soap_stack)


@pytest.mark.parametrize("setting", [*(Setting(make, 0.02) for make in BASELINES), Setting(prodigy, 1.0)], ids=str)
def test_baselines_learn_and_have_every_parameter_once(setting: Setting) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.Flatten(), mlp(24, 16, 1))
    optimizers = setting.optimizers(model, 80)
    ids = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    x = torch.randint(5, (32, 3))
    found = []
    for _ in range(80):
        loss = (model(x) - x.sum(1, keepdim=True) / 4).square().mean()
        found.append(loss.item())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert found[-1] < 0.3 * found[0]


INNER = {f"blocks.0.{part}.weight" for part in ("qkv", "out", "up", "down")}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("make", "outer"), [(muon, set()), (muon_for_all, {"place", "head.weight"}), (muon_in_float32, set())]
)
def test_muon_has_the_hidden_matrices(make: Make, outer: set[str], tied: bool) -> None:
    model = CharacterTransformer(10, 4, 8, 1, tied=tied)
    matrices, others = make(model, 1e-3, None)
    assert isinstance(matrices, torch.optim.Muon | Float32Muon)
    names = {id(p): name for name, p in model.named_parameters()}
    held = {names[id(p)] for p in matrices.param_groups[0]["params"]}
    assert held == INNER | (outer - {"head.weight"} if tied else outer)
    assert len(others.param_groups[0]["params"]) == len(names) - len(held)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_muon_in_float32_is_muon_but_for_rounding(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    theirs = torch.optim.Muon([first], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    own = Float32Muon([second], lr=0.1)
    own.param_groups[0]["weight_decay"] = 0.3
    for _ in range(4):
        first.grad = torch.randn(shape, generator=generator)
        second.grad = first.grad.clone()
        theirs.step()
        own.step()
    assert (first - second).norm() < 0.02 * (first - 1).norm()


def test_a_square_last_matrix_is_hidden_and_so_are_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Embedding(5, 4), nn.Linear(4, 4))
    assert [tuple(p.shape) for p in hidden_matrices(model)] == [(4, 3, 3, 3), (4, 4)]


def test_weight_decay_reaches_every_parameter_of_every_optimizer() -> None:
    contenders = [*PRIOR_ENTRIES, *REAL_BASELINES, TUNED, DEFAULTS, *contenders_of("default", "default", thorough=True)]
    for setting in (contender.grid[0] for contender in contenders):
        plain, decayed = (
            [g["weight_decay"] for o in setting.optimizers(mlp(4, 4, 4, 2), 9, *wd) for g in o.param_groups]
            for wd in ((), (0.1,))
        )
        assert decayed == [0.1] * len(decayed)
        assert plain == [0.01 if setting.name == "adamw_defaults" else 0.0] * len(plain)


def test_grids_have_the_documented_size() -> None:
    def shape(contender: Contender) -> tuple[int, int]:
        return len({s.lr for s in contender.grid}), len({(s.cosine, s.warmup) for s in contender.grid})

    assert {contender.name: shape(contender) for contender in (TUNED, DEFAULTS, *PRIOR_ENTRIES)} == {
        "AdamW tuned": (8, 4),
        "AdamW defaults": (1, 1),
        "SGD momentum tuned": (6, 4),
        "Muon tuned": (7, 2),
        "Muon for all matrices tuned": (7, 2),
        "schedule-free tuned": (6, 2),
        "NadamW tuned": (6, 4),
        "SOAP tuned": (5, 4),
        "AdEMAMix tuned": (6, 4),
        "Prodigy tuned": (4, 4),
        "Muon stack tuned": (7, 2),
        "SOAP-Muon stack tuned": (7, 2),
        "nominal rule": (1, 1),
    }
    quick, complete = (contenders_of("x", "x", thorough=thorough) for thorough in (False, True))
    assert [contender.grid[0].horizon_known for contender in quick] == [False, True]
    assert complete[:2] == quick
    assert len(complete[2].grid) == 3


def test_the_page_has_every_optimizer_with_its_number_of_settings() -> None:
    page = (ROOT / "docs" / "benchmark.md").read_text()
    for contender in (TUNED, *PRIOR_ENTRIES):
        if len(contender.grid) > 1:
            assert f"| {contender.name} | {len(contender.grid)} |" in page


def test_without_symmetry_no_axis_is_shared() -> None:
    model = mlp(3, 4, 2)
    (optimizer,) = Learned("default", without_symmetry=True)(model, 1e-3, 7)
    assert isinstance(optimizer, NFNOptimizer)
    assert optimizer.symmetry is not None
    assert len(optimizer.symmetry.axes) == 2 + 1 + 2 + 1  # a matrix has two, a bias one
    assert optimizer.param_groups[0]["total_steps"] == 7


def test_a_fingerprint_depends_on_theta_and_behaviour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    known = fingerprint("default")
    assert torch.equal(before, torch.get_rng_state())
    assert fingerprint("default") == known != fingerprint("adamw")
    rule = pretrained.load("default")
    pretrained.save(rule, tmp_path / "copy.safetensors")
    assert fingerprint(str(tmp_path / "copy.safetensors")) == known
    next(rule.parameters()).data.view(-1)[0] += 1e-6
    pretrained.save(rule, tmp_path / "other.safetensors")
    assert fingerprint(str(tmp_path / "other.safetensors")) != known
    wider = UpdateRule(replace(rule.config, rank=8))
    wider.load_state_dict(rule.state_dict())
    pretrained.save(wider, tmp_path / "wider.safetensors")
    assert fingerprint(str(tmp_path / "wider.safetensors")) != fingerprint(str(tmp_path / "other.safetensors"))
    step_ = UpdateRule.step_

    def changed(*args: object, lr: float, **kwargs: object) -> object:
        return step_(*args, lr=1.1 * lr, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(UpdateRule, "step_", changed)
    assert fingerprint("default") != known


# --------------------------------------------------------------------------------------------------------- cache


def test_runs_are_restored_and_damaged_files_are_ignored(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    key, run = {"seed": 1}, Run([1.0, INF], [(1, {"loss": 0.1 + 0.2})], 0.5, 1, 2)
    assert cache.get(key) is None
    cache.put(key, run)
    assert cache.get(key) == run
    assert cache.get({"seed": 2}) is None
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]
    path = cache.path(key)
    path.write_text(path.read_text()[:-20])
    assert cache.get(key) is None


def test_a_cache_key_changes_with_everything_that_a_run_depends_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "file").write_bytes(b"two")
    task = replace(tiny.TASKS[0], files=("file",))
    job = Job(task, Setting(adamw), 0)
    variants = [
        (job, tmp_path),
        (job, other),
        (job._replace(seed=1), tmp_path),
        (job._replace(task=replace(task, steps=41)), tmp_path),
        (job._replace(task=replace(task, begin=tiny.quadrants)), tmp_path),
        (job._replace(task=replace(task, packages=("torch",))), tmp_path),
        *((job._replace(setting=Setting(make)), tmp_path) for make in (sgd, Learned("default"), Learned("adamw"))),
        (job._replace(setting=Setting(Learned("default", without_symmetry=True))), tmp_path),
        *(
            (job._replace(setting=replace(job.setting, **{flag: True})), tmp_path)
            for flag in ("cosine", "warmup", "horizon_known")
        ),
        (job._replace(setting=Setting(adamw, 2e-3)), tmp_path),
    ]
    keys = [json.dumps(cache_key_of(*variant), sort_keys=True) for variant in variants]
    assert len(set(keys)) == len(variants)
    assert "pytorch_optimizer" in cache_key_of(job._replace(setting=Setting(soap)), tmp_path)["packages"]
    decayed = replace(task, weight_decay=0.1)
    assert cache_key_of(job._replace(task=decayed), tmp_path) != cache_key_of(job, tmp_path)
    renamed = replace(task, name="another name", kind="of another kind")
    assert cache_key_of(job._replace(task=renamed), tmp_path) == cache_key_of(job, tmp_path)


def test_cached_runs_are_not_repeated_and_the_best_setting_is_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny.TASKS[0]
    contender = Contender("tuned", (Setting(adamw, 1e-4), Setting(adamw, 3e-2), Setting(adamw, 1e-3)))
    study = Study((task,), (contender,), 2, tmp_path, tmp_path / "cache")
    for setting, seed in [*((setting, 0) for setting in contender.grid), (contender.grid[1], 1)]:
        key = cache_key_of(Job(task, setting, seed), tmp_path)
        Cache(study.cache).put(key, train(task, setting, seed, tmp_path))
    monkeypatch.setattr("meta_train.evaluation.study.ProcessPoolExecutor", None)  # no run is missing
    (result,) = study.run(1)
    assert result.setting == contender.grid[1]
    assert len(result.runs) == 2
    assert result.runs[0].losses != result.runs[1].losses


def test_training_breaks_off_at_a_non_finite_loss(tmp_path: Path) -> None:
    run = train(tiny.TASKS[0], Setting(sgd, 1e20), 0, tmp_path)
    assert len(run.losses) == tiny.TASKS[0].steps
    assert math.isfinite(run.losses[0])
    assert run.losses[-1] == INF


# ----------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("rules", "labels"),
    [
        (("default",), ["default"]),
        (("runs/a/theta.safetensors", "default"), ["a", "default"]),
        (("x/a/theta.safetensors", "y/a/theta.safetensors"), ["x/a/theta.safetensors", "y/a/theta.safetensors"]),
        (("theta.safetensors",), ["theta.safetensors"]),
    ],
)
def test_labels_are_unique(rules: tuple[str, ...], labels: list[str]) -> None:
    assert labels_of(rules) == dict(zip(labels, rules, strict=True))


@pytest.mark.exhaustive
def test_the_published_protocol_is_compared_with_published_results(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    split = SPLITS["published"]
    short = replace(split, tasks=tuple(replace(task, steps=6, checks=3) for task in split.tasks))
    monkeypatch.setitem(SPLITS, "published", short)
    monkeypatch.setattr("meta_train.evaluation.study.ProcessPoolExecutor", Pool)
    evaluate("published", ("adamw", "default"), seeds=1, folders=Folders(folder, tmp_path / "cache", tmp_path / "out"))
    content = json.loads((tmp_path / "out" / "published.json").read_text())
    assert [row["settings"] for row in content["summary"]] == [20, 1, 1, 1, 1, 1]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| CIFAR10 8x8, MLP 32"))
    assert line.endswith("| 1.41 | 2.32 | 2.64 | 4.63 |")
    tuned = next(
        row for row in content["rows"] if row["task"].startswith("CIFAR10") and "Adam tuned" in row["optimizer"]
    )
    runs = [json.loads(path.read_text()) for path in (tmp_path / "cache").rglob("*.json")]
    begin = cache_key_of(Job(short.tasks[1], Setting(adam), 0), folder)["task"]
    grid = [r["run"] for r in runs if r["key"]["task"] == begin and "torch.optim.Adam(" in str(r["key"]["optimizer"])]
    assert len(grid) == 20
    assert tuned["loss"] == [min(scores["loss"] for run in grid for _, scores in run["held_out"])]


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one seed and one worker, found 0 and 2"):
        evaluate(seeds=0)
