"""Print and certify the symmetry of your network from the shell.

    python -m nfn_optim symmetry my_models:make

`make` is a function without arguments, or a module, in `my_models.py` on the path. It returns the network and what its
forward takes: `(network, inputs)` with a tensor, a tuple of positional or a mapping of keyword inputs.
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
    """Get a network and its inputs.

    Args:
        target: `module:name`, where the name is a function that returns them, or a pair.

    Raises:
        ValueError: It is not such a thing.
    """
    module, _, name = target.partition(":")
    if not name:
        raise ValueError(f"expected module:function, found {target!r}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"expected a function {name!r} in a module {module!r} on the path: {error}") from error
    found = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], nn.Module):  # noqa: PLR2004
        raise ValueError(f"expected {target} to give (network, inputs), found {type(found).__name__}")
    network, inputs = found
    if isinstance(inputs, Mapping):
        return network, (), dict(inputs)
    return network, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


def main() -> None:
    """Trace, print, certify; the exit status is 1 if the symmetry is not certified."""
    parser = argparse.ArgumentParser(
        prog="python -m nfn_optim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = parser.add_subparsers(required=True).add_parser("symmetry", help="print and certify a network's symmetry")
    command.add_argument("target", help="module:function that returns (network, inputs)")
    command.add_argument("--search", action="store_true", help="look for symmetry that tracing missed, too")
    given = parser.parse_args()
    sys.path.insert(0, "")
    try:
        network, args, kwargs = load(given.target)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        begun = time.perf_counter()
        symmetry = symmetry_of(network, *args, **kwargs)
        seconds = time.perf_counter() - begun
    certificate = certify(network, symmetry, *args, search=given.search, **kwargs)
    notes = "".join(f"warning: {warning.message}\n" for warning in caught)
    sys.stdout.write(f"{symmetry}\n\n{notes}traced in {seconds:.2f} s\n{certificate}\n")
    sys.exit(0 if certificate.ok else 1)


if __name__ == "__main__":
    main()
