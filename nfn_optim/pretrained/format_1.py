"""Reading rule files of format 1: other names, and hidden channels even where nothing was computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nfn_optim.layers.message_passing import HIDDEN_PARTS

FORMAT = "nfn_optim.rule.1"
_FIELDS = {
    "talk_every": "refresh_every",
    "bend": "cooldown_power",
    "fading": "inverse_time_power",
    "growth": "adapt_rate",
    "waning": "adapt_decay",
}
_MESSAGES = "network.message_passing"
_TENSORS = {
    "share": "direction.orthogonal_weight",
    "power": "network.power",
    "growth": "network.adapt_rate",
    "waning": "network.adapt_decay",
    "stack.embed_rows": f"{_MESSAGES}.row_embedding",
    "stack.embed_tensors": f"{_MESSAGES}.tensor_embedding",
    "stack.hear_neurons": f"{_MESSAGES}.neuron_to_row",
    "stack.hear_tensors": f"{_MESSAGES}.tensor_to_row",
    "stack.gather_rows": f"{_MESSAGES}.row_to_tensor",
    "stack.gather_all": f"{_MESSAGES}.tensors_to_tensor",
    "stack.read_rows": f"{_MESSAGES}.row_head",
    "stack.read_tensors.weight": f"{_MESSAGES}.tensor_head.weight",
    "stack.read_tensors.bias": f"{_MESSAGES}.tensor_bias",
    "stack.bypass_rows": f"{_MESSAGES}.row_skip",
    "stack.bypass_tensors": f"{_MESSAGES}.tensor_skip",
}


def convert(config: Mapping[str, Any], theta: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert configuration and theta; where the heads are zero, hidden channels are dropped, which changes nothing.

    Raises:
        ValueError: The rule has a network per weight, which this version cannot run.
    """
    entries = {_FIELDS.get(key, key): value for key, value in config.items()}
    if entries.pop("form", "linear") != "linear":
        raise ValueError("its form is 'network', which only earlier versions can run")
    entries.pop("weight_hidden", None)
    entries["learned"] = entries.get("hidden", 16) > 0
    rank = entries.pop("rank", 0)
    entries |= {"direction": "orthogonal", "rank": rank} if rank else {"direction": "adam"}
    renamed = {_renamed(name): value for name, value in theta.items()}
    heads = [value for name, value in renamed.items() if "_head." in name]
    if not any(bool(head.any()) for head in heads):
        entries |= {"hidden": 0, "rounds": 0}
        renamed = {name: value for name, value in renamed.items() if not any(part in name for part in HIDDEN_PARTS)}
    return entries, renamed


def _renamed(name: str) -> str:
    """The name of a tensor in this version."""
    for old, new in _TENSORS.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name
