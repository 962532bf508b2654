"""Quadratic programs.

Where to begin reading: `qp.py`, `program.py` (the six tensors, and their units), `find.py`, `interior_point.py` or
`admm.py`, `polish.py` (from a point near the solution to the solution itself), `derivative.py`; the linear systems
are in `kkt.py` and `condensed.py`.
"""
