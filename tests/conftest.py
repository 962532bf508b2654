"""Settings that every test shares."""

import gc

import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=15, database=None)
settings.load_profile("suite")


def pytest_configure(config):
    # torch.func's forward mode compiles its own decompositions by torch.jit.script on first use.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    # The tensors are small, and workers of pytest-xdist share the cores.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def only_what_the_test_makes():
    """Everything older is none of the collector's business, which makes it quick, and the counts exact."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
