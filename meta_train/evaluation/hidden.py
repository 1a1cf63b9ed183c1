"""The hidden matrices of a network, which users of Muon give to Muon."""

from __future__ import annotations

from torch import Tensor, nn

MATRIX = 2  # least number of dimensions


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of two or more dimensions except embeddings, positions and the output layer.

    Positions and class tokens are parameters whose name has no "weight". The output layer is the last matrix in the
    order of registration; a square one is a hidden layer.

    Example:
        >>> [tuple(p.shape) for p in hidden_matrices(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))]
        [(5, 3)]
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named = model.named_parameters(remove_duplicate=False)  # an output layer tied to an embedding is the last one too
    weights = [p for name, p in named if p.dim() >= MATRIX and "weight" in name.rpartition(".")[2]]
    output = weights[-1:] if weights and weights[-1].shape[0] != weights[-1][0].numel() else []
    excluded = embeddings | {id(p) for p in output}
    return list({id(p): p for p in weights if id(p) not in excluded}.values())
