"""Taylor-mode differentiation: derivatives of any order, by power series."""
