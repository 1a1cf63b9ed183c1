"""The evaluation protocol of published learned optimizers, on the data that is available, with the published results.

Horizon 2,000; Adam at the best of the learning rates {0.0005 j, j = 1..20}, five seeds. The step reduction is in the
test loss: steps of Adam to its lowest one over the steps that the learned optimizer needs to reach it. The published
optimizers were meta-trained for each task; here the rule file is given. Batches (128 images; 32 passages of 32
characters) and the text of the language model differ from the publication, which used LM1B in subwords for 5,000 steps.

References:
    GradMetaNet (Gelberg et al., NeurIPS 2025), after Universal Neural Functionals (Zhou et al., 2024), Sec. 4.2
"""

from __future__ import annotations

from pathlib import Path

from meta_train.evaluation import losses
from meta_train.evaluation.datasets import CHARACTERS, characters, images
from meta_train.evaluation.networks import CharacterTransformer, mlp
from meta_train.evaluation.task import Task, Training

FASHION, CIFAR = "fashion_mnist.npz", "cifar10.npz"
TRAIN, TEST = 60_000, 10_000  # maximum number of images
ADAM_RATES = tuple(0.0005 * j for j in range(1, 21))


def fashion(data: Path) -> Training:
    """Grey images."""
    return losses.classification(mlp(64, 32, 10), images(data, FASHION, 8, TRAIN, TEST), 128, TEST)


def cifar(data: Path) -> Training:
    """Coloured images."""
    return losses.classification(mlp(192, 32, 10), images(data, CIFAR, 8, TRAIN, TEST), 128, TEST)


def text(_data: Path) -> Training:
    """A transformer of two blocks."""
    return losses.language(CharacterTransformer(CHARACTERS, 32, 32, 2), characters("torch"), 32, 32)


TASKS = (
    Task("FashionMNIST 8x8, MLP 32", "MLP", fashion, 2000, (FASHION,), checks=200),
    Task("CIFAR10 8x8, MLP 32", "MLP", cifar, 2000, (CIFAR,), checks=200),
    Task("text, transformer d=32", "transformer", text, 2000, packages=("torch",), checks=100),
)

COLUMNS = ("learned SGDM", "DeepSets", "UNF", "with per-sample gradients")
PUBLISHED = {
    "FashionMNIST 8x8, MLP 32": (1.13, 1.27, 1.16, 1.51),
    "CIFAR10 8x8, MLP 32": (1.41, 2.32, 2.64, 4.63),
    "text, transformer d=32": (1.01, 0.88, 1.48, 1.82),
}
"""Task -> step reductions over tuned Adam in the order of `COLUMNS`; for the last task on LM1B."""
