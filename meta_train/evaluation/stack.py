"""The strongest optimizer put together by hand: known parts on top of Muon and AdamW.

    u = b m + (1 - b) g                      Nesterov's mixture of the newest gradient g and its moving average m
    hidden matrices: u <- polar factor of u by Newton-Schulz, of AdamW's size; with `eigenbases`, before that
                     u <- L (L' u R / sqrt(v)) R', Adam in the eigenbases L and R of the averages of g g' and g' g
    all others:      u <- u / sqrt(v)        AdamW with the mixture
    x <- y - lr (u + weight decay y)
    n <- c n + (1 - c) (x - previous x)      moving average of the steps
    y <- x + LOOKAHEAD lr / (largest lr) n   where gradients are taken: the parameters while training
    z <- z + (x - z) / max(1, TAIL t)        average of the last part of the run: the parameters after `eval()`

References:
    Muon (Jordan et al., 2024); SOAP (Vyas et al., 2024), Alg. 3, arXiv:2409.11321; EMA-Nesterov (2026),
    arXiv:2605.25395; LAWA (Kaddour, 2022), arXiv:2209.14981; all of them in the records of modded-nanogpt, track 3
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTUM, SECOND_MOMENT, EPS = 0.95, 0.99, 1e-8
STATISTICS, REFRESH = 0.95, 10  # decay of g g' and g' g; steps between refinements of the eigenbases
MAX_BASIS = 1024  # longer dimensions have no eigenbasis
COEFFICIENTS, ITERATIONS = (3.4445, -4.775, 2.0315), 5  # of Newton-Schulz
ADAMW_SIZE = 0.2  # root mean square of an update of AdamW
LOOKAHEAD, STEP_AVERAGE, TAIL = 0.5, 0.95, 0.05  # the last one of the steps so far


class Stack(Optimizer):
    """Muon and AdamW with lookahead and an average of the tail.

    Args:
        hidden: Matrices `(rows, ...)`; further dimensions are flattened.
        others: All other parameters.
        lr: Learning rate, per step, in AdamW's units for both.
        eigenbases: Whether matrices are preconditioned in eigenbases before they are equalised.
    """

    def __init__(
        self, hidden: Sequence[Tensor], others: Sequence[Tensor], lr: float = 1e-3, *, eigenbases: bool = False
    ) -> None:
        groups = [{"params": p, "part": part} for part, p in (("hidden", hidden), ("others", others)) if p]
        defaults = {"lr": lr, "eigenbases": eigenbases, "weight_decay": 0.0, "largest_lr": 0.0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from gradients taken at y; leaves the parameters at the next y."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            lr = group["lr"]
            group["largest_lr"] = max(group["largest_lr"], lr)
            lookahead = LOOKAHEAD * lr / (group["largest_lr"] or 1.0)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p] or self._begin(p)
                    state["step"] += 1
                    hidden = group["part"] == "hidden"
                    update = _hidden_update(p.grad, state, group["eigenbases"]) if hidden else _adam(p.grad, state)
                    p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr)
                    state["steps"].lerp_(p - state["x"], 1 - STEP_AVERAGE)
                    state["x"].copy_(p)
                    state["z"].lerp_(p, 1 / max(1.0, TAIL * state["step"]))
                    p.add_(state["steps"], alpha=lookahead)
        return loss

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average of the tail in place of the parameters."""
        for p, state in self.state.items():
            state["y"] = p.clone()
            p.copy_(state["z"])

    @torch.no_grad()
    def train(self) -> None:
        """Undo `eval`."""
        for p, state in self.state.items():
            if "y" in state:
                p.copy_(state.pop("y"))

    def _begin(self, p: Tensor) -> dict[str, Any]:
        zeros = {name: torch.zeros_like(p) for name in ("m", "v", "steps")}
        self.state[p] = state = {"step": 0, "x": p.clone(), "z": p.clone(), **zeros}
        return state


def polar_factor(matrix: Tensor) -> Tensor:
    """The matrix `(rows, columns)` with all singular values about 1, by five iterations of Newton-Schulz."""
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x: Tensor = (matrix if wide else matrix.T) / (matrix.norm() + EPS)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.T


def _hidden_update(grad: Tensor, state: dict[str, Any], eigenbases: bool) -> Tensor:
    """The update of a matrix `(rows, ...)` of AdamW's size with equal singular values."""
    if eigenbases:
        _update_bases(grad.flatten(1), state)
        update = _rotate(_adam(_rotate(grad, state), state), state, back=True)
    else:
        update = _mixture(grad, state)
    matrix = polar_factor(update.flatten(1))
    return (ADAMW_SIZE * math.sqrt(max(matrix.shape)) * matrix).reshape(grad.shape)


def _mixture(grad: Tensor, state: dict[str, Any]) -> Tensor:
    """Update m; return the mixture, corrected for m's start at zero."""
    m: Tensor = state["m"].lerp_(grad, 1 - MOMENTUM)
    return torch.lerp(grad, m / (1 - MOMENTUM ** state["step"]), MOMENTUM)


def _adam(grad: Tensor, state: dict[str, Any]) -> Tensor:
    """Update m and v; return the mixture over the root of v."""
    v: Tensor = state["v"].lerp_(grad.square(), 1 - SECOND_MOMENT) / (1 - SECOND_MOMENT ** state["step"])
    return _mixture(grad, state) / (v.sqrt() + EPS)


def _update_bases(grad: Tensor, state: dict[str, Any]) -> None:
    """Average g g' and g' g; refine their eigenbases by orthogonal iteration, and turn m into the new ones."""
    first, refresh = state["step"] == 1, state["step"] % REFRESH == 1
    m = None if first or not refresh else _rotate(state["m"], state, back=True)
    for side, square in (("left", grad @ grad.T), ("right", grad.T @ grad)):
        if len(square) <= MAX_BASIS:
            average = state.setdefault(f"{side} average", torch.zeros_like(square)).lerp_(square, 1 - STATISTICS)
            if first:
                state[side] = torch.linalg.eigh(average)[1].flip(1)
            elif refresh:
                state[side] = torch.linalg.qr(average @ state[side])[0]
    if m is not None:
        state["m"].copy_(_rotate(m, state))


def _rotate(update: Tensor, state: dict[str, Any], *, back: bool = False) -> Tensor:
    """Turn an update `(rows, ...)` into the eigenbases, or back."""
    matrix = update.flatten(1)
    if "left" in state:
        matrix = (state["left"] if back else state["left"].T) @ matrix
    if "right" in state:
        matrix = matrix @ (state["right"].T if back else state["right"])
    return matrix.view_as(update)
