"""Optimisation problems as layers.

Where to begin reading:

- `argmin`: `solve.py`, then `conditions.py` (what a minimum satisfies), a solver such as `lbfgs.py`, and for
  constraints `projection.py` and `equality.py`.
- `implicit_gradient`, `proximal`: `bilevel.py`.
- `qp`: the folder `programs`.
- `im.project`, `im.prox`: the folder `sets`.
- `nn.ConvexLayer`: the folder `convex`, which imports both.
"""
