"""Optimizers that others made or that can be put together by hand, as their authors recommend them.

All take a network, a learning rate and the horizon, None if unknown. Weight decay is set by the task afterwards.

References:
    Muon (Jordan et al., 2024): `torch.optim.Muon`, steps of AdamW's size
    The Road Less Scheduled (Defazio et al., 2024), arXiv:2405.15682: package `schedulefree`
    Incorporating Nesterov Momentum into Adam (Dozat, 2016): `torch.optim.NAdam` with constant momentum
    SOAP (Vyas et al., 2024), arXiv:2409.11321; AdEMAMix (Pagliardini et al., 2024), arXiv:2409.03137; Prodigy
    (Mishchenko and Defazio, 2023), arXiv:2306.06101: package `pytorch_optimizer`
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meta_train.evaluation.hidden import MATRIX, hidden_matrices
from meta_train.evaluation.muon import Float32Muon
from meta_train.evaluation.stack import Stack

SOAP_MAX_DIMENSION = 1024  # longer dimensions have no eigenbasis; a QR decomposition of 4,096 takes seconds on a CPU
SLOW_MOMENTUM = 0.999  # of AdEMAMix; its default .9999 is for hundreds of thousands of steps
CONSTANT_MOMENTUM = 100.0  # NAdam's momentum rises to its final value within one step


def sgd(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """SGD with momentum .9; weight decay is part of the gradient."""
    return [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)]


def nadamw(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """AdamW with Nesterov momentum."""
    decay: dict[str, Any] = {"momentum_decay": CONSTANT_MOMENTUM, "decoupled_weight_decay": True}
    return [torch.optim.NAdam(model.parameters(), lr=lr, **decay)]


def muon(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """Muon for hidden matrices, AdamW at the same rate for the rest."""
    return _muon(model, lr, [p for p in hidden_matrices(model) if p.dim() == MATRIX])


def muon_for_all(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """Muon for matrices other than embeddings, output layer and positions included; AdamW for the rest."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return _muon(model, lr, [p for p in model.parameters() if p.dim() == MATRIX and id(p) not in embeddings])


def _muon(model: nn.Module, lr: float, matrices: list[Tensor]) -> list[Optimizer]:
    made: list[Optimizer] = []
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    if others := _others(model, matrices):
        made.append(torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=True))
    return made


def muon_in_float32(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """`muon`, with the iteration in float32."""
    hidden = [p for p in hidden_matrices(model) if p.dim() == MATRIX and p.requires_grad]
    others = [p for p in _others(model, hidden) if p.requires_grad]
    made: list[Optimizer] = [Float32Muon(hidden, lr)] if hidden else []
    return [*made, torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=True)] if others else made


def stack(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """Muon and AdamW with Nesterov's mixture, lookahead and an average of the tail."""
    hidden = hidden_matrices(model)
    return [Stack(hidden, _others(model, hidden), lr)]


def soap_stack(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """The same with Adam in SOAP's eigenbases before matrices are equalised."""
    hidden = hidden_matrices(model)
    return [Stack(hidden, _others(model, hidden), lr, eigenbases=True)]


def schedule_free(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """Schedule-free AdamW.

    Raises:
        ModuleNotFoundError: The package `schedulefree` is not installed.
    """
    optimizer: Any = _imported("schedulefree").AdamWScheduleFree(model.parameters(), lr=lr)
    optimizer.train()
    return [optimizer]


def soap(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """SOAP: Adam in the eigenbases of Shampoo.

    Raises:
        ModuleNotFoundError: The package `pytorch_optimizer` is not installed.
    """
    make = _imported("pytorch_optimizer").SOAP
    return [make(model.parameters(), lr=lr, weight_decay=0.0, max_precondition_dim=SOAP_MAX_DIMENSION)]


def ademamix(model: nn.Module, lr: float, horizon: int | None) -> list[Optimizer]:
    """AdEMAMix: AdamW with a second, slow momentum, which rises over the horizon.

    Raises:
        ModuleNotFoundError: The package `pytorch_optimizer` is not installed.
    """
    make = _imported("pytorch_optimizer").AdEMAMix
    betas = (0.9, 0.999, SLOW_MOMENTUM)
    return [make(model.parameters(), lr=lr, betas=betas, weight_decouple=True, t_alpha_beta3=horizon)]


def prodigy(model: nn.Module, lr: float, _horizon: int | None) -> list[Optimizer]:
    """Prodigy, which estimates its learning rate; `lr` is the factor of the estimate.

    Raises:
        ModuleNotFoundError: The package `pytorch_optimizer` is not installed.
    """
    make = _imported("pytorch_optimizer").Prodigy
    return [make(model.parameters(), lr=1.0, d_coef=lr, bias_correction=True, safeguard_warmup=True)]


def _others(model: nn.Module, chosen: list[Tensor]) -> list[Tensor]:
    ids = {id(p) for p in chosen}
    return [p for p in model.parameters() if id(p) not in ids]


def _imported(package: str) -> Any:
    """A package of the extra `evaluate`."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected the package {package}; install it with `pip install -e '.[evaluate]' -c constraints.txt`"
        ) from error
