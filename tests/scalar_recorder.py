"""A TensorBoard writer that records scalars."""

from __future__ import annotations


class ScalarRecorder:
    """A writer with nothing but `add_scalar`; records steps and values by tag."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((step, value))

    def last(self, quantity: str, group: str = "all", name: str = "optimizer") -> float:
        return self.scalars[f"{name}.{quantity}/{group}"][-1][1]
