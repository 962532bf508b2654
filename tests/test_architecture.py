"""Imports go downward only, functions fit on a screen, and no error is swallowed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "implicitly"
FILES = sorted(SOURCE.rglob("*.py"))

# From low to high; a module imports from layers below its own only. Within a layer of several files (a family)
# they import each other as they like, without cycles; what shares a line does not import each other.
LAYERS = (
    ("leaf_names", "transforms", "checks", "solution", "reached", "keys"),
    ("tree", "unrolled", "taylor", "graph_break", "inference", "exchange"),
    ("functions", "pullback"),
    ("host", "independence"),
    ("history",),
    ("iterate",),
    ("linear", "descent"),
    ("condition",),
    ("implicit",),
    ("linearised", "changing", "known_views"),
    ("compiled",),
    ("problem",),
    ("linear_solve", "adjoints"),
    ("fixed_point", "ode", "sde", "argmin", "pde"),
    ("nn",),
    ("data", "viz"),
    ("recipes",),
    ("tour", "cli"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# Folders of a family, and the folders of it that each may import; its other files import none of them.
PARTS = {"argmin.sets": set(), "argmin.programs": set(), "argmin.convex": {"argmin.sets", "argmin.programs"}}
TOP = "implicitly"  # the package itself, which imports what is public


def module_of(file: Path) -> str:
    """`fixed_point.solve` of .../implicitly/fixed_point/solve.py; `fixed_point` of its __init__; "" of the top."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


MODULES = {module_of(file): file for file in FILES}


def layer_of(module: str) -> str:
    return module.partition(".")[0]


def imports_of(file: Path) -> set[str]:
    """Modules of the package that `file` imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != TOP:
                continue
            # The longest prefix that is a module: `from implicitly.tree import Layout` is of `tree`.
            while ".".join(parts[1:]) not in MODULES:
                parts.pop()
            found.add(".".join(parts[1:]))
    return found


IMPORTS = {module: imports_of(file) for module, file in MODULES.items()}


def test_every_module_has_its_layer():
    assert {layer_of(m) for m in MODULES if m} <= set(RANK)
    assert len(FILES) > 20


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_imports_go_downward_only(module):
    rank = RANK[layer_of(module)]
    for imported in IMPORTS[module]:
        if imported == "":
            assert rank >= RANK["recipes"], f"{module} imports the whole package"
        elif layer_of(imported) != layer_of(module):
            assert RANK[layer_of(imported)] < rank, f"{module} imports {imported}"


def test_families_do_not_import_each_other():
    families = LAYERS[RANK["fixed_point"]]
    for module, imported in IMPORTS.items():
        if layer_of(module) in families:
            assert {layer_of(i) for i in imported} & set(families) <= {layer_of(module)}, module


def test_folders_of_a_family_import_their_own_files_and_those_of_folders_below():
    def part(module: str) -> str:
        folder = ".".join(module.split(".")[:2])
        return folder if folder in PARTS else layer_of(module)

    for module, imported in IMPORTS.items():
        if layer_of(module) == "argmin":
            allowed = PARTS.get(part(module), set()) | {part(module)}
            assert {part(i) for i in imported if layer_of(i) == "argmin"} <= allowed, module
    assert all(any(part(m) == name for m in MODULES) for name in PARTS)


def test_the_kernel_knows_no_family():
    for module, imported in IMPORTS.items():
        if module and RANK[layer_of(module)] < RANK["fixed_point"]:
            assert all(RANK[layer_of(i)] < RANK["fixed_point"] for i in imported), module


def test_no_import_is_circular():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in IMPORTS[module] - {"", module}:
                visit(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        if module:
            visit(module, ())


def test_recipes_are_imported_by_nobody_but_the_tour():
    recipes = {m for m in MODULES if m.startswith("recipes.") and not m.startswith("recipes._")}
    assert recipes
    for module in MODULES.keys() - {"tour"}:
        assert not IMPORTS[module] & recipes, module


def _functions(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("module", MODULES)
def test_functions_fit_on_a_screen(module):
    for function in _functions(MODULES[module]):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length <= 60, f"{function.name} has {length} lines"


@pytest.mark.parametrize("module", MODULES)
def test_no_error_is_caught_without_saying_which(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            assert not caught & {"Exception", "BaseException"}, f"line {node.lineno}"


def test_public_names_are_what_the_package_says_and_nothing_else():
    import implicitly as im

    for name in im.__all__:
        assert hasattr(im, name), name
    assert len(set(im.__all__)) == len(im.__all__)


def test_whether_code_is_traced_is_asked_of_this_thread():
    """`torch.compiler.is_compiling` is true in all threads while one compiles; `is_dynamo_compiling` is not."""
    for file in FILES:
        assert "compiler.is_compiling" not in file.read_text(), file
