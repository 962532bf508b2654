"""The command line: what it prints, what it refuses, and that it is quiet."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import implicitly.recipes
from implicitly.cli import find_recipes, main


def test_list_and_help_import_no_optional_package(capsys):
    code = (
        "import sys; from implicitly.cli import main; main(['list']); main(['--help']); main(['fit']);"
        "print(sorted({'lightning', 'tyro', 'rich', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip().endswith("[]")
    assert re.search("deq-image +Image classification by the equilibrium", process.stdout)
    assert "usage: implicitly COMMAND" in process.stdout


def test_every_recipe_module_is_found_and_introduces_itself():
    folder = Path(implicitly.recipes.__path__[0])
    modules = {path.stem.replace("_", "-") for path in folder.glob("[!_]*.py")}
    assert set(find_recipes()) == modules
    assert all(len(summary) > 20 for summary in find_recipes().values())


def test_recipes_are_found_by_looking(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_model.py").write_text(
        'from dataclasses import dataclass\n@dataclass\nclass Config:\n    """A model of mine.\n\n    More."""\n'
        "    width: int = 3\n\ndef main(config):\n    print('width', config.width)\n"
    )
    (tmp_path / "helper.py").write_text("def main(config): ...\n")
    monkeypatch.setattr(implicitly.recipes, "__path__", [*implicitly.recipes.__path__, str(tmp_path)])
    assert find_recipes()["my-model"] == "A model of mine."
    assert "helper" not in find_recipes()
    pytest.importorskip("tyro", reason="needs the extra: implicitly[recipes]")
    assert main(["fit", "my-model", "--width", "7"]) == 0
    assert capsys.readouterr().out == "width 7\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fit", "deq-imagge"],
            "there is no recipe 'deq-imagge'. Did you mean 'deq-image'?\n\nrecipes:\n  deq-image",
        ),
        (["fit", "zzz"], "there is no recipe 'zzz'. There are: deq-image"),
        (["turo"], "there is no command 'turo'. Did you mean 'tour'?"),
        (["list", "all"], "`implicitly list` takes no arguments; got all"),
    ],
)
def test_what_is_not_understood_is_refused(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epocs", "3"], "--epocs"),
        (["--epochs", "0"], "epochs must be at least 1; got 0"),
        (["--dataset", "imagenet"], "imagenet"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
    with pytest.raises(SystemExit) as leaving:
        main(["fit", "deq-image", *options])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_help_of_a_recipe_names_every_field(capsys):
    pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
    from implicitly.recipes.deq_image import Config

    with pytest.raises(SystemExit) as leaving:
        main(["fit", "deq-image", "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert "usage: implicitly fit deq-image" in text


def test_missing_data_and_checkpoints_are_told_in_one_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "deq-image", "--dataset", "mnist", "--data", str(tmp_path)]) == 1
    assert f"looked for the data set 'mnist' in {tmp_path / 'mnist'}" in capsys.readouterr().err
    assert main(["fit", "deq-image", "--resume"]) == 1
    assert "nothing to resume" in capsys.readouterr().err


def test_missing_package_names_the_extra(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tyro", reason="needs the extra: implicitly[recipes]")
    source = (
        'from dataclasses import dataclass\n@dataclass\nclass Config:\n    """Needs what nobody has."""\n\n'
        "def main(config):\n    import {}\n"
    )
    for recipe, package in (("first", "no_such_package.part"), ("second", "implicitly.no_such_module")):
        (tmp_path / f"{recipe}.py").write_text(source.format(package))
    monkeypatch.setattr(implicitly.recipes, "__path__", [*implicitly.recipes.__path__, str(tmp_path)])
    assert main(["fit", "first"]) == 1
    error = capsys.readouterr().err
    assert "needs no_such_package, which is not installed" in error
    assert 'pip install "implicitly[recipes]"' in error
    with pytest.raises(ModuleNotFoundError):  # a mistake of ours is not a missing extra
        main(["fit", "second"])


def test_fit_is_quiet_and_can_be_resumed(tmp_path, capsys):
    """Warnings are errors, stderr stays empty, and nothing but the recipe speaks."""
    pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
    small = ["--channels", "8", "--inner-channels", "8", "--groups", "2", "--no-progress"]
    options = ["fit", "deq-image", "--models", "resnet", *small, "--out", str(tmp_path)]
    command = [sys.executable, "-W", "error", "-m", "implicitly.cli", *options, "--epochs", "1"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (process.returncode, process.stderr) == (0, "")
    assert "deq-image on digits" in process.stdout
    for noise in ("Tip", "GPU", "litlogger", "num_workers", "Warning"):
        assert noise not in process.stdout

    assert main([*options, "--epochs", "2"]) == 1
    assert "holds the checkpoints of another run" in capsys.readouterr().err
    assert main([*options, "--epochs", "2", "--resume"]) == 0
    assert "deq-image on digits" in capsys.readouterr().out
