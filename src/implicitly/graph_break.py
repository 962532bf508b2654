"""A solve inside a model that the user compiles with `torch.compile(model)`.

Where the number of steps is known in advance, forwards and backwards (at most `LONGEST` steps of a fixed point
with `rtol=0`, or of an explicit method with `dt` through times that are numbers), the steps become part of the
graph, and the model is compiled as a whole. A graph cannot warn or raise: whatever `on_failure` says, only
`status` tells which samples failed, and their NaN may reach gradients through steps that are recorded.

Otherwise the number of steps depends on values, the derivative is an autograd function that solves again, and the
reports are warnings and errors with numbers in them: none of this fits into one traced graph. Left to itself the
tracer tries anyway: it breaks the graph some twenty times, compiles the pieces in between, and records through
loops that are not meant to be recorded. So it is told to leave the solve alone, which costs one graph break: the
model is compiled before and after the solve, and the solve runs as it does without a compiler. To compile what is
inside as well, pass a compiled f (`nn.DEQ(torch.compile(cell))`), or `compile=True`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch._C._dynamo.eval_frame import (  # pyright: ignore[reportMissingModuleSource]
    get_eval_frame_callback,
)

from implicitly.transforms import out_of_inference_mode

P = ParamSpec("P")
R = TypeVar("R")

# The most steps that are traced: a graph holds all of them one after the other, and compiling takes as long.
LONGEST = 100

REASON = "implicitly: a solve is one break; compile what is inside with compile=True or a compiled f"

# Said where torch.export calls the model itself, with tensors that have no values.
NOT_EXPORTED = (
    "torch.export cannot export a solve whose number of steps depends on the values of tensors. A solve with a "
    "known number of steps, such as FixedPointIteration(rtol=0) with JacobianFreeAdjoint, or an explicit method "
    "with dt= and times that are numbers, can be exported with strict=True, under torch.no_grad()"
)

# Said where operations are recorded, or tensors are fake.
NOT_RECORDED = (
    "the number of steps of a solve depends on the values of tensors, which torch.func.linearize, make_fx, "
    "FakeTensorMode and the device 'meta' do not have. Use torch.func.jvp, which gives the same products, with "
    "torch.func.vmap for several at once; for graphs, compile=True or torch.compile"
)


def one_break_unless(traceable: Callable[..., bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a solve so that the tracer of `torch.compile` enters it only if its arguments are `traceable`.

    Otherwise the solve, and whatever it calls, runs outside of the graph. This is `torch.compiler.disable`, except
    that the compiler, which takes as long to import as all of torch, is not imported for it. Where nobody traces
    the caller, there is nothing to disable.
    """

    def decorate(solve: Callable[P, R]) -> Callable[P, R]:
        untraced: Any = None
        reason = f"{REASON} ({solve.__name__})"

        def entry(*args: Any, **kwargs: Any) -> R:
            if torch.compiler.is_dynamo_compiling():
                if traceable(*args, **kwargs):
                    return solve(*args, **kwargs)
                torch._dynamo.skip_frame(msg=reason)  # inside another frame this breaks that frame's graph
            if torch.compiler.is_exporting():
                raise RuntimeError(f"{solve.__qualname__}: {NOT_EXPORTED}")
            if get_eval_frame_callback() is None:  # nobody traces the caller
                return recordable(*args, **kwargs)
            nonlocal untraced
            untraced = untraced or torch.compiler.disable(recordable, reason=reason)
            return untraced(*args, **kwargs)

        def recordable(*args: Any, **kwargs: Any) -> R:
            try:
                if not torch.is_inference_mode_enabled():
                    return solve(*args, **kwargs)
                # In inference mode autograd records nothing, not even for solvers that differentiate f.
                with out_of_inference_mode((args, kwargs)) as (args, kwargs):
                    return solve(*args, **kwargs)
            except RuntimeError as error:
                if not _asked_for_a_number(error):
                    raise
                raise NotImplementedError(f"{solve.__qualname__}: {NOT_RECORDED}") from error

        # Each entry needs its own code object, where the compiler notes that a frame is to be skipped.
        entry.__code__ = entry.__code__.replace(co_name="entry_or_break")
        return cast(Callable[P, R], functools.update_wrapper(entry, solve))

    return decorate


def _asked_for_a_number(error: RuntimeError) -> bool:
    """Whether the solve read the value of a tensor that has none: a fake one, or one that a tracer records."""
    text = str(error)
    asked = "tracing tensor" in text or "called on meta tensors" in text
    return asked or type(error).__name__ == "DataDependentOutputException"


def _never(*args: Any, **kwargs: Any) -> bool:
    return False


one_break = one_break_unless(_never)
