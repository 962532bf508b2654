"""Implicit layers: say what the output must satisfy; any solver finds it, one theorem differentiates it."""

from implicitly import nn
from implicitly.compiled import CompileWarning
from implicitly.fixed_point.adjoints import (
    ImplicitAdjoint,
    JacobianFreeAdjoint,
    PhantomAdjoint,
    UnrolledAdjoint,
)
from implicitly.fixed_point.anderson import Anderson
from implicitly.fixed_point.broyden import Broyden
from implicitly.fixed_point.newton import Newton, NewtonKrylov
from implicitly.fixed_point.picard import FixedPointIteration
from implicitly.fixed_point.solve import fixed_point, root
from implicitly.independence import check_independence
from implicitly.iterate import ConvergenceWarning, Solution, SolverError, Status
from implicitly.linear import CG, GMRES, BiCGStab, DenseLU, Neumann
from implicitly.linear_solve import linear_solve

__all__ = [
    "CG",
    "GMRES",
    "Anderson",
    "BiCGStab",
    "Broyden",
    "CompileWarning",
    "ConvergenceWarning",
    "DenseLU",
    "FixedPointIteration",
    "ImplicitAdjoint",
    "JacobianFreeAdjoint",
    "Neumann",
    "Newton",
    "NewtonKrylov",
    "PhantomAdjoint",
    "Solution",
    "SolverError",
    "Status",
    "UnrolledAdjoint",
    "check_independence",
    "fixed_point",
    "linear_solve",
    "nn",
    "root",
]
