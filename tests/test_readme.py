"""The examples of the README run as they are written, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import implicitly as im

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.host
def test_the_examples_run_and_can_be_differentiated():
    found: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(block, found)
    assert found["z"].shape == (32, 64)
    assert found["y"].shape == (50, 2)
    assert found["sol"].value.shape == (128, 20)
    assert found["sol"].status.eq(im.Status.CONVERGED).all()
    assert found["w"].shape == (32, 5)
    assert found["w"].sum(1).sub(1).abs().max() < 1e-5
    for value, by in (("y", "length"), ("w", "appetite")):
        (gradient,) = torch.autograd.grad((found[value] ** 2).sum(), found[by])
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
