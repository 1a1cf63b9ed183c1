"""NF-layers: networks over weight space that commute with the permutations of a `Symmetry`."""

from nfn_optim.layers.attention import WeightAttention
from nfn_optim.layers.deepsets import DeepSets, Pointwise
from nfn_optim.layers.encoding import FourierValues, LearnedEncoding, PositionEncoding, SinusoidalValues
from nfn_optim.layers.entrywise import ChannelDropout, Entrywise, Residual
from nfn_optim.layers.incidence import ROLES, Incidence
from nfn_optim.layers.invariant import InvariantPool
from nfn_optim.layers.io_axes import ends_of, free_ends
from nfn_optim.layers.latent import CrossAttention, LatentDecoder, LatentEncoder
from nfn_optim.layers.linear import NFLinear
from nfn_optim.layers.message_passing import TiedStack
from nfn_optim.layers.norm import ChannelNorm, Scale, TensorNorm
from nfn_optim.layers.statistics import Statistics
from nfn_optim.layers.weights import state_dicts_of, weight_features

__all__ = [
    "ROLES",
    "ChannelDropout",
    "ChannelNorm",
    "CrossAttention",
    "DeepSets",
    "Entrywise",
    "FourierValues",
    "Incidence",
    "InvariantPool",
    "LatentDecoder",
    "LatentEncoder",
    "LearnedEncoding",
    "NFLinear",
    "Pointwise",
    "PositionEncoding",
    "Residual",
    "Scale",
    "SinusoidalValues",
    "Statistics",
    "TensorNorm",
    "TiedStack",
    "WeightAttention",
    "ends_of",
    "free_ends",
    "state_dicts_of",
    "weight_features",
]
