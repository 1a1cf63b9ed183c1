"""Tables of faults: what goes wrong, what happens then, and what is kept. docs/contract.md shows them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from trained_net import RULE, net, train

from nfn_optim.optimizer import NFNOptimizer

PAGE = Path(__file__).parent.parent / "docs" / "contract.md"
Run = Callable[[Path], None]


class Row(NamedTuple):
    """One fault.

    Attributes:
        happens: What happens.
        kept: What is kept.
        run: Makes it go wrong, and looks; gets an empty directory.
    """

    happens: str
    kept: str
    run: Run


class FaultTable(dict[str, Row]):
    """Faults by what goes wrong."""

    def enter(self, what: str, happens: str, kept: str) -> Callable[[Run], Run]:
        """Enter a function into the table."""

        def decorate(run: Run) -> Run:
            self[what] = Row(happens, kept, run)
            return run

        return decorate

    def missing(self) -> list[str]:
        """The rows that the page does not show."""
        page = PAGE.read_text(encoding="utf-8")
        return [what for what, row in self.items() if f"| {what} | {row.happens} | {row.kept} |" not in page]


def made() -> tuple[nn.Sequential, NFNOptimizer]:
    """A network and its optimizer."""
    model = net()
    return model, NFNOptimizer(model, rule=RULE, weight_decay=0.1)


def assert_trains(model: nn.Module, optimizer: NFNOptimizer) -> None:
    """It goes on: all parameters move, and stay finite."""
    skipped, before = optimizer.skipped_steps, [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 2)
    assert optimizer.skipped_steps == skipped
    for p, q in zip(model.parameters(), before, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, q)
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


def together(runs: list[Callable[[], object]]) -> None:
    """Run all at the same time."""
    errors: list[BaseException] = []

    def guarded(run: Callable[[], object]) -> None:
        try:
            run()
        except BaseException as error:  # it is raised again
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
