"""Records where a request's time goes, as spans around the work.

``with trace.span("seal"):`` records when the block began and ended, for the request of the running task. Spans are off
unless the process was started with them; then a block costs 0.2 to 0.3 us, of the hundreds that the smallest request
takes. There are few names, the same in every plane:

queue     from the request's first byte to its handler: the event loop was busy with other requests
sign      the signature is checked
bucket    the records of the user and of the bucket are looked up
receive   waiting for bytes of the body
digest    MD5, SHA-256 and checksums of a block
seal      encryption
code      parity and the fragments' hashes
send      a block's fragments are sent to their disks
prepare   a majority of the register's replicas promise
sync      fragments become durable
accept    a majority has the record on disk, and before it the small copy that comes with it
create    prepare and accept in one, for a key that is probably new
record    a register is read
fetch     cells of a window are read from disks
open      a window is authenticated and decrypted
reply     the answer is written; for a GET, until the client has received all of it
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import NamedTuple

SPANS_MAX = 4096
"""Spans of one request; further ones are counted and left out."""

on = False
"""Whether spans are on. Read it; change it with ``enable``."""


class Span(NamedTuple):
    """Times are those of ``time.perf_counter_ns``."""

    name: str
    start_ns: int
    end_ns: int


class Trace:
    """The spans of one request, in the order of their ends. Threads may add to it."""

    __slots__ = ("began_ns", "left_out", "spans")

    def __init__(self, began_ns: int) -> None:
        self.began_ns = began_ns
        self.spans: list[Span] = []
        self.left_out = 0

    def note(self, name: str, start_ns: int, end_ns: int) -> None:
        if len(self.spans) < SPANS_MAX:
            self.spans.append(Span(name, start_ns, end_ns))
        else:
            self.left_out += 1


class _NoSpan:
    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class _OpenSpan:
    __slots__ = ("_name", "_start_ns", "_trace")

    def __init__(self, trace: Trace, name: str) -> None:
        self._trace = trace
        self._name = name

    def __enter__(self) -> None:
        self._start_ns = time.perf_counter_ns()

    def __exit__(self, *error: object) -> None:
        self._trace.note(self._name, self._start_ns, time.perf_counter_ns())


_NO_SPAN = _NoSpan()
_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def enable(yes: bool = True) -> None:
    """Turns spans on for the whole process, before it serves."""
    global on
    on = yes


def start(received_ns: int = 0) -> Trace | None:
    """Starts the trace of a new request of the running task, whose first byte arrived at ``received_ns`` (0: now). None
    when spans are off.
    """
    if not on:
        return None
    now_ns = time.perf_counter_ns()
    trace = Trace(received_ns or now_ns)
    if received_ns:
        trace.note("queue", received_ns, now_ns)
    _current.set(trace)
    return trace


def current() -> Trace | None:
    """The trace of the running task; for work that continues in a thread, which has no task."""
    return _current.get() if on else None


def span(name: str) -> _NoSpan | _OpenSpan:
    """A span of the running task's trace, as a context manager."""
    return span_of(_current.get(), name) if on else _NO_SPAN


def span_of(trace: Trace | None, name: str) -> _NoSpan | _OpenSpan:
    """A span of ``trace``, in any task or thread; records nothing when ``trace`` is None."""
    return _NO_SPAN if trace is None else _OpenSpan(trace, name)
