"""Points that minimise an objective over a feasible set."""
