"""Development tasks: for the selection of rules, recipes and their hyperparameters, not for claims."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from meta_train.evaluation import losses
from meta_train.evaluation.bare_attention import imitation
from meta_train.evaluation.datasets import CHARACTERS, Examples, characters, images, photograph
from meta_train.evaluation.gpt import GPT
from meta_train.evaluation.graphs import GraphConvolutions, node_prediction, similar_images
from meta_train.evaluation.networks import (
    VAE,
    CharacterRNN,
    CharacterTransformer,
    FourierMLP,
    ResidualMLP,
    Siren,
    cnn,
    mlp,
    with_zero_output,
)
from meta_train.evaluation.recommendation import Recommender, interactions
from meta_train.evaluation.task import Task, Training
from meta_train.evaluation.vocabulary import NextToken, windows

FASHION, CIFAR = "fashion_mnist.npz", "cifar10.npz"
WORD, WORDS = r"\w+|[^\w\s]", 4096
USERS, ITEMS = 4000, 2500


def small_mlp(data: Path) -> Training:
    """A width within the range of meta-training, on other images."""
    return losses.classification(mlp(64, 32, 10), images(data, FASHION, 8), 64)


def coloured_mlp(data: Path) -> Training:
    """Two hidden layers and another activation."""
    return losses.classification(mlp(192, 64, 64, 10, act=nn.GELU), images(data, CIFAR, 8), 128)


def large_mlp(data: Path) -> Training:
    """Many inputs."""
    return losses.classification(mlp(784, 128, 128, 10), images(data, FASHION, 28), 64)


def plain_cnn(data: Path) -> Training:
    """Convolutions."""
    return losses.classification(cnn(8, norm=False), images(data, FASHION, 28), 64)


def normalised_cnn(data: Path) -> Training:
    """Convolutions with BatchNorm."""
    return losses.classification(cnn(8, norm=True), images(data, FASHION, 28), 64)


def transformer(_data: Path) -> Training:
    """Attention on text."""
    return losses.language(CharacterTransformer(CHARACTERS, 48, 32, 2), characters("scipy"), 48, 8)


def gru(_data: Path) -> Training:
    """Recurrence on text."""
    return losses.language(CharacterRNN(CHARACTERS, 24, nn.GRU), characters("scipy"), 32, 12)


def autoencoder(data: Path) -> Training:
    """Regression with many outputs through a bottleneck."""
    found = images(data, FASHION, 28)
    x, held = found.x.flatten(1), found.held_x.flatten(1)
    return losses.regression(mlp(784, 96, 16, 96, 784), Examples(x, x, held, held), 64)


def wide_mlp(data: Path) -> Training:
    """A layer thirty times as wide as the widest of meta-training."""
    return losses.classification(mlp(192, 4096, 10), images(data, CIFAR, 8), 64)


def lstm(_data: Path) -> Training:
    """Recurrence on text by an LSTM."""
    return losses.language(CharacterRNN(CHARACTERS, 24, nn.LSTM), characters("scipy"), 32, 12)


def siren(_data: Path) -> Training:
    """An implicit neural representation with sine activations."""
    return losses.regression(Siren(2, 48, 48, 48, 3, frequency=30.0), photograph("grace_hopper", 56), 256)


def fourier(_data: Path) -> Training:
    """An implicit neural representation with Fourier features."""
    return losses.regression(FourierMLP(24, 48), photograph("grace_hopper", 56), 128)


def vae(data: Path) -> Training:
    """A variational autoencoder."""
    return losses.variational(VAE(192, 96, 12), images(data, CIFAR, 8), 64, 12)


def policy(_data: Path) -> Training:
    """Policy gradient."""
    return losses.policy_gradient(mlp(32, 32, 4), 4, 32)


def attention(_data: Path) -> Training:
    """Products of matrices, large weights."""
    return imitation(32, 1.0, fused=False, batch_size=64, length=32)


def fused_attention(_data: Path) -> Training:
    """Products of matrices, large weights, one matrix for queries, keys and values."""
    return imitation(64, 1.0, fused=True, batch_size=64, length=32)


def small_attention(_data: Path) -> Training:
    """Products of matrices, weights of a few times their initial size, one matrix for queries, keys and values."""
    return imitation(32, 0.6, fused=True, batch_size=64, length=32)


def wide_attention(_data: Path) -> Training:
    """Products of matrices, weights of a few times their initial size."""
    return imitation(64, 0.5, fused=False, batch_size=64, length=32)


def graph(data: Path) -> Training:
    """Graph convolutions: the class of images that are joined to similar ones."""
    return node_prediction(GraphConvolutions(64, 48, 10), similar_images(data, FASHION, 8, 2400), 128)


def ratings(_data: Path) -> Training:
    """Embeddings of thousands of users and items."""
    tables = (USERS, ITEMS)
    return losses.regression(Recommender(tables, 16, (32, 32)), interactions(tables, 200_000, clicks=False), 256)


def gpt(_data: Path) -> Training:
    """A language model with the usual initial weights and weight decay."""
    return losses.language(GPT(CHARACTERS, 48, 48, 2), characters("scipy"), 48, 8)


def zero_output(data: Path) -> Training:
    """An output layer that starts at zero."""
    return losses.classification(with_zero_output(ResidualMLP(64, 48, 3, 10)), images(data, FASHION, 8), 64)


def words(_data: Path) -> Training:
    """Embeddings and outputs for thousands of words."""
    return losses.classification(NextToken(WORDS, 4, 24, 64), windows("scipy", WORD, WORDS, 4), 128)


TASKS = (
    Task("fashion 8x8, MLP 64-32-10", "MLP", small_mlp, 1000, (FASHION,)),
    Task("CIFAR 8x8, MLP 192-64-64-10", "MLP", coloured_mlp, 1000, (CIFAR,)),
    Task("fashion 28x28, MLP 784-128-128-10", "MLP", large_mlp, 1000, (FASHION,)),
    Task("fashion 28x28, CNN", "CNN", plain_cnn, 600, (FASHION,)),
    Task("fashion 28x28, CNN BatchNorm", "CNN BatchNorm", normalised_cnn, 600, (FASHION,)),
    Task("text, transformer", "transformer", transformer, 500, packages=("scipy",)),
    Task("text, GRU", "GRU", gru, 600, packages=("scipy",)),
    Task("fashion 28x28, autoencoder", "autoencoder", autoencoder, 600, (FASHION,)),
    Task("CIFAR 8x8, MLP 192-4096-10", "wide MLP", wide_mlp, 300, (CIFAR,)),
    Task("text, LSTM", "LSTM", lstm, 500, packages=("scipy",)),
    Task("portrait, SIREN", "INR", siren, 1000, packages=("matplotlib",)),
    Task("portrait, Fourier MLP", "INR", fourier, 2000, packages=("matplotlib",)),
    Task("CIFAR 8x8, VAE", "VAE", vae, 800, (CIFAR,)),
    Task("small gridworld, policy gradient", "policy gradient", policy, 400),
    Task("attention teacher, 32, separate", "bare products", attention, 400),
    Task("attention teacher, 64, fused", "bare products", fused_attention, 400),
    Task("small attention teacher, 32, fused", "bare products", small_attention, 300),
    Task("small attention teacher, 64, separate", "bare products", wide_attention, 300),
    Task("graph of fashion 8x8, convolutions", "graph", graph, 500, (FASHION,)),
    Task("ratings, recommender", "recommender", ratings, 800),
    Task("text, GPT, decay .1", "GPT", gpt, 600, packages=("scipy",), weight_decay=0.1),
    Task("fashion 8x8, residual MLP, zero output", "zero output", zero_output, 600, (FASHION,)),
    Task("words, MLP", "vocabulary", words, 600, packages=("scipy",)),
)
