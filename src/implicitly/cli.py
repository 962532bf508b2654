"""The command line: `implicitly tour | list | fit RECIPE`.

Recipes are the modules of `implicitly.recipes` that have a `Config` and a `main`; their options are the fields of
their `Config`. Listing them reads their source and imports nothing, so it is quick and needs no optional package.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import implicitly.recipes
from implicitly.data import DataError
from implicitly.recipes._checkpoints import CheckpointError
from implicitly.recipes._options import OptionError, check_folder
from implicitly.solution import SolverError

USAGE = """\
usage: implicitly COMMAND ...

Implicit layers for PyTorch: you state a condition on the output, a solver finds an output that
satisfies it, and the implicit function theorem gives the gradient.

commands:
  tour                 a demonstration that takes two minutes: train a model, measure the memory it
                       saves, check its gradient, train neural ODEs, learn polygons
  list                 list the recipes, which are example models to train
  fit RECIPE [...]     train a recipe; `implicitly fit RECIPE --help` lists its options

options:
  -h, --help           show this help message and exit
  --version            show the version and exit
"""

FIT_USAGE = """\
usage: implicitly fit RECIPE [options]

Train an example model. Every hyperparameter is an option: `implicitly fit RECIPE --help` lists
them. Recipes with long training runs have --resume, which continues an interrupted run.

recipes:
{recipes}
"""

LIST_USAGE = """\
usage: implicitly list

List the recipes and what each one trains.
"""

# The extra of this package that installs a module, for those that may be missing.
EXTRAS = {"matplotlib": "viz"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (default: those of the process) ask for.

    Returns:
        The exit status: 0, 1 where the command failed, 2 where it was not understood.

    Raises:
        SystemExit: the options of a recipe or of the tour were not understood (2), or `--help` was (0).
    """
    match list(sys.argv[1:] if arguments is None else arguments):
        case [] | ["-h" | "--help", *_]:
            print(USAGE)
            return 0
        case ["--version"]:
            print(importlib.metadata.version("implicitly"))
            return 0
        case ["--version", *extra]:
            return _refuse(f"`implicitly --version` takes no arguments; got {' '.join(extra)}")
        case ["list"]:
            print(_listing(find_recipes()))
            return 0
        case ["list", "-h" | "--help", *_]:
            print(LIST_USAGE)
            return 0
        case ["fit"] | ["fit", "-h" | "--help", *_]:
            print(FIT_USAGE.format(recipes=_listing(find_recipes())))
            return 0
        case ["fit", option, *_] if option.startswith("-"):
            return _refuse(f"put the recipe before its options: `implicitly fit RECIPE {option} ...`")
        case ["fit", name, *options]:
            return _fit(name, options)
        case ["tour", *options]:
            return _run("implicitly.tour", "implicitly tour", options)
        case ["list", *extra]:
            return _refuse(f"`implicitly list` takes no arguments; got {' '.join(extra)}")
        case [option, *_] if option.startswith("-"):
            return _refuse(f"there is no option {option!r}. {_closest(option, ['--help', '--version'])}")
        case [command, *_]:
            return _refuse(f"there is no command {command!r}. {_closest(command, ['tour', 'list', 'fit'])}")
        case _:
            raise AssertionError("unreachable: the cases above cover every list")


def find_recipes() -> dict[str, str]:
    """The names of the recipes, as they are typed, each with the first line of its `Config`'s docstring."""
    recipes = {}
    for finder, name, _ in pkgutil.iter_modules(implicitly.recipes.__path__):
        spec = finder.find_spec(name, None)
        if spec is None or spec.origin is None:
            continue
        body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
        configs = [node for node in body if isinstance(node, ast.ClassDef) and node.name == "Config"]
        runs = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)
        if configs and runs:
            recipes[name.replace("_", "-")] = (ast.get_docstring(configs[0]) or "").partition("\n")[0]
    return recipes


def _fit(name: str, options: list[str]) -> int:
    recipes = find_recipes()
    name = name.replace("_", "-")
    if name not in recipes:
        return _refuse(
            f"there is no recipe {name!r}. {_closest(name, list(recipes))}\n\nrecipes:\n{_listing(recipes)}"
        )
    module = f"implicitly.recipes.{name.replace('-', '_')}"
    return _run(module, f"implicitly fit {name}", options)


def _run(module_name: str, program: str, options: list[str]) -> int:
    """Fill the `Config` of a module from the options and run its `main`, whose result is the status if an int."""
    try:
        import tyro

        module = importlib.import_module(module_name)
        config = tyro.cli(module.Config, prog=program, description=module.Config.__doc__, args=options)
        if getattr(config, "out", None) is not None:
            check_folder(config.out)  # now, not after the training
        result = module.main(config)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "implicitly"):
            raise
        extras = ",".join(dict.fromkeys(["recipes", EXTRAS.get(package, "recipes")]))
        return _fail(
            f"{program}: {package} is not installed. To install everything this command needs:\n\n"
            f'    pip install "implicitly[{extras}]"',
        )
    except OptionError as error:
        return _refuse(str(error), program)
    # The disk, the network, the data or a solve failed: a traceback would say no more.
    except (OSError, DataError, CheckpointError, SolverError) as error:
        return _fail(f"{program}: {error}")
    return result if isinstance(result, int) else 0


def _listing(recipes: dict[str, str]) -> str:
    width = max((len(name) for name in recipes), default=0)
    return "\n".join(f"  {name:<{width}}  {summary}" for name, summary in recipes.items())


def _closest(word: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {matches[0]!r}?" if matches else f"Available: {', '.join(known)}."


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


def _refuse(message: str, program: str = "implicitly") -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
