"""Sudoku on 4x4 boards: those of OptNet, or ones generated here.

Each row, column and 2x2 block of a solution holds 1, 2, 3 and 4; there are 288 solutions. A puzzle is what is left
of a solution after entries are removed such that no other solution agrees with the rest.
"""

from __future__ import annotations

import functools
import itertools
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from implicitly.data.images import ENVIRONMENT_VARIABLE, DataError, find_folder

FOLDER = "sudoku4_optnet"
CLUES = (4, 5, 5, 5, 5, 6, 6)  # of a puzzle, each with equal probability


@dataclass(frozen=True)
class SudokuBoards:
    """Puzzles and their solutions.

    Attributes:
        puzzles: float32 `(count, 4, 4, 4)`, one-hot: `[i, row, column, d]` is 1 where the entry is d + 1, and
            a blank has four zeros. No two are the same.
        solutions: the same, without blanks.
        name: what the set is called.
    """

    puzzles: Tensor
    solutions: Tensor
    name: str

    def __len__(self) -> int:
        return len(self.puzzles)


def sudoku4(folder: Path | str | None = None, count: int = 10_000, seed: int = 0) -> SudokuBoards:
    """Load or make 4x4 boards: those of OptNet if a folder is known, else new ones.

    Args:
        folder: holds `sudoku4_optnet/` with `features.pt` and `labels.pt`, two tensors as in `SudokuBoards`, the
            boards of Amos and Kolter (github.com/locuslab/optnet). `None`: the folder that `IMPLICITLY_DATA`
            names; if that is not set either, boards are made by `make_sudoku4`.
        count, seed: for boards that are made.

    Returns:
        The boards; of several equal ones in the files, only the first.

    Raises:
        FileNotFoundError: a folder was named, and a file is missing in it.
        DataError: a file is damaged or is not what its name says.
    """
    place = find_folder(FOLDER, folder, otherwise="use generated boards")
    if place is None:
        return make_sudoku4(count, seed)
    puzzles, solutions = (_read(place / name) for name in ("features.pt", "labels.pt"))
    if len(puzzles) != len(solutions):
        raise DataError(f"{place}: features.pt contains {len(puzzles)} boards, but labels.pt {len(solutions)}")
    right = (solutions.flatten(1) @ solutions4().flatten(1).T).amax(dim=1) == 16
    if not right.all():
        raise DataError(f"{place}: board {int(right.int().argmin())} of labels.pt is not a solved Sudoku")
    agree = (puzzles <= solutions).flatten(1).all(dim=1)
    if not agree.all():
        raise DataError(
            f"{place}: board {int(agree.int().argmin())} of features.pt contradicts its solution in labels.pt"
        )
    rows = _first_of_each(puzzles)
    return SudokuBoards(puzzles[rows], solutions[rows], "OptNet's boards")


def make_sudoku4(count: int, seed: int = 0) -> SudokuBoards:
    """Make puzzles: remove entries of a random solution, in a random order, as long as it stays the only solution.

    This ends at 4, 5 or 6 clues, as often as with OptNet's boards, or at more if none of them can be spared.
    Puzzles that were made twice are kept once: of 10,000, about 9,800 are left.

    Raises:
        ValueError: `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    generator = torch.Generator().manual_seed(seed)
    known = solutions4().flatten(1)  # (288, 64)
    solutions = known[torch.randint(len(known), (count,), generator=generator)]
    order = torch.rand(count, 16, generator=generator).argsort(dim=1)
    enough = torch.tensor(CLUES)[torch.randint(len(CLUES), (count, 1), generator=generator)]
    puzzles = solutions.clone()
    for entry in order.T:
        fewer = puzzles.view(count, 16, 4).clone()
        fewer[torch.arange(count), entry] = 0
        fewer = fewer.flatten(1)
        # A known solution agrees with a puzzle if it shares all its clues.
        agreeing = (fewer @ known.T == fewer.sum(dim=1, keepdim=True)).sum(dim=1, keepdim=True)
        puzzles = torch.where((agreeing == 1) & (fewer.sum(dim=1, keepdim=True) >= enough), fewer, puzzles)
    puzzles, solutions = (boards.view(count, 4, 4, 4) for boards in (puzzles, solutions))
    rows = _first_of_each(puzzles)
    return SudokuBoards(puzzles[rows], solutions[rows], "generated boards")


def solutions4() -> Tensor:
    """All 288 solutions, one-hot, float32 `(288, 4, 4, 4)`, in lexicographic order."""
    return torch.nn.functional.one_hot(torch.tensor(_solutions()), 4).float()


@functools.cache
def _solutions() -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The digits 0 to 3 of all solutions, as four rows each."""
    orders = list(itertools.permutations(range(4)))
    # Two rows that fill two blocks; then two such pairs whose columns have no digit twice.
    pairs = [(a, b) for a, b in itertools.product(orders, repeat=2) if set(a[:2]).isdisjoint(b[:2])]
    boards = ((*above, *below) for above, below in itertools.product(pairs, repeat=2))
    return tuple(board for board in boards if all(len(set(column)) == 4 for column in zip(*board)))


def _first_of_each(puzzles: Tensor) -> Tensor:
    """The indices of rows of `puzzles` that equal no earlier row, in order."""
    _, which = puzzles.flatten(1).unique(dim=0, return_inverse=True)
    rows = torch.full((int(which.max()) + 1,), len(puzzles))
    return rows.scatter_reduce(0, which, torch.arange(len(puzzles)), "amin").sort().values


def _read(path: Path) -> Tensor:
    """One-hot boards `(count, 4, 4, 4)` from a file of `torch.save`."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path.absolute()}. Give the folder that contains '{FOLDER}/' with features.pt and "
            f"labels.pt (--data FOLDER, or {ENVIRONMENT_VARIABLE}=FOLDER)."
        )
    try:
        boards = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise DataError(f"{path.absolute()} cannot be read: {error}") from error
    if not isinstance(boards, Tensor) or boards.shape[1:] != (4, 4, 4) or len(boards) == 0:
        found = tuple(boards.shape) if isinstance(boards, Tensor) else type(boards).__name__
        raise DataError(f"{path.absolute()} must contain a tensor of shape (count, 4, 4, 4); it contains {found}")
    boards = boards.float()
    if not ((boards == 0) | (boards == 1)).all() or not (boards.sum(dim=-1) <= 1).all():
        raise DataError(f"{path.absolute()} must contain only 0 and 1, with at most one 1 per entry of the board")
    return boards
