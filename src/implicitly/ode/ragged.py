"""Series of different lengths in one batch: a shorter one repeats its last time.

Solvers only accept times that strictly increase or decrease. So in a series that is shorter than others, extra
times within its longest gap replace the repeated ones, and the requested outputs are selected afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor


def told_apart(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """As many times without repetition as `rows` `(B, T)`, in which some samples repeat their last time.

    Also returns `(B, T)`, for each of `rows` its index among the new times; None if `rows` are not such times.
    Derivatives go to the first of equal times. A row with a single time stays as it is: there is nothing to solve,
    and all of its outputs are the start. Raises ValueError if the dtype has no times inside the gaps of a row.
    """
    seen = rows.detach()
    gaps = seen.diff()
    moves = gaps != 0
    length = 1 + moves.sum(1, keepdim=True)  # of each series
    column = torch.arange(seen.shape[1], device=seen.device)
    at_first = (moves == (column[1:] < length)).all(1)  # whether all that repeats is at the end
    one_way = (gaps >= 0).all(1) | (gaps <= 0).all(1)
    if not bool((at_first & one_way).all()):
        return None
    alone = length == 1
    spare = seen.shape[1] - length
    begin = gaps.abs().argmax(1, keepdim=True)  # of the longest gap
    behind = column > begin + spare
    source = torch.where(behind, column - spare, torch.minimum(column, begin))
    part = torch.where(behind, 0.0, (column - begin).clamp(min=0) / (spare + 1).to(seen.dtype))
    between = seen.gather(1, source) + part * gaps.gather(1, begin)
    if bool((same := (between.diff() == 0) & ~alone).any()):
        i = int(same.any(1).nonzero()[0])
        raise ValueError(
            f"t[{i}] repeats its last time {int(spare[i])} times, but its other times are so close together that "
            f"{seen.dtype} has no numbers between them; measure times from the start, or pass y0, t and the "
            "arguments in float64"
        )
    times = torch.where((part == 0) | alone, rows.gather(1, source), between)
    places = torch.where(column > begin, column + spare, column).clamp(max=seen.shape[1] - 1)
    return times, torch.where(alone, 0, places)
