"""NF-layers in use: tutorial, conversion of modules, vmap and autograd, compilation, autocast, state dicts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nf_symmetries import SMALL, ZOO_HNP, assert_close, features_of
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, vmap

from nfn_optim.layers import (
    DeepSets,
    Entrywise,
    InvariantPool,
    LearnedEncoding,
    NFLinear,
    Scale,
    TensorNorm,
    WeightAttention,
    free_ends,
    state_dicts_of,
    weight_features,
)
from nfn_optim.symmetry import Symmetry

PAGE = Path(__file__).parent.parent / "docs" / "layers.md"
NETWORKS = ("cnn_batch_norm", "reused", "fused_qkv", "dense_with_gate", "experts")


def test_the_tutorial_runs() -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [len([line for line in block.splitlines() if line]) <= 12 for block in blocks] == [True] * 3
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["accuracy"].shape == (4, 1)
    symmetry, models = namespace["symmetry"], namespace["models"]
    permutations = symmetry.random_permutations(torch.Generator().manual_seed(0))
    permuted = [symmetry.permute(dict(model.named_parameters()), permutations) for model in models]
    expected = namespace["predictor"](weight_features(models, symmetry))
    torch.testing.assert_close(namespace["predictor"](weight_features(permuted, symmetry)), expected)


def test_modules_become_features_and_back() -> None:
    models = [nn.Linear(2, 3) for _ in range(4)]
    features = weight_features(models)
    assert {name: x.shape for name, x in features.items()} == {"weight": (4, 3, 2, 1), "bias": (4, 3, 1)}
    for model, state in zip(models, state_dicts_of(features), strict=True):
        assert all(torch.equal(state[name], p) for name, p in model.named_parameters())
    features["bias"].sum().backward()
    assert models[3].bias.grad is not None
    assert_close(weight_features([dict(m.named_parameters()) for m in models]), features)
    assert weight_features(models[0])["bias"].shape == (1, 3, 1)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "at least one model"),
        ([nn.Linear(2, 3), nn.Linear(2, 3, bias=False)], r"to have \['bias'\], model 1"),
        ([nn.Linear(2, 3), nn.Linear(3, 3)], "expected 'weight' of shape"),
    ],
)
def test_models_of_different_architectures_are_refused(models: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight_features(models)


def test_parameters_may_be_named_like_attributes_of_module_containers() -> None:
    symmetry = Symmetry({"values": ("h",), "type": ("h", "keys")}, {"h": 3, "keys": 2}, frozenset({"keys"}))
    network = nn.Sequential(
        DeepSets(symmetry, 1, 2), TensorNorm(symmetry, 2), Scale(symmetry), LearnedEncoding(symmetry, 2)
    )
    assert network.double()(features_of(symmetry, 1, 1))["type"].shape == (1, 3, 2, 2)


def test_several_channels_cannot_be_converted_to_weights() -> None:
    with pytest.raises(ValueError, match="expected one channel"):
        state_dicts_of({"w": torch.zeros(1, 2, 3)})


@pytest.mark.parametrize("name", NETWORKS)
def test_vmapped_over_networks_and_over_layers(name: str) -> None:
    symmetry, features = ZOO_HNP[name], features_of(ZOO_HNP[name], 2, 3)
    layers = [NFLinear(symmetry, 2, 2).double() for _ in range(2)]
    assert_close(vmap(layers[0])(features), layers[0](features))
    stacked = {n: torch.stack([dict(x.named_parameters())[n] for x in layers]) for n, _ in layers[0].named_parameters()}
    both = vmap(lambda theta: functional_call(layers[0], theta, (features,)))(stacked)
    for number, layer in enumerate(layers):
        assert_close({n: x[number] for n, x in both.items()}, layer(features))


@pytest.mark.parametrize("name", NETWORKS)
def test_vmapped_over_one_tensor(name: str) -> None:
    """The other tensors have no batch dimension."""
    symmetry, features = ZOO_HNP[name], features_of(ZOO_HNP[name], 2, 1)
    layer = NFLinear(symmetry, 2, 2).double()
    for batched in symmetry.dims:
        values = torch.stack([features[batched], 2 * features[batched]])
        actual = vmap(lambda x, batched=batched: layer({**features, batched: x}))(values)
        assert_close({n: x[1] for n, x in actual.items()}, layer({**features, batched: values[1]}))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_per_network(name: str) -> None:
    """The sum of gradients per network by vmap of grad equals the gradient of backward."""
    symmetry, features = ZOO_HNP[name], features_of(ZOO_HNP[name], 2, 2)
    layer = NFLinear(symmetry, 2, 1).double()
    theta = dict(layer.named_parameters())

    def loss(theta: dict[str, torch.Tensor], x: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(y.square().sum() for y in functional_call(layer, theta, (x,)).values())  # type: ignore[return-value]

    per_network = vmap(grad(loss), in_dims=(None, 0))(theta, features)
    loss(theta, features).backward()
    for n, p in theta.items():
        torch.testing.assert_close(per_network[n].sum(0), p.grad)


def test_first_and_second_derivatives_agree_with_finite_differences() -> None:
    for name in ("reused", "experts"):
        symmetry = free_ends(ZOO_HNP[name])
        features = {n: x.requires_grad_() for n, x in features_of(symmetry, 1, 1).items()}
        layer = NFLinear(symmetry, 1, 1).double()

        def function(*values: torch.Tensor, names: Any = tuple(features), layer: Any = layer) -> torch.Tensor:
            return torch.cat([y.tanh().flatten() for y in layer(dict(zip(names, values, strict=True))).values()])

        torch.autograd.gradcheck(function, tuple(features.values()), fast_mode=True)
        torch.autograd.gradgradcheck(function, tuple(features.values()), fast_mode=True)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # raised in torch
def test_jacobians_agree() -> None:
    """Forward mode, reverse mode and batched gradients, for an output that depends on pooled weights only."""
    symmetry = free_ends(ZOO_HNP["deep_mlp"])
    layer, features = NFLinear(symmetry, 1, 1).double(), features_of(symmetry, 1, 1)

    def bias(weight: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = layer({**features, "2.weight": weight})["2.bias"].flatten()
        return out

    weight = features["2.weight"].clone().requires_grad_()
    expected = jacrev(bias)(features["2.weight"])
    torch.testing.assert_close(jacfwd(bias)(features["2.weight"]), expected)
    eye = torch.eye(5, dtype=torch.float64)
    (batched,) = torch.autograd.grad(bias(weight), weight, eye, is_grads_batched=True)
    torch.testing.assert_close(batched, expected)


@pytest.mark.slow
def test_compiled() -> None:
    torch.manual_seed(0)
    symmetry = ZOO_HNP["mlp"]
    network = nn.Sequential(
        NFLinear(free_ends(symmetry), 1, 2),
        Entrywise(nn.ReLU()),
        NFLinear(symmetry, 2, 2),
        WeightAttention(symmetry, 2, 1),
    ).double()
    features = features_of(symmetry, 1, 2)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert_close(compiled(features), network(features))
    sum(y.square().sum() for y in network(features).values()).backward()
    expected = {n: p.grad for n, p in network.named_parameters()}
    network.zero_grad()
    sum(y.square().sum() for y in compiled(features).values()).backward()
    for n, p in network.named_parameters():
        torch.testing.assert_close(p.grad, expected[n])


@pytest.mark.parametrize("name", NETWORKS)
def test_autocast(name: str) -> None:
    torch.manual_seed(0)
    symmetry = ZOO_HNP[name]
    layers = NFLinear(symmetry, 2, 4), Entrywise(nn.ReLU()), NFLinear(symmetry, 4, 2)
    network = nn.Sequential(*layers, InvariantPool(symmetry, 2))
    features = {n: x.float() for n, x in features_of(symmetry, 2, 2).items()}
    expected = network(features)
    with torch.autocast("cpu", torch.bfloat16):
        actual = network(features)
    actual.float().sum().backward()
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("name", [*NETWORKS, *SMALL])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    symmetry = {**ZOO_HNP, **SMALL}[name]
    first, second = NFLinear(symmetry, 1, 2), NFLinear(symmetry, 1, 2)
    save_file(first.state_dict(), tmp_path / "layer.safetensors")
    second.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    features = {n: x.float() for n, x in features_of(symmetry, 1, 2).items()}
    assert_close(second(features), first(features), 0.0)
