"""Optimisation problems as layers. Where to begin reading:

- `argmin`: `solve.py`, then `conditions.py` (what a minimum satisfies), a solver such as `lbfgs.py`, and for sets
  and equations `projection.py` and `equality.py`.
- `qp`: `qp.py`, `program.py` (the six tensors, and their units), `find.py`, `interior_point.py` or `admm.py`,
  `polish.py` (from near the solution to it), `derivative.py`; linear systems in `kkt.py` and `condensed.py`.
- `nn.ConvexLayer`: `convex.py`, `canonical.py` (what cvxpy makes of a problem), `conic_program.py`,
  `conic_solver.py`, `conic_jacobian.py`; programs without cones become quadratic ones in `quadratic.py`.
- `im.project`, `im.prox`: `project.py`, `prox.py`, `ranking.py`; one kind of set a file beside them.
- `implicit_gradient`, `proximal`: `bilevel.py`.
"""
