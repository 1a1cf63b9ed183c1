"""Functions compiled for all sizes: as few graphs as that takes, and none where it would be wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from compiler import compiler
from torch import Tensor

from nfn_optim.engine import inductor
from nfn_optim.engine.inductor import Graph

pytestmark = [compiler, pytest.mark.usefixtures("empty_cache")]


def scale_(x: Tensor, others: Sequence[Tensor], row: Tensor | None, power: int) -> tuple[Tensor, list[Tensor]]:
    """Changes its first argument; returns a tree."""
    x.mul_(2**power)
    for other in others:
        x.add_(other)
    return x.sum(-1), [x * 3 if row is None else x * row]


def both(rows: int, rest: int, power: int = 1, row: bool = True, dtype: torch.dtype = torch.float32) -> None:
    """Compiled and not are the same."""
    torch.manual_seed(0)
    x, a, b = (torch.randn(rows, rest).to(dtype) for _ in range(3))
    other, line = x.clone(), torch.randn(1, rest).to(dtype) if row else None
    found = inductor.run(scale_, x, [a, b], line, power)
    expected = scale_(other, [a, b], line, power)
    torch.testing.assert_close([found[0], *found[1], x], [expected[0], *expected[1], other])
    assert type(found[1]) is list


@pytest.mark.slow
def test_one_graph_serves_all_sizes_and_another_one_what_is_not_a_size() -> None:
    for rows, rest in ((7, 30), (8, 8), (300, 200), (2, 5), (30, 7)):
        both(rows, rest)
    assert inductor.graph_count() == 1
    both(1, 30)  # broadcast
    both(7, 1)
    assert inductor.graph_count() == 3
    both(7, 30, power=2)
    both(7, 30, row=False)
    both(7, 30, dtype=torch.float64)
    assert inductor.graph_count() == 6
    both(9, 31, power=2)
    assert inductor.graph_count() == 6


@pytest.mark.slow
def test_equal_sizes_are_not_taken_for_one() -> None:
    both(8, 8)
    both(7, 30)
    assert inductor.graph_count() == 1


def long(x: Tensor) -> Tensor:
    """Decides upon a size."""
    return x + 1 if x.shape[0] > 10 else x - 1


@pytest.mark.slow
def test_what_is_decided_upon_sizes_is_a_condition_of_the_graph() -> None:
    for size in (20, 5, 30, 7, 11, 10):
        x = torch.zeros(size)
        assert torch.equal(inductor.run(long, x), long(x))
    assert inductor.graph_count() == 2


def product(x: Tensor, y: Tensor) -> Tensor:
    """Sizes have to fit."""
    return x @ y


@pytest.mark.slow
def test_sizes_that_must_be_equal_or_the_same() -> None:
    for m, n, k in ((3, 4, 5), (4, 4, 4), (9, 3, 2)):
        x, y = torch.randn(m, n), torch.randn(n, k)
        torch.testing.assert_close(inductor.run(product, x, y), x @ y)
    assert inductor.graph_count() == 1
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), pytest.warns(UserWarning, match="compiled"):
        inductor.run(product, torch.randn(3, 4), torch.randn(5, 3))
    inductor._failures.clear()
    fixed = [inductor.run(product, torch.ones(m, 2), torch.ones(2, 3), dynamic=False) for m in (3, 4, 3)]
    assert [x.sum().item() for x in fixed] == [18, 24, 18]
    assert inductor.graph_count() == 3


@pytest.mark.slow
def test_holes_in_memory_and_other_numbers_of_threads() -> None:
    x = torch.zeros(6, 8)
    inductor.run(scale_, x[:, ::2], [torch.ones(6, 4)], None, 1)
    assert inductor.graph_count() == 0
    assert x.sum() == 24
    threads = torch.get_num_threads()
    both(6, 8)
    try:
        torch.set_num_threads(threads + 1)
        both(6, 8)
    finally:
        torch.set_num_threads(threads)
    assert inductor.graph_count() == 2


def sums(x: Tensor, w: Tensor, index: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    """Reads, in loops of several shapes, what was added to a tensor."""
    h = (x @ w).tanh() @ w
    added = start.flatten().index_add(-1, index, h.abs().sum(-1)).reshape(start.shape).clamp(min=1)
    logs = added.log()
    rows = torch.cat([logs / 5, logs.sum(-1, keepdim=True) / 10, start], -1)
    return (rows @ w[:5]).sum(0), h.tanh() @ w, (h @ w).sum(0)


@pytest.mark.slow
def test_what_was_added_is_read_afterwards() -> None:
    """Here PyTorch 2.13 alone reads it before."""
    torch.manual_seed(0)
    args = [torch.randn(1000, 50), torch.randn(50, 50), torch.randint(0, 600, (1000,)), torch.zeros(300, 2)]
    graph = inductor.build_graph(sums, [x.clone() for x in args], inductor._inductor, dynamic=False)
    torch.testing.assert_close(graph.unflatten(graph.run(*args)), sums(*args), rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("wrong", ["result", "argument", "nan", "nothing"])
def test_a_graph_that_does_something_else_is_never_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has three tries, since rounding may decide in one; then nothing is compiled any more."""
    monkeypatch.setattr(inductor, "_failures", [])

    def add_(x: Tensor, y: Tensor) -> Tensor:
        return x.add_(y).sum()

    def planted(x: Tensor, y: Tensor) -> list[Tensor]:
        total = add_(x, y * (1.02 if wrong == "argument" else 1.0))
        if wrong == "nan":
            x[0] = torch.nan
        return [total * (1.02 if wrong == "result" else 1.0)]

    graph = Graph(planted, itemgetter(0), {}, ())
    monkeypatch.setattr(inductor, "compile_call", lambda call: graph)
    x, y = torch.full((5,), 100.0), torch.ones(5)
    for step in range(5):
        if wrong != "nothing" and step == 2:
            with pytest.warns(UserWarning, match=r"does something else.*update PyTorch"):
                total = inductor.run(add_, x, y)
        else:
            total = inductor.run(add_, x, y)
        assert torch.equal(x, torch.full((5,), 101.0 + step))
        assert total == x.sum()
    assert graph.has_agreed == (wrong == "nothing")
    assert inductor.has_failed() == (wrong != "nothing")


def test_a_graph_that_rounds_differently_is_used() -> None:
    """From its second call on; where nothing is finite there is nothing to see."""
    graph = Graph(lambda x: [x.mul_(3 * (1 + 1e-6)).sum()], itemgetter(0), {}, ())
    x = torch.rand(100)
    assert inductor.run_graph(graph, lambda x: x.mul_(3).sum(), x.clone()) == (3 * x).sum()
    assert graph.has_agreed
    assert inductor.run_graph(graph, lambda x: x.mul_(0).sum(), x.clone()) > 0
    graph = Graph(lambda x: [x.mul_(2)], itemgetter(0), {}, ())
    inductor.run_graph(graph, lambda x: x.mul_(2), torch.tensor([torch.nan, torch.inf, 1.0]))
    assert graph.has_agreed


def test_long_sums_may_be_added_up_in_another_order() -> None:
    """Position embeddings of a ViT are one row of a hundred thousand numbers."""
    torch.manual_seed(0)
    x = torch.rand(1, 2**20).square()

    def one_after_the_other(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(np.add.accumulate(x.numpy(), -1))[:, -1]]

    graph = Graph(one_after_the_other, itemgetter(0), {}, ())
    assert (one_after_the_other(x)[0] / x.sum(-1) - 1).abs() > 2 * torch.finfo().eps ** inductor.ROUNDING_POWER
    inductor.run_graph(graph, lambda x: x.sum(-1), x)
    assert graph.has_agreed


PROCESS = """
import torch
from nfn_optim.engine import inductor
from nfn_optim.engine.inductor import Graph
x = torch.randn(40, 30)
assert torch.equal(inductor.run(torch.neg, x), -x)
assert inductor.graph_count() == 1 and not inductor.has_failed()
"""


@pytest.mark.exhaustive
def test_a_killed_process_leaves_nothing_that_breaks_the_next_one(tmp_path: Path) -> None:
    """The linker writes libraries of inductor's cache in place."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", PROCESS], env=environment, check=True)
        libraries = [*tmp_path.rglob("*.main.so")]
        assert libraries
        for library in libraries:
            library.write_bytes(b"")
