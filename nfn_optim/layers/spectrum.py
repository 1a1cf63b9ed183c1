"""Singular values of weight matrices, and of products of consecutive ones.

Permutations are orthogonal: they change no singular value, neither of a matrix W_l nor of a product W_m ... W_l, in
which the neurons between layers are summed over; from the first layer to the last it is what the network would do
without activations. Products are invariant to signs of odd activations and to scales of ReLU in between, too.
A kernel is a matrix of rows times columns and taps; in a product its taps are added up, as for a constant image.

References:
    Implicit Self-Regularization in Deep Neural Networks (Martin and Mahoney, 2021), arXiv:1810.01075
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nfn_optim.symmetry import Symmetry

FLOOR = 1e-6
"""Smallest singular value that the logarithm sees, in units of the weights."""

MAX_CHAINS = 64
"""Matrices and products together: branching networks have many paths."""


class Spectrum(nn.Module):
    r"""Logarithms of norms and of the largest singular values; without gradients with respect to the weights.

    Tensors that carry a nested axis in one dimension and the axis that it is nested in in another are left out.

    Args:
        symmetry: The tensors and their axes.
        count: Singular values of every matrix; fewer if it has fewer rows or columns.

    Attributes:
        products: The chains of tensors that are multiplied, the first layer first.
        out_features: Length of the vector.

    Example:
        >>> s = Symmetry.parse("v h in\nb h\nw out h\nfree h=3\nfixed in=4 out=2")
        >>> spectrum = Spectrum(s, count=2)
        >>> spectrum.products
        [('v', 'w')]
        >>> weights = {"v": torch.randn(5, 3, 4, 1), "b": torch.randn(5, 3, 1), "w": torch.randn(5, 2, 3, 1)}
        >>> tuple(spectrum(weights).shape)
        (5, 9)
    """

    def __init__(self, symmetry: Symmetry, count: int = 10) -> None:
        super().__init__()
        self.count = count
        entangled = symmetry.nested_across_dims  # rows are permuted differently from column to column
        self._names = [name for name, dims in symmetry.dims.items() if len(dims) > 1 and name not in entangled]
        self.products = _chains_of(symmetry, self._names)
        example = {name: torch.zeros(1, *symmetry.shape_of(name), 1) for name in self._names}
        self.out_features = self(example).shape[-1]

    @torch.no_grad()
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Compute. Name -> `(N, *shape, 1)` to `(N, out_features)`."""
        matrices = [features[name].flatten(2) for name in self._names]  # (N, rows, columns and taps)
        products: dict[tuple[str, ...], Tensor] = {}  # (N, rows, columns)
        for name in self._names:
            products[name,] = features[name].flatten(3).sum(-1)
        for chain in self.products:  # shorter ones come first
            products[chain] = products[chain[-1:]] @ products[chain[:-1]]
            matrices.append(products[chain])
        return torch.cat([part for matrix in matrices for part in self._logarithms(matrix)], -1)

    def _logarithms(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Of the largest singular values, from the smaller Gram matrix, and of the norm; `(N, ...)`."""
        wide = matrix.shape[1] <= matrix.shape[2]
        gram = (matrix @ matrix.mT if wide else matrix.mT @ matrix).double()
        squares = torch.linalg.eigvalsh(gram)[:, -self.count :].flip(-1)
        both = (squares, gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True))
        values, norm = ((0.5 * x.clamp(min=FLOOR**2).log()).to(matrix.dtype) for x in both)
        return values, norm


def _chains_of(symmetry: Symmetry, names: list[str]) -> list[tuple[str, ...]]:
    """All chains of two or more tensors in which the rows of each are the columns of the next, the shortest first."""
    chains: list[tuple[str, ...]] = [(name,) for name in names]
    for chain in chains:  # grows on the way
        rows = symmetry.dims[chain[-1]][0]
        nexts = [n for n in names if n not in chain and symmetry.dims[n][1] == rows and rows in symmetry.free]
        chains += [(*chain, name) for name in nexts][: MAX_CHAINS - len(chains)]
    return chains[len(names) :]
