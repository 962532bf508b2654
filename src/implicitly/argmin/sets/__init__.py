"""Projections onto sets and proximal maps of penalties.

Start reading at `project.py` (`im.project`), `prox.py` (`im.prox`) and `ranking.py`. The other files hold one kind
of set each, with its derivative.
"""
