"""Problems written in cvxpy, for `nn.ConvexLayer`.

Where to begin reading: `solve.py`, `canonical.py` (the canonical form that cvxpy makes of a problem),
`conic_program.py`, `conic_solver.py`, `conic_jacobian.py`. Programs without cones become quadratic programs, in
`quadratic.py`.
"""
