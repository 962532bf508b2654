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
    assert re.search("deq-image +Image classification with a deep equilibrium model", process.stdout)
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
        (["fit", "zzz"], "there is no recipe 'zzz'. Available: deq-image"),
        (["turo"], "there is no command 'turo'. Did you mean 'tour'?"),
        (["list", "all"], "`implicitly list` takes no arguments; got all"),
        (["--version", "extra"], "`implicitly --version` takes no arguments; got extra"),
        (["--verson"], "there is no option '--verson'. Did you mean '--version'?"),
        (["fit", "--resume"], "put the recipe before its options: `implicitly fit RECIPE --resume ...`"),
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
        (["--rtol", "-1"], "Anderson: rtol must be a finite number >= 0, got -1.0"),
        (["--rtol", "1e-12"], "torch.float32 cannot reach rtol=1e-12"),
        (["--rtol", "1e-4", "--precision", "bf16-mixed"], "torch.bfloat16 cannot reach rtol=0.0001"),
        (["--history", "0"], "history must be at least 1; got 0"),
        (["--solver-steps", "0"], "solver_steps must be at least 1; got 0"),
        (["--pooled-size", "0"], "pooled_size must be at least 1; got 0"),
        (["--learning-rate", "-1"], "learning_rate must be positive; got -1.0"),
        (["--learning-rate", "nan"], "learning_rate must be positive; got nan"),
        (["--seed", "-1"], "seed must lie between 0 and 4294967295; got -1"),
        (["--accelerator", "foo"], "foo"),
        (["--data", "nowhere"], "data has no effect: the digits come with scikit-learn"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
    with pytest.raises(SystemExit) as leaving:
        main(["fit", "deq-image", *options])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--epochs", "0"], ["--accuracy", "2"], ["--accuracy", "nan"]])
def test_bad_options_of_the_tour_are_refused(options, capsys):
    pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
    pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")
    with pytest.raises(SystemExit) as leaving:
        main(["tour", *options])
    assert leaving.value.code == 2
    assert f"{options[0].strip('-')} must" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["fit", "deq-image"], ["tour"]])
@pytest.mark.parametrize("below", [".", "x"])
def test_a_file_is_no_folder_to_write_to(command, below, tmp_path, capsys):
    pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
    pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")
    file = tmp_path / "file"
    file.touch()
    assert main([*command, "--out", str(file / below)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"implicitly {' '.join(command)}: out=")
    assert f"must be a folder, but {file} is a file" in error
    assert error.count("\n") == 1


def test_options_that_do_not_fit_the_data_are_refused(tmp_path, capsys):
    pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
    assert main(["fit", "deq-image", "--out", str(tmp_path), "--validation", "0.9999"]) == 2
    assert "validation=0.9999 holds out all 1,437 images" in capsys.readouterr().err
    assert main(["fit", "ode-mnist", "--out", str(tmp_path), "--downsamplings", "4"]) == 2
    assert "downsamplings=4 is too many for images of 8x8 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", ["OSError(28, 'No space left on device', 'a.ckpt')", "SolverError('it fell short', None)"]
)
def test_what_fails_on_the_way_is_told_in_one_line(error, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tyro", reason="needs the extra: implicitly[recipes]")
    (tmp_path / "failing.py").write_text(
        "from dataclasses import dataclass\nfrom implicitly.solution import SolverError\n"
        f'@dataclass\nclass Config:\n    """Fails."""\n\ndef main(config):\n    raise {error}\n'
    )
    monkeypatch.setattr(implicitly.recipes, "__path__", [*implicitly.recipes.__path__, str(tmp_path)])
    sys.modules.pop("implicitly.recipes.failing", None)
    assert main(["fit", "failing"]) == 1
    assert capsys.readouterr().err in (
        "implicitly fit failing: [Errno 28] No space left on device: 'a.ckpt'\n",
        "implicitly fit failing: it fell short\n",
    )


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
    assert f"the data set 'mnist' was expected in {tmp_path / 'mnist'}" in capsys.readouterr().err
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
    assert "no_such_package is not installed" in error
    assert 'pip install "implicitly[recipes]"' in error
    with pytest.raises(ModuleNotFoundError):  # a mistake of ours is not a missing extra
        main(["fit", "second"])


@pytest.mark.slow
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
    assert "contains the checkpoints of another run" in capsys.readouterr().err
    assert main([*options, "--epochs", "2", "--resume"]) == 0
    assert "deq-image on digits" in capsys.readouterr().out
