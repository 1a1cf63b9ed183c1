"""The symmetry that an optimizer would find."""

from __future__ import annotations

from typing import Any

from torch import nn

from nfn_optim.optimizer.discovery import Discovery
from nfn_optim.symmetry import Symmetry


def live(module: nn.Module, *inputs: Any, **named: Any) -> Symmetry:
    """The symmetry of the parameters of a module, from a call of it."""
    discovery = Discovery(lambda: list(module.parameters()), recalls=False)
    try:
        module(*inputs, **named)
        found = discovery.found(dict(module.named_parameters()))
    finally:
        discovery.close()
    assert found is not None
    return found.symmetry
