"""The networks of benchmark tasks: ordinary modules, in various styles."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(
    *sizes: int, act: Callable[[], nn.Module] = nn.ReLU, norm: Callable[[int], nn.Module] | None = None
) -> nn.Module:
    """A multilayer perceptron on flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(fan_in, fan_out), *([] if norm is None else [norm(fan_out)]), act()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def cnn(channels: int, *, norm: bool, of: int = 1, side: int = 28, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Two convolutions with pooling, flatten, linear.

    Args:
        channels: Of the first convolution; the second has twice as many.
        norm: Whether to use BatchNorm.
        of: Channels of the images.
        side: Pixels of the images.
        act: The activation.
    """

    def block(given: int, made: int) -> list[nn.Module]:
        middle = [nn.BatchNorm2d(made)] if norm else []
        return [nn.Conv2d(given, made, 3, padding=1), *middle, act(), nn.MaxPool2d(2)]

    flat = 2 * channels * (side // 4) ** 2
    return nn.Sequential(*block(of, channels), *block(channels, 2 * channels), nn.Flatten(), nn.Linear(flat, 10))


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm and a skip connection."""

    def __init__(self, given: int, made: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, made, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(made)
        self.conv2 = nn.Conv2d(made, made, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(made)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or given != made:
            self.short = nn.Sequential(nn.Conv2d(given, made, 1, stride, bias=False), nn.BatchNorm2d(made))

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, given, side, side) -> (batch, made, side / stride, side / stride)`."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.short(x))


def resnet(channels: int) -> nn.Module:
    """Three residual blocks on colour images, mean over the image, linear."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, 1, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        ResidualBlock(channels, channels, 1),
        ResidualBlock(channels, 2 * channels, 2),
        ResidualBlock(2 * channels, 4 * channels, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * channels, 10),
    )


class ResidualMLP(nn.Module):
    """Residual blocks of LayerNorm, linear, GELU, linear."""

    def __init__(self, given: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(given, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, ...) -> (batch, classes)`."""
        h = self.embed(x.flatten(1))
        for block in self.blocks:
            h = h + block(h)
        y: Tensor = self.head(h)
        return y


class Block(nn.Module):
    """A pre-norm transformer block with a fused projection to queries, keys and values."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, length, width)` to the same."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, length, width / heads) each
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(a.transpose(1, 2).reshape(batch, length, width))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class CharacterTransformer(nn.Module):
    """A decoder that predicts the next character.

    Args:
        characters: Vocabulary size.
        context: Maximum number of characters.
        width: Channels.
        depth: Blocks.
        tied: Whether the output layer shares the weight of the embedding.
    """

    def __init__(self, characters: int, context: int, width: int, depth: int, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, length) -> (batch, length, characters)`."""
        h = self.embed(x) + self.place[: x.shape[1]]
        y: Tensor = self.head(self.norm(self.blocks(h)))
        return y


class CharacterRNN(nn.Module):
    """A recurrent network that predicts the next character.

    Args:
        characters: Vocabulary size.
        width: Of the embedding; the hidden state is twice as wide.
        cell: `nn.GRU` or `nn.LSTM`.
    """

    def __init__(self, characters: int, width: int, cell: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.cell = cell(width, 2 * width, batch_first=True)
        self.head = nn.Linear(2 * width, characters)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, length) -> (batch, length, characters)`."""
        y: Tensor = self.head(self.cell(self.embed(x))[0])
        return y


class ViT(nn.Module):
    """A vision transformer on colour images with a class token."""

    def __init__(self, side: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, 3, side, side) -> (batch, 10)`."""
        h = self.patches(x).flatten(2).transpose(1, 2)  # (batch, patches, width)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.place
        y: Tensor = self.head(self.norm(self.blocks(h))[:, 0])
        return y


class Siren(nn.Module):
    """A perceptron with sine activations on positions.

    Args:
        sizes: Inputs, hidden neurons of each layer, outputs.
        frequency: Factor of the argument of every sine.
    """

    def __init__(self, *sizes: int, frequency: float = 20.0) -> None:
        super().__init__()
        self.frequency = frequency
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes))
        for i, (layer, fan_in) in enumerate(zip(self.layers, sizes, strict=False)):
            bound = math.sqrt(6 / fan_in) / frequency if i else 1 / fan_in
            nn.init.uniform_(layer.weight, -bound, bound)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, inputs) -> (batch, outputs)`."""
        for layer in self.layers[:-1]:
            x = torch.sin(self.frequency * layer(x))
        y: Tensor = self.layers[-1](x)
        return y


class FourierMLP(nn.Module):
    """A ReLU network on fixed random Fourier features of the position."""

    frequencies: Tensor

    def __init__(self, features: int, width: int, *, frequency: float = 8.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequency * torch.randn(2, features))
        self.net = mlp(2 * features, width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, 2) -> (batch, 3)`."""
        phase = x @ self.frequencies
        y: Tensor = self.net(torch.cat([phase.sin(), phase.cos()], -1))
        return y


def convolutional_autoencoder(channels: int) -> nn.Module:
    """From colour images of 16x16 pixels to 4x4 and back, the latter by transposed convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(channels, 2 * channels, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(2 * channels, 6, 1),
        nn.ConvTranspose2d(6, 2 * channels, 4, 2, 1),
        nn.GELU(),
        nn.ConvTranspose2d(2 * channels, 3, 4, 2, 1),
    )


class VAE(nn.Module):
    """A variational autoencoder of vectors.

    Args:
        given: Size of the vectors.
        width: Hidden neurons of encoder and decoder.
        latent: Latent dimensions.
    """

    def __init__(self, given: int, width: int, latent: int) -> None:
        super().__init__()
        self.encoder = mlp(given, width, 2 * latent, act=nn.SiLU)
        self.decoder = mlp(latent, width, given, act=nn.SiLU)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction `(batch, given)` and divergence from the prior `(batch,)`, for noise `(batch, latent)`."""
        mean, log_variance = self.encoder(x).chunk(2, -1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), divergence


class Denoiser(nn.Module):
    """A noise prediction for a vector at a diffusion time between 0 and 1."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.time = nn.Linear(16, width)
        self.into = nn.Linear(given, width)
        self.middle = nn.Linear(width, width)
        self.out = nn.Linear(width, given)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """`(batch, given), (batch, 1) -> (batch, given)`."""
        phase = t * 2.0 ** torch.arange(8)  # (batch, 8)
        h = F.silu(self.into(x) + self.time(torch.cat([phase.sin(), phase.cos()], -1)))
        y: Tensor = self.out(F.silu(self.middle(h)) + h)
        return y


def with_zero_output(model: nn.Module) -> nn.Module:
    """A model whose last linear layer is zero, so that all layers before it have no gradient at first."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return model
