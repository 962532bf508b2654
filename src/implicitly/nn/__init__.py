"""Implicit layers as `torch.nn.Module`. They add parameters and nothing else."""

from implicitly.nn.deq import DEQ
from implicitly.nn.per_solve import BatchNorm, Dropout, PerSolve, SpectralNorm, WeightNorm
from implicitly.nn.physics import HamiltonianField, LagrangianField
from implicitly.nn.regularise import jacobian_norm, spectral_radius
from implicitly.nn.theorems import as_deq, compose
from implicitly.nn.warm_start import LastBatch, LastEpoch

__all__ = [
    "DEQ",
    "BatchNorm",
    "Dropout",
    "HamiltonianField",
    "LagrangianField",
    "LastBatch",
    "LastEpoch",
    "PerSolve",
    "SpectralNorm",
    "WeightNorm",
    "as_deq",
    "compose",
    "jacobian_norm",
    "spectral_radius",
]
