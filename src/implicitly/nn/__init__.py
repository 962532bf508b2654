"""Implicit layers as `torch.nn.Module`. They add parameters and nothing else."""

from implicitly.changing import PerCallWarning
from implicitly.nn.convex_layer import ConvexLayer
from implicitly.nn.deq import DEQ
from implicitly.nn.neural_ode import NeuralODE, SmoothnessWarning
from implicitly.nn.ode_regularisers import Divergence, JacobianFrobenius, KineticEnergy, Regulariser
from implicitly.nn.per_solve import BatchNorm, Dropout, PerSolve, SpectralNorm, WeightNorm
from implicitly.nn.physics import HamiltonianField, LagrangianField
from implicitly.nn.regularise import jacobian_norm, spectral_radius
from implicitly.nn.taylor_penalty import TaylorPenalty
from implicitly.nn.theorems import as_deq, compose
from implicitly.nn.vector_fields import Autonomous, ConcatTime, GatedTime, TimeSequential
from implicitly.nn.warm_start import LastBatch, LastEpoch

__all__ = [
    "DEQ",
    "Autonomous",
    "BatchNorm",
    "ConcatTime",
    "ConvexLayer",
    "Divergence",
    "Dropout",
    "GatedTime",
    "HamiltonianField",
    "JacobianFrobenius",
    "KineticEnergy",
    "LagrangianField",
    "LastBatch",
    "LastEpoch",
    "NeuralODE",
    "PerCallWarning",
    "PerSolve",
    "Regulariser",
    "SmoothnessWarning",
    "SpectralNorm",
    "TaylorPenalty",
    "TimeSequential",
    "WeightNorm",
    "as_deq",
    "compose",
    "jacobian_norm",
    "spectral_radius",
]
