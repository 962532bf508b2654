"""Problems of cvxpy, as in `nn.ConvexLayer`. Where to begin reading: `solve.py`, `canonical.py` (what cvxpy makes
of a problem), `conic_program.py`, `conic_solver.py`, `conic_jacobian.py`; programs without cones become quadratic
ones in `quadratic.py`.
"""
