"""Optimisation problems as layers: quadratic and convex programs, projections, minimisers."""
