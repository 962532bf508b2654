"""Implicit layers: state what the output must satisfy; any solver finds it, and one theorem differentiates it."""

from implicitly import nn
from implicitly.adjoints import ImplicitAdjoint
from implicitly.argmin.bilevel import implicit_gradient, proximal
from implicitly.argmin.convex.conic_solver import Clarabel
from implicitly.argmin.equality import ConstrainedSolution, Equality, NewtonKKT
from implicitly.argmin.gradient_descent import GradientDescent
from implicitly.argmin.lbfgs import LBFGS
from implicitly.argmin.least_squares import GaussNewton, LevenbergMarquardt
from implicitly.argmin.programs.admm import ADMM
from implicitly.argmin.programs.derivative import KKTAdjoint
from implicitly.argmin.programs.interior_point import InteriorPoint
from implicitly.argmin.programs.qp import ProgramSolution, qp
from implicitly.argmin.projection import ProjectedGradient, Projection
from implicitly.argmin.sets import project, prox
from implicitly.argmin.sets.ranking import soft_rank, soft_sort, sparsemax
from implicitly.argmin.solve import argmin, least_squares
from implicitly.compiled import CompiledSolve, CompileWarning, compile_statistics
from implicitly.fixed_point.adjoints import JacobianFreeAdjoint, PhantomAdjoint
from implicitly.fixed_point.anderson import Anderson
from implicitly.fixed_point.broyden import Broyden
from implicitly.fixed_point.newton import Newton, NewtonKrylov
from implicitly.fixed_point.picard import FixedPointIteration
from implicitly.fixed_point.solve import fixed_point, root
from implicitly.independence import check_independence
from implicitly.linear import CG, GMRES, BiCGStab, DenseLU, Neumann
from implicitly.linear_solve import linear_solve
from implicitly.ode.adams import Adams
from implicitly.ode.adjoints import RecursiveCheckpointAdjoint
from implicitly.ode.backsolve import BacksolveAdjoint
from implicitly.ode.control import Controller
from implicitly.ode.delay import ddeint
from implicitly.ode.events import Event
from implicitly.ode.implicit_runge_kutta import ImplicitEuler, ImplicitMidpoint, Kvaerno3, Kvaerno5, Trapezoid
from implicitly.ode.reversible_heun import ReversibleHeun
from implicitly.ode.runge_kutta import RK4, Bosh3, Dopri5, Dopri8, Euler, Heun, Midpoint, Ralston, Tsit5
from implicitly.ode.solve import Trajectory, odeint
from implicitly.ode.symplectic import BlanesMoan4, Leapfrog, Yoshida4
from implicitly.solution import ConvergenceWarning, Solution, SolverError, Status
from implicitly.taylor.jet import jet, trajectory_derivatives
from implicitly.unrolled import UnrolledAdjoint

__all__ = [
    "ADMM",
    "CG",
    "GMRES",
    "LBFGS",
    "RK4",
    "Adams",
    "Anderson",
    "BacksolveAdjoint",
    "BiCGStab",
    "BlanesMoan4",
    "Bosh3",
    "Broyden",
    "Clarabel",
    "CompileWarning",
    "CompiledSolve",
    "ConstrainedSolution",
    "Controller",
    "ConvergenceWarning",
    "DenseLU",
    "Dopri5",
    "Dopri8",
    "Equality",
    "Euler",
    "Event",
    "FixedPointIteration",
    "GaussNewton",
    "GradientDescent",
    "Heun",
    "ImplicitAdjoint",
    "ImplicitEuler",
    "ImplicitMidpoint",
    "InteriorPoint",
    "JacobianFreeAdjoint",
    "KKTAdjoint",
    "Kvaerno3",
    "Kvaerno5",
    "Leapfrog",
    "LevenbergMarquardt",
    "Midpoint",
    "Neumann",
    "Newton",
    "NewtonKKT",
    "NewtonKrylov",
    "PhantomAdjoint",
    "ProgramSolution",
    "ProjectedGradient",
    "Projection",
    "Ralston",
    "RecursiveCheckpointAdjoint",
    "ReversibleHeun",
    "Solution",
    "SolverError",
    "Status",
    "Trajectory",
    "Trapezoid",
    "Tsit5",
    "UnrolledAdjoint",
    "Yoshida4",
    "argmin",
    "check_independence",
    "compile_statistics",
    "ddeint",
    "fixed_point",
    "implicit_gradient",
    "jet",
    "least_squares",
    "linear_solve",
    "nn",
    "odeint",
    "project",
    "prox",
    "proximal",
    "qp",
    "root",
    "soft_rank",
    "soft_sort",
    "sparsemax",
    "trajectory_derivatives",
]
