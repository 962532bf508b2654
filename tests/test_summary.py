"""The table of the README is that of the numbers that are kept."""

from pathlib import Path

import pytest

pytest.importorskip("tabulate", reason="the benchmarks' own packages are not installed")

from benchmarks.__main__ import FAMILIES, README, TABLES
from benchmarks.harness import write_between_markers
from benchmarks.summary import Case, seconds, summary

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def test_the_readme_shows_the_numbers_that_are_kept():
    assert summary(RESULTS) in README.read_text(encoding="utf-8")


def test_every_family_has_its_place_in_the_tables(tmp_path):
    copy = tmp_path / "TABLES.md"
    copy.write_text(TABLES.read_text(encoding="utf-8"), encoding="utf-8")
    for family in (*FAMILIES, "gpu"):
        write_between_markers(copy, family, f"of {family}")
        assert f"of {family}" in copy.read_text(encoding="utf-8")


def test_seconds_are_those_of_the_row_that_has_both():
    rows = [
        {"what": "solve, ms", "numbers": {"ours": {"seconds": [1.0]}, "one": {"seconds": [2.0]}}},
        {"what": "solve, ms", "numbers": {"versions": {}, "seconds": {"ours": [3.0], "other": [4.0]}}},
    ]
    assert seconds(rows, Case("", "solve", "ours", "one")) == ([1.0], [2.0])
    assert seconds(rows, Case("", "solve", "ours", "other")) == ([3.0], [4.0])
    with pytest.raises(KeyError, match="'solve' has the seconds of 'ours' and 'third'"):
        seconds(rows, Case("", "solve", "ours", "third"))
