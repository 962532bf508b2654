"""Optimisation problems as layers: `argmin` in `solve.py`, quadratic programs in `qp.py`, projections, bilevel."""
