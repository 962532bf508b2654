"""One readable file a model, each trainable from the command line: `implicitly fit RECIPE`.

A module here is a recipe if it has a dataclass `Config`, the first line of whose docstring says what it
trains, and a function `main(config)`. Nothing else needs to know about it.
"""
