"""Counts what an input costs: lines of this product's code that run, and bytes that are allocated at once.

Counts do not depend on the machine, as times would. A call of C code (a regular expression, a JSON parser) counts as
one step; for these the engines have a time limit, far above any honest input.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import storaged

ROOT = str(Path(storaged.__file__).parent)


class Cost(NamedTuple):
    """``steps``: lines of the product that ran. ``peak_bytes``: the most that was allocated at once meanwhile."""

    steps: int
    peak_bytes: int


def steps_of(run: Callable[[], object]) -> int:
    """Runs the call, and counts the lines of the product that it runs."""
    steps = 0

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += event == "line"
        return local

    def outer(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(ROOT) else None

    before = sys.gettrace()
    sys.settrace(outer)
    try:
        run()
    finally:
        sys.settrace(before)
    return steps


def peak_of(run: Callable[[], object]) -> int:
    """Runs the call, and measures the most bytes that it had allocated at once."""
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start(1)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        run()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()


def cost_of(run: Callable[[], object]) -> Cost:
    """The cost of the second and third run: the first one fills caches."""
    run()
    return Cost(steps_of(run), peak_of(run))


def branches_of(run: Callable[[], object]) -> set[tuple[str, int, int]]:
    """The pairs of lines of the product that ran one after the other, in one function."""
    found: set[tuple[str, int, int]] = set()

    def traced(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        last, name = 0, frame.f_code.co_filename

        def local(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                found.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return local

        return local

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        run()
    finally:
        sys.settrace(before)
    return found
