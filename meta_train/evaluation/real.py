"""Real use: what people train with AdamW, and how they train it, judged by held-out loss.

Networks of up to a million weights with augmentation, dropout, weight decay, mixed precision and accumulated gradients;
networks that are trained further, as a whole or by adapters. Every optimizer has the task's weight decay.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from meta_train.evaluation import losses
from meta_train.evaluation.accumulation import Accumulated
from meta_train.evaluation.adapters import adapt
from meta_train.evaluation.adversarial import GAN, adversarial
from meta_train.evaluation.augmentation import augmented_classification
from meta_train.evaluation.datasets import HELD, Examples, clusters, images
from meta_train.evaluation.gpt import GPT
from meta_train.evaluation.graphs import MessagePassing, node_prediction, points
from meta_train.evaluation.networks import mlp, resnet
from meta_train.evaluation.pretraining import (
    CODES,
    CONTEXT,
    codes,
    reduced_images,
    small_cnn,
    trained_gpt,
    trained_on_clothes,
    with_new_head,
)
from meta_train.evaluation.task import Scores, Task, Training

FASHION, CIFAR = "fashion_mnist.npz", "cifar10.npz"
FEW, MANY = 5000, 60_000  # images
LINEAR = ("qkv", "out", "up", "down")  # layers of a transformer that have adapters


# ----------------------------------------------------------------------------------------------- from the beginning


def residual_cnn(data: Path) -> Training:
    """A ResNet of 0.94 million weights on few images, which are cropped and reflected."""
    return augmented_classification(resnet(56), images(data, CIFAR, 16, FEW), 64, 2)


def gpt(_data: Path) -> Training:
    """A language model of a million weights of deviation .02."""
    return losses.language(GPT(CODES, CONTEXT, 128, 5), codes("numpy"), CONTEXT, 12)


def dropout_mlp(data: Path) -> Training:
    """Many steps on many images, with dropout."""
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.2)]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(256, 10))
    return losses.classification(model, images(data, FASHION, 8, MANY), 128)


def table(_data: Path) -> Training:
    """A table with wrong labels, with BatchNorm and dropout."""
    layers = [nn.Linear(24, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.3)]
    layers += [nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.3)]
    return losses.classification(nn.Sequential(*layers, nn.Linear(256, 8)), clusters(), 128)


def graph(_data: Path) -> Training:
    """Messages along the edges of a graph."""
    return node_prediction(MessagePassing(6, 48, 3), points(2400), 256)


def policy(_data: Path) -> Training:
    """Policy gradient on a grid of 7x7."""
    return losses.policy_gradient(mlp(98, 64, 64, 4, act=nn.Tanh), 7, 64)


def gan(data: Path) -> Training:
    """Generator and discriminator of 14x14 pixels, judged by the features of a CNN that was trained on clothes."""
    shown, held = (reduced_images(data, "fashion_mnist", p, 0, n)[0] for p, n in (("train", 10_000), ("test", HELD)))
    features = deepcopy(trained_on_clothes(small_cnn, data)[:-1]).eval().requires_grad_(False)
    return adversarial(GAN(16), shown, held, features, 64)


# ------------------------------------------------------------------------------------------------------ fine-tuning


def fine_tuned_cnn(data: Path) -> Training:
    """A CNN that was trained on clothes, on photographs in grey with a new last layer."""
    found = images(data, CIFAR, 16, FEW)
    grey = (x.mean(1, keepdim=True) for x in (found.x, found.held_x))
    x, held_x = ((part - part.mean()) / part.std() for part in grey)
    return losses.classification(
        with_new_head(trained_on_clothes(small_cnn, data)), Examples(x, found.y, held_x, found.held_y), 64
    )


def adapted_gpt(_data: Path) -> Training:
    """Adapters of rank 8 to a language model that was trained on other text, in bfloat16, of four batches a step."""
    model = adapt(deepcopy(trained_gpt("matplotlib")), LINEAR, 8, 16.0)
    return mixed_precision(losses.language(model, codes("networkx"), CONTEXT, 4), 4)


def mixed_precision(training: Training, count: int) -> Training:
    """The same with autocast to bfloat16, and the mean gradient of some batches for a step."""

    def loss(batches: torch.Generator) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return training.loss(batches).float()

    def held_out() -> Scores:
        with torch.autocast("cpu", torch.bfloat16):
            return training.held_out()

    return Accumulated(training.model, loss, held_out, count)


TASKS = (
    Task("CIFAR 16x16, ResNet 1M, augmented, decay .05", "ResNet", residual_cnn, 1000, (CIFAR,), weight_decay=0.05),
    Task("numpy text, GPT 1M, decay .1", "GPT", gpt, 1500, packages=("numpy",), weight_decay=0.1),
    Task("60,000 of fashion 8x8, MLP dropout, 10,000 steps", "MLP", dropout_mlp, 10_000, (FASHION,), weight_decay=0.01),
    Task("clusters, MLP BatchNorm, dropout", "tabular", table, 1500, packages=("scikit-learn",), weight_decay=0.01),
    Task("larger graph of points, messages", "graph", graph, 1000, weight_decay=0.01),
    Task("gridworld 7x7, policy gradient", "policy gradient", policy, 600),
    Task("fashion 14x14, GAN, Frechet distance", "GAN", gan, 1500, (FASHION,)),
    Task("CNN of clothes, fine-tuned", "fine-tuning", fine_tuned_cnn, 800, (FASHION, CIFAR), weight_decay=0.01),
    Task("GPT of matplotlib text, adapters, bfloat16", "LoRA", adapted_gpt, 300, packages=("matplotlib", "networkx")),
)
