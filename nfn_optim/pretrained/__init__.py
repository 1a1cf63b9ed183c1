"""Update rules as files: safetensors, loaded without pickle, checked against a hash, never fetched.

A rule file holds theta as tensors and, as text metadata, the `RuleConfig` and a SHA-256 over both. Files of the
previous format are converted when they are read. Each shipped rule `NAME.safetensors` has a card `NAME.md`: how it was
made, how it performs, and where it is bad.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nfn_optim.engine.replaced_file import replaced
from nfn_optim.pretrained import format_1
from nfn_optim.rule import RuleConfig, UpdateRule

DEFAULT = "base"
"""What the name `"default"` stands for."""
FORMAT = "nfn_optim.rule.2"
_FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The rules inside the package; `"adamw"` needs no file, and `"default"` is another name of one of the others."""
    return ("adamw", "default", *sorted(path.stem for path in _FOLDER.glob("*.safetensors")))


def card(name: str = "default") -> str:
    """The card of a rule inside the package, Markdown.

    Raises:
        ValueError: There is no such rule.
    """
    path = _shipped(name, "md")
    if not path.is_file():
        raise ValueError(f"expected the name of a shipped rule, one of {names()[1:]}, found {name!r}")
    return path.read_text(encoding="utf-8")


def save(rule: UpdateRule, path: str | os.PathLike[str]) -> str:
    """Write a rule; an existing file is replaced at once or not at all.

    Args:
        rule: The rule.
        path: Where to; by convention `*.safetensors`.

    Returns:
        The SHA-256 of configuration and theta, hexadecimal.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(path)
    config, theta = _written(rule)
    sha256 = _digest(config, theta)
    try:
        with replaced(path) as partial:
            # one entry, since the order of several is not the same from file to file
            save_file(theta, partial, metadata={FORMAT: json.dumps({"config": config, "sha256": sha256})})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}); what was there before is still there") from error
    return sha256


def load(name_or_path: str | os.PathLike[str] = "default") -> UpdateRule:
    """Read a rule.

    Args:
        name_or_path: A name in `names()`, or the path of a rule file.

    Returns:
        The rule, in evaluation mode, its theta not requiring gradients, on the CPU.

    Raises:
        FileNotFoundError: Neither a shipped rule nor a file.
        ValueError: The file is truncated, was changed, or is not a rule.
    """
    if name_or_path == "adamw":
        return UpdateRule.adamw().eval()
    path = _shipped(os.fspath(name_or_path), "safetensors")
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a shipped rule, one of {names()}, or the path of a rule file, found {str(name_or_path)!r}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # copies, since matrix products round differently for other alignments than torch's
            theta = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or install it again") from error
    version = next((version for version in (FORMAT, format_1.FORMAT) if version in metadata), None)
    if version is None:
        raise ValueError(
            f"expected {path} to be a rule, with metadata {FORMAT!r}, found {sorted(metadata)}; "
            f"write rules with nfn_optim.pretrained.save"
        )
    try:
        stated = json.loads(metadata[version])
        config, expected = str(stated["config"]), str(stated["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise _not_a_rule(path, error) from error
    found = _digest(config, theta)
    if found != expected:
        raise ValueError(
            f"{path} was changed after it was written: expected SHA-256 {expected}, found {found}; "
            f"copy or install it again"
        )
    try:
        entries = json.loads(config)
        if version == format_1.FORMAT:
            entries, theta = format_1.convert(entries, theta)
        rule = _build(RuleConfig(**entries), theta)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _not_a_rule(path, error) from error
    return rule.requires_grad_(False).eval()


def _shipped(name: str, suffix: str) -> Path:
    """The file of a shipped rule, if there is one of that name."""
    return _FOLDER / f"{DEFAULT if name == 'default' else name}.{suffix}"


def _build(config: RuleConfig, theta: Mapping[str, Tensor]) -> UpdateRule:
    """Build a rule from a file; a hash is no signature, so nothing large is allocated before it is known to fit."""
    numbers = sum(value.numel() for value in theta.values())
    if max(config.hidden, config.rounds) > numbers + RuleConfig.hidden:
        raise ValueError(f"{config} is too large for {numbers} numbers")
    with torch.device("meta"):  # draws no random numbers: constructing an optimizer leaves generators alone
        rule = UpdateRule(config)
    if {n: p.shape for n, p in rule.state_dict().items()} != {n: p.shape for n, p in theta.items()}:
        raise ValueError(f"its tensors are not those of {config}")
    if not all(value.isfinite().all() for value in theta.values()):
        raise ValueError("its theta is not finite")
    # copies, since a tensor in a file may have any alignment, which decides the last bit of a product
    rule.load_state_dict({name: value.clone() for name, value in theta.items()}, assign=True)
    return rule


def _not_a_rule(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a rule that this version can read ({error}); copy or install it again")


def digest(rule: UpdateRule) -> str:
    """The SHA-256 of a rule's configuration and theta, hexadecimal, as `save` writes it."""
    return _digest(*_written(rule))


def _written(rule: UpdateRule) -> tuple[str, dict[str, Tensor]]:
    """Configuration and theta as they are written to a file."""
    theta = {name: value.detach().cpu().contiguous() for name, value in rule.state_dict().items()}
    return json.dumps(asdict(rule.config), sort_keys=True), theta


def _digest(config: str, theta: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(config.encode())
    for name in sorted(theta):
        value = theta[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
