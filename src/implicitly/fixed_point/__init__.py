"""Fixed points z = f(z, x) and roots F(z, x) = 0. Start reading at `solve.py`."""
