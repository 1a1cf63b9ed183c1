"""The experiments on networks over weights run from the command line and write what they say, shortened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning import Trainer, largest
from pruning_criteria import TEMPERATURE, Criteria
from siren_readers import Messages, Moved
from torch import Tensor, nn
from torch.func import functional_call

from nfn_optim.layers import canonical_signs
from nfn_optim.populations import ClassifierZoo, Population, SirenZoo, load_images, outputs, positions, stacked

ROOT = Path(__file__).parent.parent
TINY = {
    "predict_generalization": ["--runs", "50", "--sizes", "30", "60", "--steps", "6", "--zoo-steps", "20"],
    "edit_images": ["--count", "40", "--held-out", "10", "--fit-steps", "20", "--epochs", "1", "--channels", "4"],
    "classify_images": ["--count", "30", "--held-out", "10", "--views", "2", "--fit-steps", "10", "--steps", "2"],
    "find_winning_tickets": ["--images", "digits", "--side", "8", "--width", "8", "--pairs", "14", "--held-out", "6"],
}
TINY["find_winning_tickets"] += ["--steps", "40", "--epochs", "1", "--channels", "4", "--sparsity", "0.8"]
WRITTEN = {
    "predict_generalization": ["weights_generalization" + end for end in (".json", ".md", "_scatter.png", "_tau.png")],
    "edit_images": ["weights_editing" + end for end in (".json", ".md", "_dilate.png")],
    "classify_images": ["weights_classification" + end for end in (".json", ".md", ".png")],
    "find_winning_tickets": ["weights_tickets" + end for end in (".json", ".md", "_masks.png")],
}
BASELINES = ("nfn's recipe", "flat perceptron, permuted", "Pointwise")
METHODS = dict.fromkeys(TINY, BASELINES)
METHODS["classify_images"] += ("statistics, boosting", "DeepSets", "messages, signs as they are", "queries: 64")
METHODS["find_winning_tickets"] = (
    "random, densities",
    "SNIP",
    "GraSP",
    "SynFlow",
    "Pointwise",
    "NF-layers, one gradient",
)


def figures_of(found: dict[str, Any]) -> list[float]:
    """Some scores of a report, between -1 and 1."""
    if "tau" in found:
        taus: list[float] = found["tau"]["Predictor"]["60"]
        return taus
    if "no edit" in found:
        errors: list[float] = found["no edit"]["mse"] + found["Pointwise"]["mse"]
        return errors
    if "dense" in found:
        kept: list[float] = found["SNIP"]["accuracy"] + found["NF-layers, one gradient"]["accuracy"]
        assert found["dense"]["accuracy"] > found["random, equal densities"]["accuracy"]
        return kept
    return list(found["queries: 64 learned points"]["accuracy"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("predict_generalization", marks=pytest.mark.exhaustive),
        "edit_images",
        pytest.param("classify_images", marks=pytest.mark.exhaustive),
        pytest.param("find_winning_tickets", marks=pytest.mark.exhaustive),
    ],
)
def test_an_experiment_writes_one_table_with_all_baselines(name: str, tmp_path: Path) -> None:
    folders = ["--populations", str(tmp_path / "networks"), "--out", str(tmp_path / "out")]
    command = [sys.executable, f"examples/weights/{name}.py", "--quick", *TINY[name], *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == WRITTEN[name]
    table = (tmp_path / "out" / WRITTEN[name][1]).read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    for method in METHODS[name]:
        assert any(row.startswith(f"| {method}") for row in rows), method
    assert len(rows) >= 10
    assert done.stdout.count("\n") > len(rows)
    found = json.loads((tmp_path / "out" / WRITTEN[name][0]).read_text())
    by_seed = figures_of(found)
    assert len(by_seed) >= 3
    assert all(0 < abs(x) < 1 for x in by_seed)


def some_sirens() -> tuple[SirenZoo, Population]:
    """Four, not fitted to anything."""
    torch.manual_seed(0)
    zoo = SirenZoo((2, 8, 8, 1))
    return zoo, Population(zoo.symmetry(), stacked([zoo.module() for _ in range(4)]))


@pytest.mark.parametrize("sines", [False, True])
def test_messages_depend_neither_on_the_order_of_neurons_nor_with_sines_on_signs(sines: bool) -> None:
    zoo, population = some_sirens()
    module = zoo.module()
    messages = Messages(population, module.frequency, 10, sines=sines).eval()
    found = messages(population.features())
    assert found.std(0).mean() > 1e-4
    moved = population.permuted(torch.Generator().manual_seed(0))
    torch.testing.assert_close(messages(moved.features()), found, rtol=1e-3, atol=1e-5)
    signed = messages(canonical_signs(population.features(), population.symmetry))
    torch.testing.assert_close(signed, found, rtol=1e-3, atol=1e-5) if sines else None
    assert sines or not torch.allclose(signed, found, rtol=1e-3, atol=1e-5)


class Kept(nn.Module):
    """Returns what it is given."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features


def test_moved_sirens_represent_moved_images() -> None:
    zoo, population = some_sirens()
    module, x = zoo.module(), positions(5)
    moved = Moved(Kept(), population, module, canonical=True)
    torch.manual_seed(3)
    features = moved(population.features())
    torch.manual_seed(3)
    matrices, shifts = torch.eye(2) + 0.1 * torch.randn(4, 2, 2), 0.1 * torch.randn(4, 2, 1)
    found = outputs(module, {name: v[..., 0] for name, v in features.items()}, x)
    for n in range(4):
        params = {name: v[n] for name, v in population.params.items()}
        expected = functional_call(module, params, (x @ matrices[n].T + shifts[n].T,))
        torch.testing.assert_close(found[n], expected, rtol=1e-3, atol=1e-4)
    assert moved.eval()(population.features()).keys() == features.keys()
    torch.testing.assert_close(moved(population.features()), population.features())


def test_masks_are_kept_in_training_and_scores_are_what_they_say() -> None:
    zoo, images = ClassifierZoo("mlp", (64, 8, 8, 10), 1, 1), load_images("digits").standardised()
    torch.manual_seed(0)
    networks = [zoo.module() for _ in range(3)]
    trainer, params = Trainer(networks[0], images, 5, 1e-2), stacked(networks)
    masks = largest({name: torch.rand_like(params[name]) for name in trainer.names}, 0.1)
    assert [sum(int(x[n].sum()) for x in masks.values()) for n in range(3)] == [66, 66, 66]  # of 656
    after = trainer.trained(params, masks)
    for name, mask in masks.items():
        changed = after[name] != params[name]
        assert not changed[mask == 0].any()
        assert changed[mask == 1].any()
    criteria, pruned = Criteria(networks[0], images), trainer.pruned(params, 0.1, 2)
    assert sum(float(x.sum()) for x in pruned.values()) == 3 * 66
    assert sum(float(x.sum()) for x in criteria.synflow(params, 0.1).values()) == 3 * 66

    weights = list(networks[1].parameters())
    loss = F.cross_entropy(networks[1](criteria.x), criteria.y)
    slopes = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(criteria.gradient(params)["layers.0.weight"][1], slopes[0], rtol=1e-3, atol=1e-6)
    snip = (weights[0] * slopes[0]).abs().detach()
    torch.testing.assert_close(criteria.snip(params)["layers.0.weight"][1], snip, rtol=1e-3, atol=1e-6)
    cooled = F.cross_entropy(networks[1](criteria.x) / TEMPERATURE, criteria.y)
    grads = torch.autograd.grad(cooled, weights, create_graph=True)
    squares = 0.5 * sum((g.square().sum() for g in grads), torch.zeros(()))
    expected = weights[0] * torch.autograd.grad(squares, weights)[0]  # H g is half the gradient of |g|^2
    torch.testing.assert_close(criteria.grasp(params)["layers.0.weight"][1], expected.detach(), rtol=1e-3, atol=1e-9)
