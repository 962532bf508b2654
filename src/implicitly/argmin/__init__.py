"""Optimisation problems as layers. Start reading at `solve.py`."""
