"""A solve inside of a model that the user compiles: `torch.compile(model)`.

How many steps a solve takes depends on values, its derivative is an autograd function that solves again, and
its reports are warnings and errors with numbers in them: nothing that fits into one traced graph. Left to
itself the tracer tries, breaks some twenty times, compiles the pieces between, and records through loops that
are not meant to be recorded. So it is told to leave each solve alone, which costs one break: the model is
compiled before and after, and the solve runs as it does without a compiler. To compile also what is inside,
pass a compiled f (`nn.DEQ(torch.compile(cell))`), or `compile=True`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch._C._dynamo import eval_frame

P = ParamSpec("P")
R = TypeVar("R")

# Steps that are traced at most: a graph has all of them one behind the other, and takes as long to compile.
LONGEST = 100

REASON = "implicitly: a solve is one break; compile what is inside with compile=True or a compiled f"

_SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)  # pyright: ignore


def one_break_unless(traceable: Callable[..., bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes of a solve one that the tracer of `torch.compile` enters only for arguments that are `traceable`.

    Else it calls the solve, and what that calls in turn, from outside of the graph. This is
    `torch.compiler.disable`, except that the compiler, which takes as long to import as all of torch, is not
    imported for it: as long as nobody has, there is nothing to be disabled.
    """

    def decorate(solve: Callable[P, R]) -> Callable[P, R]:
        untraced: Any = None

        @functools.wraps(solve)
        def entry(*args: Any, **kwargs: Any) -> R:
            if torch.compiler.is_dynamo_compiling():
                if traceable(*args, **kwargs):
                    return solve(*args, **kwargs)
                torch._dynamo.graph_break(msg=REASON)  # the caller's: it then calls `entry` from outside
            nonlocal untraced
            if untraced is None:
                if "torch._dynamo" not in sys.modules:
                    return solve(*args, **kwargs)
                untraced = torch.compiler.disable(solve, reason=REASON)
            return untraced(*args, **kwargs)

        # Called from outside of a graph, `entry` does not start another one.
        eval_frame.set_code_exec_strategy(entry.__code__, _SKIP)  # pyright: ignore[reportAttributeAccessIssue]
        return cast(Callable[P, R], entry)

    return decorate


def _never(*args: Any, **kwargs: Any) -> bool:
    return False


one_break = one_break_unless(_never)
