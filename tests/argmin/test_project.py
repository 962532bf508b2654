"""Projections: what each must keep (the table), known answers, kinks, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, func

import implicitly as im
from implicitly.argmin.transport import Sinkhorn
from tests.argmin import projections as rows
from tests.argmin.projections import DERIVED, PROJECTIONS, PROXIMAL, Row

project = im.project
EVERY = (*PROJECTIONS, *PROXIMAL, *DERIVED)
D = torch.float64


@pytest.mark.parametrize("row", PROJECTIONS, ids=repr)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 0.3, 1.0, 10.0, 1e4]))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_it_is_the_nearest_point_of_the_set(row: Row, seed: int, scale: float):
    rows.check_projection(row, seed, scale)


@pytest.mark.parametrize("row", PROJECTIONS, ids=repr)
def test_it_is_the_nearest_point_in_single_precision(row: Row):
    for seed in range(3):
        rows.check_projection(row, seed, 3.0, torch.float32)


@pytest.mark.parametrize("row", EVERY, ids=repr)
@pytest.mark.parametrize("seed", [0, 1])
def test_derivatives_agree_with_differences(row: Row, seed: int):
    rows.check_by_differences(row, seed)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_third_derivatives_agree_with_differences(row: Row):
    rows.check_third_order(row, 3)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_transforms(row: Row):
    rows.check_transforms(row, 5)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_leading_dimensions(row: Row):
    rows.check_shapes(row)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_dtype(row: Row):
    rows.check_dtype(row)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_shared_parameters_sum_their_gradients(row: Row):
    rows.check_shared_parameters(row)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_a_bad_row_harms_no_other(row: Row):
    rows.check_bad_rows(row)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_integers_are_refused(row: Row):
    z, parameters = row.draw((2,))
    with pytest.raises(TypeError, match="floating"):
        row.f(z.long(), *parameters)
    with pytest.raises(TypeError, match="floating"):
        row.f(z.tolist(), *parameters)
