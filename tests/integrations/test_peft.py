"""peft: adapters are trained, and know the neurons of the frozen network between which they stand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from digits import axes_of, batches, falls, network, train
from torch import nn

from nfn_optim import NFNOptimizer

pytestmark = pytest.mark.slow

GIVEN: dict[str, Callable[[nn.Module], NFNOptimizer]] = {
    "model": lambda model: NFNOptimizer(model, lr=3e-3),
    "parameters": lambda model: NFNOptimizer(model.parameters(), lr=3e-3),
    "adapters": lambda model: NFNOptimizer((p for p in model.parameters() if p.requires_grad), lr=3e-3),
}


@pytest.mark.parametrize("given", GIVEN)
def test_only_adapters_are_trained(given: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(network(), LoraConfig(r=4, target_modules=["0", "2"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = GIVEN[given](model)
    assert falls(train(model, optimizer, batches(28)))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad
        assert (p in optimizer.state) == p.requires_grad
    axes, at = axes_of(optimizer), "base_model.model"
    for layer in ("0", "2"):  # the rank
        assert axes[f"{at}.{layer}.lora_A.default.weight"][0] == axes[f"{at}.{layer}.lora_B.default.weight"][1]
    hidden = axes[f"{at}.0.lora_B.default.weight"][0]
    assert hidden == axes[f"{at}.2.lora_A.default.weight"][1]
