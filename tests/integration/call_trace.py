"""A trace of the running program: which part of it calls which function of another, or of its own.

A part is a plane, or a piece of one (``PARTS``). A call counts with the part of the function that made it, which is the
nearest function on the stack that belongs to a part. Where a task or a callback of the event loop begins there is none;
then the call counts with ``LOOP``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

LOOP = "Loop"

PARTS: Mapping[str, str] = {
    "storaged.s3": "Front",
    "storaged.objects": "Objects",
    "storaged.objects.lender_registers": "Ring",
    "storaged.keys": "Keys",
    "tests.doubles.keys": "Keys",
    "storaged.maintain": "Repair",
    "storaged.maintain.mover": "Gateway",
    "storaged.maintain.moves": "Gateway",
    "storaged.fragments": "Fragments",
    "tests.doubles.fragments": "Fragments",
    "storaged.meta": "Ring",
    "storaged.meta.acceptor": "Replica",
    "storaged.meta.storage": "Replica",
}
"""By the longest prefix of a module's name."""


class Arrow(NamedTuple):
    """One call."""

    caller: str
    callee: str
    function: str


def part_of(module: str) -> str:
    """Empty: of no part."""
    while module:
        if module in PARTS:
            return PARTS[module]
        module = module.rpartition(".")[0]
    return ""


class CallTrace:
    """``with CallTrace() as trace:`` records the calls of this thread, in order."""

    def __init__(self) -> None:
        self.arrows: list[Arrow] = []
        self._parts: dict[str, str] = {}

    def __enter__(self) -> CallTrace:
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _part(self, frame: FrameType) -> str:
        module = frame.f_globals.get("__name__", "")
        found = self._parts.get(module)
        if found is None:
            found = self._parts[module] = part_of(module)
        return found

    def _on_event(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event != "call" or not (callee := self._part(frame)):
            return
        code = frame.f_code
        if code.co_code[frame.f_lasti + 1]:
            return  # a coroutine or generator that goes on
        outer = frame.f_back
        while outer is not None and not self._part(outer):
            outer = outer.f_back
        caller = self._part(outer) if outer is not None else LOOP
        self.arrows.append(Arrow(caller, callee, code.co_name))
