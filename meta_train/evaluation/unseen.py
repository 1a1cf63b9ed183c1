"""The test tasks: for the final report only, not for any selection.

Their data, sizes, networks and losses differ from those of the recipes; two of them are trained for five times the
longest horizon of meta-training (1,000 steps), one has a layer a hundred times as wide as its widest (128 neurons).
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import nn

from meta_train.evaluation import losses
from meta_train.evaluation.bare_attention import imitation
from meta_train.evaluation.datasets import (
    CHARACTERS,
    Examples,
    auto_mpg,
    characters,
    clusters,
    images,
    photograph,
)
from meta_train.evaluation.gpt import GPT
from meta_train.evaluation.graphs import MessagePassing, node_prediction, points
from meta_train.evaluation.networks import (
    VAE,
    CharacterRNN,
    CharacterTransformer,
    Denoiser,
    FourierMLP,
    ResidualMLP,
    Siren,
    ViT,
    cnn,
    convolutional_autoencoder,
    mlp,
    resnet,
    with_zero_output,
)
from meta_train.evaluation.recommendation import Recommender, interactions
from meta_train.evaluation.task import Task, Training
from meta_train.evaluation.vocabulary import tokens

FASHION, CIFAR = "fashion_mnist.npz", "cifar10.npz"
PAIR, PAIRS = r"(?s)..", 3072
FIELDS = (8000, 5000, 1000, 200, 50)


def wide_mlp(data: Path) -> Training:
    """A layer a hundred times as wide as the widest of meta-training."""
    return losses.classification(mlp(64, 12_800, 10), images(data, FASHION, 8), 64)


def deep_mlp(data: Path) -> Training:
    """Eight hidden layers."""
    return losses.classification(mlp(64, *8 * (48,), 10, act=nn.Tanh), images(data, FASHION, 8), 64)


def long_mlp(data: Path) -> Training:
    """Five times the longest horizon of meta-training."""
    return losses.classification(mlp(192, 48, 10), images(data, CIFAR, 8), 64)


def large_mlp(data: Path) -> Training:
    """Half a million parameters."""
    return losses.classification(mlp(768, 512, 256, 10), images(data, CIFAR, 16), 64)


def residual_mlp(data: Path) -> Training:
    """LayerNorm and residual blocks."""
    return losses.classification(ResidualMLP(192, 64, 4, 10), images(data, CIFAR, 8), 64)


def dropout_mlp(data: Path) -> Training:
    """Dropout."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    return losses.classification(model, images(data, FASHION, 28), 64)


def plain_cnn(data: Path) -> Training:
    """Convolutions on colour images, without a norm."""
    return losses.classification(cnn(12, norm=False, of=3, side=16, act=nn.GELU), images(data, CIFAR, 16), 64)


def normalised_cnn(data: Path) -> Training:
    """Convolutions on colour images with BatchNorm."""
    return losses.classification(cnn(12, norm=True, of=3, side=16), images(data, CIFAR, 16), 32)


def residual_cnn(data: Path) -> Training:
    """A ResNet."""
    return losses.classification(resnet(8), images(data, CIFAR, 16), 32)


def vision_transformer(data: Path) -> Training:
    """A ViT."""
    return losses.classification(ViT(16, 4, 32, 3), images(data, CIFAR, 16), 32)


def transformer(_data: Path) -> Training:
    """A language model with a tied embedding."""
    return losses.language(CharacterTransformer(CHARACTERS, 64, 48, 3, tied=True), characters("torch"), 64, 6)


def gru(_data: Path) -> Training:
    """A GRU language model."""
    return losses.language(CharacterRNN(CHARACTERS, 32, nn.GRU), characters("sympy"), 40, 16)


def lstm(_data: Path) -> Training:
    """An LSTM language model."""
    return losses.language(CharacterRNN(CHARACTERS, 24, nn.LSTM), characters("torch"), 40, 16)


def siren(_data: Path) -> Training:
    """An implicit neural representation with sine activations."""
    return losses.regression(Siren(2, 64, 64, 3), photograph("china", 64), 256)


def fourier(_data: Path) -> Training:
    """An implicit neural representation with Fourier features, five times the longest horizon of meta-training."""
    return losses.regression(FourierMLP(32, 64), photograph("flower", 64), 128)


def autoencoder(data: Path) -> Training:
    """A convolutional autoencoder."""
    found = images(data, CIFAR, 16)
    return losses.regression(convolutional_autoencoder(16), Examples(found.x, found.x, found.held_x, found.held_x), 32)


def vae(data: Path) -> Training:
    """A variational autoencoder."""
    return losses.variational(VAE(64, 128, 8), images(data, FASHION, 8), 64, 8)


def diffusion(data: Path) -> Training:
    """A denoising diffusion model."""
    return losses.denoising(Denoiser(64, 192), images(data, FASHION, 8), 64)


def contrast(data: Path) -> Training:
    """A contrastive loss."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32)
    )
    return losses.contrastive(model, images(data, CIFAR, 16), 64)


def table_regression(_data: Path) -> Training:
    """A small table with a robust loss."""
    return losses.regression(mlp(7, 64, 64, 1), auto_mpg(), 32, F.smooth_l1_loss)


def table_classification(_data: Path) -> Training:
    """A table with noisy labels; BatchNorm."""
    return losses.classification(mlp(24, 128, 128, 8, norm=nn.BatchNorm1d), clusters(), 128)


def policy(_data: Path) -> Training:
    """Policy gradient."""
    return losses.policy_gradient(mlp(50, 48, 48, 4, act=nn.Tanh), 5, 32)


def attention(_data: Path) -> Training:
    """Products of matrices, large weights, large batches."""
    return imitation(128, 1.0, fused=True, batch_size=512, length=64)


def small_attention(_data: Path) -> Training:
    """Products of matrices, weights of a few times their initial size."""
    return imitation(48, 0.5, fused=False, batch_size=96, length=24)


def graph(_data: Path) -> Training:
    """Messages along the edges of a graph: numbers that spread from node to node."""
    return node_prediction(MessagePassing(6, 24, 2), points(), 128)


def clicks(_data: Path) -> Training:
    """Embeddings of thousands of ids in five fields, rare events."""
    data = interactions(FIELDS, 300_000, clicks=True)
    return losses.regression(Recommender(FIELDS, 12, (48, 24)), data, 256, F.binary_cross_entropy_with_logits)


def gpt(_data: Path) -> Training:
    """A language model of 0.8 million weights with the usual initial weights and weight decay."""
    return losses.language(GPT(CHARACTERS, 64, 128, 4), characters("sympy"), 64, 16)


def zero_output(data: Path) -> Training:
    """Residual blocks and an output layer that start at zero."""
    model = with_zero_output(resnet(8))
    for name, p in model.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.zeros_(p)
    return losses.classification(model, images(data, CIFAR, 16), 32)


def pairs(_data: Path) -> Training:
    """Embeddings and outputs for thousands of pairs of characters."""
    return losses.language(CharacterTransformer(PAIRS, 32, 40, 2), tokens("torch", PAIR, PAIRS), 32, 12)


def very_long(data: Path) -> Training:
    """Ten times the longest horizon of meta-training; dropout."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 10))
    return losses.classification(model, images(data, FASHION, 8), 32)


TASKS = (
    Task("fashion 8x8, MLP 64-12800-10", "wide MLP", wide_mlp, 300, (FASHION,)),
    Task("fashion 8x8, MLP of 8 layers", "deep MLP", deep_mlp, 1000, (FASHION,)),
    Task("CIFAR 8x8, MLP, 5000 steps", "MLP, long", long_mlp, 5000, (CIFAR,)),
    Task("CIFAR 16x16, MLP 768-512-256-10", "large MLP", large_mlp, 300, (CIFAR,)),
    Task("CIFAR 8x8, residual MLP", "residual", residual_mlp, 600, (CIFAR,)),
    Task("fashion 28x28, MLP dropout", "MLP dropout", dropout_mlp, 800, (FASHION,)),
    Task("CIFAR 16x16, CNN", "CNN", plain_cnn, 500, (CIFAR,)),
    Task("CIFAR 16x16, CNN BatchNorm", "CNN BatchNorm", normalised_cnn, 500, (CIFAR,)),
    Task("CIFAR 16x16, ResNet", "residual CNN", residual_cnn, 300, (CIFAR,)),
    Task("CIFAR 16x16, ViT", "ViT", vision_transformer, 400, (CIFAR,)),
    Task("torch text, transformer", "transformer", transformer, 400, packages=("torch",)),
    Task("sympy text, GRU", "GRU", gru, 500, packages=("sympy",)),
    Task("torch text, LSTM", "LSTM", lstm, 500, packages=("torch",)),
    Task("photograph, SIREN", "INR", siren, 1000, packages=("scikit-learn",)),
    Task("photograph, Fourier MLP, 5000 steps", "INR, long", fourier, 5000, packages=("scikit-learn",)),
    Task("CIFAR 16x16, conv autoencoder", "autoencoder", autoencoder, 400, (CIFAR,)),
    Task("fashion 8x8, VAE", "VAE", vae, 800, (FASHION,)),
    Task("fashion 8x8, diffusion", "diffusion", diffusion, 1000, (FASHION,)),
    Task("CIFAR 16x16, contrastive", "contrastive", contrast, 400, (CIFAR,)),
    Task("auto-mpg, MLP", "tabular", table_regression, 1000, packages=("mlxtend",)),
    Task("clusters, MLP BatchNorm", "tabular", table_classification, 800, packages=("scikit-learn",)),
    Task("gridworld, policy gradient", "policy gradient", policy, 400),
    Task("attention teacher, 128, fused", "bare products", attention, 400),
    Task("small attention teacher, 48, separate", "bare products", small_attention, 300),
    Task("graph of points, messages", "graph", graph, 400),
    Task("clicks, recommender", "recommender", clicks, 700),
    Task("sympy text, GPT, decay .1", "GPT", gpt, 1500, packages=("sympy",), weight_decay=0.1),
    Task("CIFAR 16x16, ResNet, zero output", "zero output", zero_output, 400, (CIFAR,)),
    Task("torch text in pairs, transformer", "vocabulary", pairs, 500, packages=("torch",)),
    Task("fashion 8x8, MLP dropout, 10,000 steps", "MLP, very long", very_long, 10_000, (FASHION,)),
)
