"""Feature dictionaries, which all NF-layers map to each other: tensor name -> `(*batch, *shape, channels)`."""

from __future__ import annotations

from torch import Tensor


def module_key(name: str) -> str:
    """A parameter name as a key of `nn.ModuleDict` and `nn.ParameterDict`.

    Keys must not contain dots, nor be attributes of the container such as `values`.

    Example:
        >>> module_key("0.weight"), module_key("values")
        ('0/weight', '/values')
    """
    return name.replace(".", "/") if "." in name else f"/{name}"


def flatten_entries(x: Tensor, ndim: int) -> Tensor:
    """Flatten the `ndim` dimensions of a tensor into one. `(*batch, *shape, C)` to `(*batch, entries, C)`."""
    return x.flatten(-1 - ndim, -2) if ndim else x.unsqueeze(-2)
