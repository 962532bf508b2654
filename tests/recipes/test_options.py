"""Options that cannot be meant are refused at the door, by every recipe in the same way."""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

from implicitly.cli import find_recipes
from implicitly.recipes._options import OptionError, check_folder

CONFIGS = {
    name: importlib.import_module(f"implicitly.recipes.{name.replace('-', '_')}").Config for name in find_recipes()
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def fields_of(config, kind):
    return [field.name for field in dataclasses.fields(config) if field.type == kind]


@EACH
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_numbers_that_are_none_or_without_end(config, value):
    for name in fields_of(config, "float"):
        with pytest.raises(ValueError, match=f"{name.removeprefix('decay_')}|tolerance|clean"):
            config(**{name: value})


@EACH
def test_counts_below_zero(config):
    for name in fields_of(config, "int"):
        with pytest.raises(ValueError, match=f"{name} must|groups must|clean must"):
            config(**{name: -1})


@EACH
def test_seeds_that_not_every_generator_takes(config):
    config(seed=2**32 - 1)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed must lie between 0 and 4294967295; got {seed}"):
            config(seed=seed)


@pytest.mark.parametrize(
    ("recipe", "name", "least"),
    [
        ("ode-circles", "rtol", torch.finfo(torch.float32).eps),
        ("ode-easy", "tolerance", torch.finfo(torch.float64).eps),
        ("ode-fit", "rtol", torch.finfo(torch.float64).eps),
        ("ode-physics", "tolerance", torch.finfo(torch.float64).eps),
        ("opt-hyper", "rtol", torch.finfo(torch.float32).eps),
    ],
)
def test_tolerances_that_the_precision_cannot_reach(recipe, name, least):
    CONFIGS[recipe](**{name: 4 * least})
    with pytest.raises(ValueError, match="tol"):
        CONFIGS[recipe](**{name: least / 2})


def test_a_folder_is_one_or_can_be_made(tmp_path):
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "newer")
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(OptionError, match=rf"out={path} must be a folder, but {file} is a file"):
            check_folder(path)
