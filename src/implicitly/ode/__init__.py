"""Ordinary differential equations. Where to begin reading:

- `odeint`: `solve.py`, `problem.py` (the user's input, as matrices), `method.py` and `runge_kutta.py` (one step),
  `control.py` (its length), `integrate.py` (the loop), `adjoints.py` and `record.py` (its derivative).
- Other methods: `implicit_runge_kutta.py` (stiff systems), `adams.py`, `symplectic.py`, `reversible_heun.py`.
- Events: `events.py`, `hybrid.py`, `crossings.py`. The continuous adjoint: `backsolve.py`, `augmented.py`.
- `compile=True`: `graph.py`, `graph_adjoint.py`, `graph_backsolve.py`. Constant steps: `planned.py`, and in models
  that the user compiles `unroll.py`.
- `ddeint`: `delay.py`, `piecewise.py`.
"""
