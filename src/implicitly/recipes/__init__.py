"""Example models, one readable file each, to be trained from the command line: `implicitly fit RECIPE`.

A module here is a recipe if it has a dataclass `Config`, whose docstring says in its first line what is trained,
and a function `main(config)`. It needs no registration elsewhere.
"""
