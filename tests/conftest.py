"""Settings that every test shares."""

import gc
import os
import warnings

import pytest
import torch
from hypothesis import settings

import implicitly as im
from implicitly import compiled

# Every process that makes code of graphs would first try, for seconds, which instructions the C++ compiler knows.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# After every graph that it makes, the compiler would look for garbage among all that it holds.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

LONGEST = ("test_tour_leaves", "test_code_is_generated_for_a_network", "test_a_second_process_finds")

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=15, database=None)
settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tensors of the tests live: cpu, or cuda")


def pytest_configure(config):
    if config.getoption("device") != "cpu":
        torch.set_default_device(config.getoption("device"))
    # torch.func's forward mode compiles its own decompositions by torch.jit.script on first use.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    # The tensors are small, and workers of pytest-xdist share the cores.
    torch.set_num_threads(1)
    # The compiler makes so many objects that looking for garbage as often as usual takes a tenth of the time.
    gc.set_threshold(100_000)


def pytest_collection_modifyitems(config, items):
    device = torch.device(config.getoption("device")).type
    for item in items:
        if device != "cpu" and "host" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="is of the host alone"))
    # The longest first, so that none is left to one worker at the end.
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


def pytest_collection_finish():
    freeze()


def freeze():
    """Hide all that there is from the garbage collector, for good: going through a million objects of imported
    modules takes longer than most tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def only_what_the_test_makes():
    """What is older is not looked through again, which makes counts exact."""
    freeze()


@pytest.fixture
def traced(monkeypatch):
    """Graphs of `compile=True` are traced but not generated; those that are kept."""
    from torch._dynamo.utils import counters  # the compiler takes as long to import as all of torch

    kept, made = type(compiled._graphs)(), torch.compile

    def trace(f, options, **how):
        return made(f, backend="eager", options={"guard_filter_fn": options["guard_filter_fn"]}, **how)

    monkeypatch.setattr(torch, "compile", trace)
    monkeypatch.setattr(compiled, "_graphs", kept)
    for name in ("_problems", "_counts", "_reasons"):
        monkeypatch.setattr(compiled, name, type(getattr(compiled, name))())
    torch._dynamo.reset()
    counters.clear()
    # A graph that cannot be had would make every comparison one of the eager loop with itself.
    with warnings.catch_warnings():
        warnings.simplefilter("error", im.CompileWarning)
        yield kept
    torch._dynamo.reset()
