"""A data folder of random files with the shapes of the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def with_random_images(folder: Path) -> Path:
    """Write fashion_mnist.npz and cifar10.npz; returns the folder."""
    generator = np.random.default_rng(0)

    def pixels(count: int, *shape: int) -> np.ndarray:
        return generator.integers(0, 256, (count, *shape), dtype=np.uint8)

    labels = {f"{part}_y": generator.integers(0, 10, count) for part, count in (("train", 300), ("test", 80))}
    grey = {f"{part}_x{s}": pixels(n, s, s) for part, n in (("train", 300), ("test", 80)) for s in (8, 28)}
    colour = {f"{part}_x{s}": pixels(n, s, s, 3) for part, n in (("train", 300), ("test", 80)) for s in (8, 16)}
    np.savez(folder / "fashion_mnist.npz", **grey, **labels)
    np.savez(folder / "cifar10.npz", **colour, **labels)
    return folder
