"""Print and certify the symmetry of your network from the shell.

    python -m nfn_optim symmetry my_models:make

`make`, in `my_models.py` on the path, is a pair `(network, inputs)` or a function without arguments that returns one.
`inputs` is a tensor, a tuple of positional or a mapping of keyword arguments of the network's forward.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from nfn_optim.symmetry import certify, symmetry_of


def load(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Import a network and its inputs.

    Args:
        target: `module:name` of a pair `(network, inputs)`, or of a function that returns one.

    Returns:
        The network, its positional and its keyword arguments.

    Raises:
        ValueError: The target cannot be imported, or is not such a pair.
    """
    module, _, name = target.partition(":")
    if not name:
        raise ValueError(f"expected module:function, found {target!r}")
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"expected a function {name!r} in a module {module!r} on the path: {error}") from error
    value = value() if callable(value) and not isinstance(value, nn.Module) else value
    if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[0], nn.Module):  # noqa: PLR2004
        raise ValueError(f"expected {target} to return (network, inputs), found {type(value).__name__}")
    network, inputs = value
    if isinstance(inputs, Mapping):
        return network, (), dict(inputs)
    return network, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


def main() -> None:
    """Trace, print and certify; the exit status is 1 if the symmetry is not certified."""
    parser = argparse.ArgumentParser(
        prog="python -m nfn_optim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = parser.add_subparsers(required=True).add_parser("symmetry", help="print and certify a network's symmetry")
    command.add_argument("target", help="module:function that returns (network, inputs)")
    command.add_argument("--search", action="store_true", help="also look for symmetry that tracing missed")
    options = parser.parse_args()
    sys.path.insert(0, "")
    try:
        network, args, kwargs = load(options.target)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        symmetry = symmetry_of(network, *args, **kwargs)
        seconds = time.perf_counter() - start
    certificate = certify(network, symmetry, *args, search=options.search, **kwargs)
    notes = "".join(f"warning: {warning.message}\n" for warning in caught)
    sys.stdout.write(f"{symmetry}\n\n{notes}traced in {seconds:.2f} s\n{certificate}\n")
    sys.exit(0 if certificate.ok else 1)


if __name__ == "__main__":
    main()
