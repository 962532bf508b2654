"""Loaders of public data formats, from a folder or a hub."""

from implicitly.data.images import DataError, ImageData, ImageSet, cifar10, digits, load_images, mnist
from implicitly.data.sudoku import SudokuBoards, make_sudoku4, solutions4, sudoku4

__all__ = [
    "DataError",
    "ImageData",
    "ImageSet",
    "SudokuBoards",
    "cifar10",
    "digits",
    "load_images",
    "make_sudoku4",
    "mnist",
    "solutions4",
    "sudoku4",
]
