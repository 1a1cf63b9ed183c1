"""NF-layers: neural functionals, networks whose inputs are the weights (or gradients, ...) of other networks.

Layers map feature dictionaries, name -> `(*batch, *shape, channels)`, to feature dictionaries or, if invariant, to
vectors. They are equivariant to the permutations of neurons that a `Symmetry` describes, and combine with
`nn.Sequential`.

    networks <-> features    weight_features, state_dicts_of
    equivariant, linear      NFLinear         every equivariant linear map: the default
                             DeepSets         mean of the tensor only: cheap, for wide or many tensors
                             Pointwise        no interaction between entries
    equivariant, attention   WeightAttention  along every free axis and between tensors (NFT)
    on pooled rows           MessagePassing   one set of parameters for all architectures (the update rule's)
    from layer to layer      Propagation      vectors of neurons, multiplied by the weights that they pass
                             MessageEditor    the same in both directions, and from there to changed weights
    between layers           Entrywise, Residual, ChannelDropout, ChannelNorm, TensorNorm, Scale
    input encodings          SinusoidalValues, FourierValues   of values
                             PositionEncoding, LearnedEncoding of positions on fixed axes
    invariant, to a vector   InvariantPool    all invariant means
                             Statistics       mean, variance and quartiles of every tensor (StatNN)
    to and from latents      LatentEncoder, LatentDecoder      (INR2ARRAY)

Inputs, outputs and kernel taps are fixed axes, with separate coefficients for every position (HNP): the most
expressive, and large if there are many inputs. `free_ends(symmetry)` frees inputs and outputs (NP): far fewer
coefficients; an encoding of positions restores the distinction between inputs.

How `NFLinear` works, in order of dependence: `block` splits tensors into blocks with one axis per dimension;
`equality_pattern` enumerates the ways to pool and broadcast a block, which give a basis of all equivariant maps;
`pooling`, `mixing` and `broadcasting` compute them; `linear` puts them together.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), arXiv:2302.14040
    Neural Functional Transformers (Zhou et al., 2023), arXiv:2305.13546
    Universal Neural Functionals (Zhou et al., 2024), arXiv:2402.05232
"""

from nfn_optim.layers.attention import WeightAttention
from nfn_optim.layers.branches import Head, Parallel
from nfn_optim.layers.canonical import canonical_scales, canonical_signs, function_change
from nfn_optim.layers.deepsets import DeepSets, Pointwise
from nfn_optim.layers.editor import Editor
from nfn_optim.layers.encoding import FourierValues, LearnedEncoding, PositionEncoding, SinusoidalValues
from nfn_optim.layers.entrywise import ChannelDropout, Entrywise, Residual
from nfn_optim.layers.incidence import ROLES, Incidence
from nfn_optim.layers.invariant import InvariantPool
from nfn_optim.layers.io_axes import ends_of, free_ends, free_taps, taps_of
from nfn_optim.layers.latent import CrossAttention, LatentDecoder, LatentEncoder
from nfn_optim.layers.linear import NFLinear
from nfn_optim.layers.message_editor import MessageEditor
from nfn_optim.layers.message_passing import MessagePassing
from nfn_optim.layers.norm import ChannelNorm, Scale, TensorNorm
from nfn_optim.layers.orbit import random_orbit
from nfn_optim.layers.predictor import Predictor
from nfn_optim.layers.propagation import Propagation
from nfn_optim.layers.spectrum import Spectrum
from nfn_optim.layers.standardise import Standardise
from nfn_optim.layers.statistics import Statistics
from nfn_optim.layers.weights import state_dicts_of, weight_features

__all__ = [
    "ROLES",
    "ChannelDropout",
    "ChannelNorm",
    "CrossAttention",
    "DeepSets",
    "Editor",
    "Entrywise",
    "FourierValues",
    "Head",
    "Incidence",
    "InvariantPool",
    "LatentDecoder",
    "LatentEncoder",
    "LearnedEncoding",
    "MessageEditor",
    "MessagePassing",
    "NFLinear",
    "Parallel",
    "Pointwise",
    "PositionEncoding",
    "Predictor",
    "Propagation",
    "Residual",
    "Scale",
    "SinusoidalValues",
    "Spectrum",
    "Standardise",
    "Statistics",
    "TensorNorm",
    "WeightAttention",
    "canonical_scales",
    "canonical_signs",
    "ends_of",
    "free_ends",
    "free_taps",
    "function_change",
    "random_orbit",
    "state_dicts_of",
    "taps_of",
    "weight_features",
]
