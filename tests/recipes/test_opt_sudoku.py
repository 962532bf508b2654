"""opt-sudoku: the boards, the layer, what is learned, measured, drawn and written."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

from torch.utils.data import TensorDataset

from implicitly.data import make_sudoku4, solutions4
from implicitly.recipes import opt_sudoku
from implicitly.recipes._options import OptionError
from implicitly.recipes.opt_sudoku import Config, Conv, OptNet, are_wrong, fit, rules_found, split

SMALL = Config(
    boards=400, batch_size=40, epochs=3, conv_epochs=3, channels=16, layers=3, held_out=0.1, progress=False
)


@pytest.fixture(scope="module")
def boards():
    return make_sudoku4(600)


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch):
    monkeypatch.delenv("IMPLICITLY_DATA", raising=False)


def rules():
    """`(64, 64)`: each entry has one digit; each row, column and block has each digit once."""
    row, column, digit = torch.cartesian_prod(*[torch.arange(4)] * 3).T
    block = row // 2 * 2 + column // 2
    groups = (4 * row + column, 4 * row + digit, 4 * column + digit, 4 * block + digit)
    return torch.cat([torch.nn.functional.one_hot(group, 16).T for group in groups]).double()


def test_no_board_is_in_two_sets_and_new_solutions_are_new(boards):
    splits = split(boards, SMALL)
    assert len(splits.train) == SMALL.boards
    sets = (splits.train, splits.known, splits.new)
    assert sum(len(one) for one in sets) == len(boards)
    puzzles = torch.cat([one.tensors[0] for one in sets])
    assert len(puzzles.flatten(1).unique(dim=0)) == len(boards)
    solutions = [one.tensors[1].flatten(1).unique(dim=0) for one in sets]
    together = torch.cat([torch.cat(solutions[:2]).unique(dim=0), solutions[2]])
    assert len(together.unique(dim=0)) == len(together)
    assert len(solutions[2]) == pytest.approx(0.1 * 288, abs=4)
    assert not torch.equal(split(boards, replace(SMALL, seed=1)).train.tensors[0], splits.train.tensors[0])
    with pytest.raises(OptionError, match=r"held_out=0\.999 leaves no boards for training"):
        split(boards, replace(SMALL, held_out=0.999))
    with pytest.raises(ValueError, match=r"boards must leave some of the .* boards for testing; got 600"):
        split(boards, replace(SMALL, boards=600))


def test_the_layer_that_is_told_the_rules_solves_every_board(boards):
    model = OptNet(64, SMALL.ridge)
    with torch.no_grad():
        model.A.copy_(rules())
    z = model(boards.puzzles[:100])
    assert z.shape == (100, 4, 4, 4)
    assert z.min() > -1e-8
    one = torch.ones(100, 64, dtype=torch.float64)
    torch.testing.assert_close(z.flatten(1) @ rules().T, one, rtol=0, atol=1e-7)
    assert not are_wrong(z, boards.solutions[:100]).any()
    assert (model.programs, model.unsolved) == (100, 0)


def test_programs_that_are_not_solved_are_counted_and_told(boards, monkeypatch):
    import implicitly as im

    splits = split(boards, replace(SMALL, boards=40))
    result = fit("optnet", replace(SMALL, boards=40, epochs=1), splits)
    model = result.training.model
    assert isinstance(model, OptNet)
    assert model.unsolved == 0
    original = im.qp
    hurried = im.InteriorPoint(max_steps=1)
    missed = []

    def hurry(*args, **options):
        sol = original(*args, **options, solver=hurried)
        missed.extend((sol.status != im.Status.CONVERGED).tolist())
        return sol

    monkeypatch.setattr(im, "qp", hurry)
    model(boards.puzzles[:50])
    assert len(missed) == 50
    assert model.unsolved == sum(missed) > 40  # what one step finds may by chance be on the right active set
    caption = opt_sudoku.results_table([result], splits).caption
    assert f"{model.unsolved} of {model.programs:,} programs were not solved to the tolerance" in str(caption)


def test_rules_that_are_found():
    basis = torch.linalg.svd(rules()).Vh[:40]
    assert rules_found(basis) == pytest.approx(1)
    assert rules_found(torch.randn(40, 40, dtype=torch.float64) @ basis) == pytest.approx(1)
    assert rules_found(basis[:30]) == pytest.approx(0.75)
    random = [rules_found(torch.randn(40, 64, dtype=torch.float64)) for _ in range(20)]
    assert sum(random) / 20 == pytest.approx(40 / 64, abs=0.02)


def test_a_board_is_wrong_where_one_digit_is():
    solutions = solutions4()[:3]
    z = 0.4 * solutions + 0.1
    assert are_wrong(z, solutions).tolist() == [False, False, False]
    z[1, 2, 3] = z[1, 2, 3].roll(1)
    assert are_wrong(z, solutions).tolist() == [False, True, False]
    boards = TensorDataset(solutions, solutions)

    class Given(torch.nn.Module):
        def forward(self, puzzles):
            return z

    wrong, loss = opt_sudoku.test(Given(), boards)
    assert wrong == pytest.approx(1 / 3)
    assert loss == pytest.approx(float((z - solutions).square().mean()))


@pytest.mark.slow
def test_the_layer_finds_rules(boards):
    splits = split(boards, SMALL)
    result = fit("optnet", replace(SMALL, epochs=6), splits)
    assert result.rules is not None
    assert result.rules > 0.75  # at the start 0.625
    assert result.loss < 0.17  # of a blank board 0.25, of equal weights 0.1875
    assert result.parameters == 40 * 64 + 64
    steps = [step for step, _ in result.training.curve]
    assert steps[0] == 1
    assert steps[-1] == 6 * 10
    assert result.training.curve[-1][1] == result.wrong["new"]


def test_training_can_be_repeated(boards):
    small = replace(SMALL, epochs=1, conv_epochs=1, boards=100)
    few = replace(boards, puzzles=boards.puzzles[:160], solutions=boards.solutions[:160])
    splits = split(few, small)
    for name in ("optnet", "conv"):
        first, second = (fit(name, small, splits) for _ in range(2))
        assert first.loss == second.loss
        assert first.wrong == second.wrong
        assert fit(name, replace(small, seed=1), splits).loss != first.loss


def test_the_convolutional_network_gives_weights_of_digits(boards):
    z = Conv(8, 2)(boards.puzzles[:10])
    assert z.shape == (10, 4, 4, 4)
    torch.testing.assert_close(z.sum(dim=-1), torch.ones(10, 4, 4))
    # What is written in a cell reaches the weights of that cell.
    x = boards.puzzles[:1].clone().requires_grad_()
    Conv(8, 1).eval()(x)[0, 0, 0, 0].backward()
    assert x.grad is not None
    assert x.grad[0, :2, :2].abs().amax(dim=-1).all()
    assert not x.grad[0, 2:].any()


def test_main_leaves_a_table_pictures_and_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(opt_sudoku, "sudoku4", lambda folder, seed: make_sudoku4(200, seed))
    config = replace(SMALL, boards=100, batch_size=50, epochs=1, conv_epochs=1, out=tmp_path)
    results = opt_sudoku.main(config)
    text = capsys.readouterr().out
    assert "generated boards" in text
    assert "rules of Sudoku" in text
    for result in results:
        for wrong in result.wrong.values():
            assert f"{100 * wrong:.2f} %" in text
        weights = torch.load(tmp_path / f"{result.name}.pt")
        assert weights.keys() == result.training.model.state_dict().keys()
    for name in ("curves.png", "boards.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"boards": 0}, "boards must be at least 1; got 0"),
        ({"equations": 0}, "equations must be at least 1"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1; got 1.0"),
        ({"ridge": 0.0}, "ridge must be positive; got 0.0"),
        ({"networks": ()}, "networks must contain"),
        ({"networks": ("conv", "conv")}, "none twice"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Config(**wrong)
