"""Populations in files: one stacked tensor for every parameter and column, and JSON for the rest.

A file is written under another name and renamed, so that it is there whole or not at all; a digest of the tensors
finds bytes that were changed later. `generate` makes a population group by group, one file each, and goes on after the
last whole group if it was killed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nfn_optim.engine.replaced_file import replaced
from nfn_optim.populations.population import Population
from nfn_optim.symmetry import Symmetry

FORMAT = "nfn_optim population 1"
"""Key of the JSON in the metadata of a file."""


def save(population: Population, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write a population; an existing file is replaced at once or not at all.

    Args:
        population: The networks.
        path: Where to; by convention `*.safetensors`. Folders are made.
        dtype: Of the parameters in the file, for example `torch.float16`; default as they are.

    Raises:
        ValueError: A parameter is not finite in this dtype.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"params/{name}": x.detach().cpu().to(dtype or x.dtype) for name, x in population.params.items()}
    for name, x in tensors.items():
        if dtype is not None and not x.isfinite().all():
            raise ValueError(f"expected values that {dtype} can hold, {name} overflows; save it in float32")
    tensors |= {f"columns/{name}": x.detach().cpu() for name, x in population.columns.items()}
    tensors["runs"] = population.runs.cpu()
    tensors = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}  # no shared memory
    text = json.dumps(
        {
            "symmetry": population.symmetry.to_dict(),
            "about": dict(population.about),
            "order": [list(population.params), list(population.columns)],
            "sha256": _digest(tensors),
        }
    )
    with replaced(path) as partial:
        save_file(tensors, partial, metadata={FORMAT: text})


def load(path: str | os.PathLike[str]) -> Population:
    """Read a population; parameters that are stored in float16 become float32.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is cut off, was changed, or is not a population.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a file written by nfn_optim.populations.save, found none at {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); remove it and make it again") from error
    if FORMAT not in metadata:
        raise ValueError(f"expected {path} to be a population, with metadata {FORMAT!r}, found {sorted(metadata)}")
    stated = json.loads(metadata[FORMAT])
    if stated["sha256"] != _digest(tensors):
        raise ValueError(f"{path} was changed after it was written: its digest is another; remove it and make it again")
    params, columns = stated["order"]
    return Population(
        Symmetry.from_dict(stated["symmetry"]),
        {name: _widened(tensors[f"params/{name}"]) for name in params},
        {name: tensors[f"columns/{name}"] for name in columns},
        tensors["runs"],
        stated["about"],
    )


def generate(
    folder: str | os.PathLike[str],
    definition: Mapping[str, Any],
    groups: int,
    make: Callable[[int], Population],
    dtype: torch.dtype | None = None,
) -> Population:
    """Make a population group by group, each group kept in a file as soon as it is done.

    Args:
        folder: Groups are in a folder inside it that is named by the definition.
        definition: What the networks depend on, for JSON: a changed definition never reads the groups of another one.
        groups: Number of groups.
        make: Makes a group from its number; it must depend on nothing else than `definition`.
        dtype: Of the parameters in the files.

    Returns:
        All groups together, read from the files; `about` is the definition.
    """
    text = json.dumps(dict(definition), sort_keys=True)
    place = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:12]
    parts = []
    for group in _with_progress(range(groups), str(definition.get("name", "networks"))):
        path = place / f"{group:05d}.safetensors"
        if not path.is_file():
            made = make(group)
            save(Population(made.symmetry, made.params, made.columns, made.runs, dict(definition)), path, dtype)
        parts.append(load(path))
    return Population.concatenate(parts)


def _with_progress(groups: Iterable[int], name: str) -> Iterable[int]:
    """With a bar where tqdm is installed."""
    try:
        from tqdm.auto import tqdm  # noqa: PLC0415 - an extra
    except ImportError:
        return groups
    bar: Iterable[int] = tqdm(groups, desc=name, unit="group", leave=False)
    return bar


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name]
        sha256.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        sha256.update(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()
