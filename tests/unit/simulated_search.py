"""A search that hands its batches over in pieces, for the simulated engines of the state machines' tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tuner_server.scheduler import messages as m

PIECE = 3


def next_piece(
    wanted: m.Generate, generated: Counter[int], space: Mapping[int, int]
) -> tuple[m.CandidatesReady, list[m.Instruction]]:
    """The next candidates of a batch, and what is to be answered later for the rest of it.

    Args:
        wanted: The batch, or the rest of it.
        generated: Candidates of each task so far; these are added.
        space: How many a task has in all; without an entry they never end.
    """
    task, first = wanted.task, generated[wanted.task]
    piece = min(wanted.count, PIECE, space.get(task, 10**9) - first)
    generated[task] += piece
    more = wanted.count > PIECE == piece
    rest: list[m.Instruction] = [m.Generate(task, wanted.batch, wanted.count - piece)] if more else []
    traces = tuple(f"t{task}c{first + n}" for n in range(piece))
    return m.CandidatesReady(task, wanted.batch, traces, more=more), rest
