"""Sets and penalties, each by the nearest point of it. Where to begin reading: `project.py` (`im.project`),
`prox.py` (`im.prox`) and `ranking.py`; one kind of set a file beside them, with its derivative.
"""
