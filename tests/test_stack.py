"""The optimizer put together by hand: each part, on examples with known results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meta_train.evaluation import stack
from meta_train.evaluation.stack import Stack, polar_factor


def vector(lr: float = 0.1) -> tuple[nn.Parameter, Stack]:
    p = nn.Parameter(torch.ones(3))
    return p, Stack([], [p], lr)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_newton_schulz_makes_singular_values_equal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = polar_factor(matrix)
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.4
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97


@pytest.mark.parametrize("eigenbases", [False, True])
@pytest.mark.parametrize("shape", [(8, 5), (5, 3, 2, 2)])
def test_the_update_of_a_matrix_has_the_size_of_adamw(shape: tuple[int, ...], eigenbases: bool) -> None:
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Stack([p], [], 1.0, eigenbases=eigenbases)
    p.grad = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    size = optimizer.state[p]["x"].square().mean().sqrt().item()
    assert size == pytest.approx(stack.ADAMW_SIZE, rel=0.3)


def test_parameters_are_ahead_by_the_average_of_the_steps_and_read_out_without() -> None:
    p, optimizer = vector()
    p.grad = torch.tensor([1.0, -2.0, 0.0])
    optimizer.step()  # the first step is one learning rate
    assert optimizer.state[p]["x"].tolist() == pytest.approx([0.9, 1.1, 1.0])
    ahead = stack.LOOKAHEAD * (1 - stack.STEP_AVERAGE) * 0.1
    assert p.tolist() == pytest.approx([0.9 - ahead, 1.1 + ahead, 1.0])
    before = p.detach().clone()
    optimizer.eval()
    assert p.tolist() == pytest.approx([0.9, 1.1, 1.0])
    optimizer.train()
    optimizer.train()
    assert torch.equal(p, before)


def test_the_lookahead_fades_with_the_learning_rate() -> None:
    p, optimizer = vector()
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(p, optimizer.state[p]["x"])


def test_the_average_is_that_of_the_tail() -> None:
    p, optimizer = vector(0.0)
    steps = 400
    for step in range(steps):
        p.data.fill_(float(step))
        p.grad = torch.zeros(3)
        optimizer.step()
    optimizer.eval()
    assert p[0].item() == pytest.approx(steps * (1 - stack.TAIL), abs=3)


def test_bases_become_eigenbases_and_momentum_turns_with_them() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator)
    p = nn.Parameter(torch.zeros(6, 5))
    optimizer, plain = Stack([p], [], 1e-3, eigenbases=True), torch.zeros(6, 5)
    for _ in range(10 * stack.REFRESH + 1):
        p.grad = mix @ torch.randn(6, 5, generator=generator)
        plain.lerp_(p.grad, 1 - stack.MOMENTUM)
        optimizer.step()
    state = optimizer.state[p]
    for side, size in (("left", 6), ("right", 5)):
        assert state[side].T @ state[side] == pytest.approx(torch.eye(size), abs=1e-5)
    turned = state["left"].T @ (mix @ mix.T) @ state["left"]
    outside = turned - turned.diagonal().diag()
    assert outside.norm() < 0.3 * turned.norm()
    assert (state["left"] @ state["m"] @ state["right"].T).numpy() == pytest.approx(plain.numpy(), abs=1e-4)
