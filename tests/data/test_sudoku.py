"""Boards of 4x4: all solutions, puzzles with one solution each, and what files are refused."""

import os
import re

import pytest
import torch

from implicitly.data import DataError, make_sudoku4, solutions4, sudoku4


def entries(boards):
    """`(count, 4, 4)` of 1 to 4, 0 where blank."""
    return torch.where(boards.sum(-1) == 1, boards.argmax(-1) + 1, 0)


def solutions_of(puzzle):
    """Entries of all boards that agree with `puzzle` `(4, 4)`, found by trying."""
    blanks = (puzzle == 0).nonzero().tolist()
    if not blanks:
        return [puzzle]
    row, column = blanks[0]
    block = puzzle[row // 2 * 2 : row // 2 * 2 + 2, column // 2 * 2 : column // 2 * 2 + 2]
    seen = {*puzzle[row].tolist(), *puzzle[:, column].tolist(), *block.flatten().tolist()}
    found = []
    for digit in {1, 2, 3, 4} - seen:
        fuller = puzzle.clone()
        fuller[row, column] = digit
        found += solutions_of(fuller)
    return found


@pytest.fixture
def folder(tmp_path):
    """A data folder that holds a few boards in OptNet's format."""
    boards = make_sudoku4(20)
    place = tmp_path / "sudoku4_optnet"
    place.mkdir()
    torch.save(boards.puzzles, place / "features.pt")
    torch.save(boards.solutions, place / "labels.pt")
    return tmp_path


def test_there_are_288_solutions():
    boards = entries(solutions4())
    assert boards.shape == (288, 4, 4)
    assert len(boards.unique(dim=0)) == 288
    blocks = boards.view(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4, 4)
    for groups in (boards, boards.transpose(1, 2), blocks):
        assert torch.equal(groups.sort(dim=-1).values, torch.arange(1, 5).expand(288, 4, 4))


def test_made_puzzles_have_one_solution_and_few_clues_to_spare():
    boards = make_sudoku4(300)
    assert len(boards) == len(boards.puzzles.unique(dim=0)) > 280
    for puzzle, solution in zip(entries(boards.puzzles[:40]), entries(boards.solutions)):
        (only,) = solutions_of(puzzle)
        assert torch.equal(only, solution)
        clues = puzzle.nonzero().tolist()
        assert len(clues) >= 4
        for row, column in clues if len(clues) in (4, 7, 8) else []:
            fewer = puzzle.clone()
            fewer[row, column] = 0
            assert len(solutions_of(fewer)) > 1
    counts = (boards.puzzles.sum(dim=(1, 2, 3))).int().bincount() / len(boards)
    torch.testing.assert_close(counts[4:7], torch.tensor([1, 4, 2]) / 7, rtol=0, atol=0.1)
    assert torch.equal(make_sudoku4(300).puzzles, boards.puzzles)
    assert not torch.equal(make_sudoku4(300, seed=1).puzzles[:280], boards.puzzles[:280])
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        make_sudoku4(0)


def test_boards_are_read_from_the_folder_that_is_named(folder, monkeypatch):
    monkeypatch.delenv("IMPLICITLY_DATA", raising=False)
    made = make_sudoku4(20)
    read = sudoku4(folder)
    assert torch.equal(read.puzzles, made.puzzles)
    assert torch.equal(read.solutions, made.solutions)
    assert read.puzzles.dtype == torch.float32
    assert sudoku4(count=30).name == "generated boards"
    monkeypatch.setenv("IMPLICITLY_DATA", str(folder))
    assert sudoku4().name == "OptNet's boards"


def test_of_equal_puzzles_the_first_is_kept(folder):
    place = folder / "sudoku4_optnet"
    for name in ("features.pt", "labels.pt"):
        boards = torch.load(place / name)
        torch.save(torch.cat([boards[:5], boards]), place / name)
    assert torch.equal(sudoku4(folder).puzzles, make_sudoku4(20).puzzles)


def edit(folder, name, change):
    path = folder / "sudoku4_optnet" / name
    boards = torch.load(path)
    torch.save(change(boards), path)


def exchanged(boards):
    """The first two digits of the first row change places: no Sudoku."""
    boards[3, 0, :2] = boards[3, 0, :2].flip(0)
    return boards


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("features.pt", lambda b: b[:7], "features.pt contains 7 boards, but labels.pt 20"),
        ("features.pt", lambda b: b.flip(0), "board 0 of features.pt contradicts its solution"),
        ("features.pt", lambda b: b.flatten(1), re.escape("it contains (20, 64)")),
        ("features.pt", lambda b: {"boards": b}, "it contains dict"),
        ("features.pt", lambda b: b / 2, "must contain only 0 and 1"),
        ("labels.pt", exchanged, "board 3 of labels.pt is not a solved Sudoku"),
        ("labels.pt", torch.zeros_like, "board 0 of labels.pt is not a solved Sudoku"),
    ],
)
def test_wrong_files_are_refused(folder, name, change, message):
    edit(folder, name, change)
    with pytest.raises(DataError, match=message):
        sudoku4(folder)


def test_missing_and_damaged_files_are_named(folder, tmp_path):
    place = folder / "sudoku4_optnet"
    content = (place / "labels.pt").read_bytes()
    (place / "labels.pt").write_bytes(content[:100])
    with pytest.raises(DataError, match=r"labels\.pt cannot be read"):
        sudoku4(folder)
    (place / "labels.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*labels\.pt"):
        sudoku4(folder)
    with pytest.raises(FileNotFoundError, match="give none to use generated boards"):
        sudoku4(tmp_path / "elsewhere")


def test_the_boards_of_optnet_have_one_solution_each():
    folder = os.environ.get("IMPLICITLY_DATA")
    if folder is None:
        pytest.skip("needs OptNet's boards: set IMPLICITLY_DATA to a folder that holds sudoku4_optnet/")
    boards = sudoku4(folder)
    assert 9_000 < len(boards) <= 10_000
    puzzles, known = boards.puzzles.flatten(1), solutions4().flatten(1)
    assert ((puzzles @ known.T == puzzles.sum(1, keepdim=True)).sum(1) == 1).all()
