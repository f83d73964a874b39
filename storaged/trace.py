"""Where a request's time goes: spans, taken where the work is done.

``with trace.span("seal"):`` notes when the block began and ended, for the request that the running task works for.
Nothing is noted unless the
process was started with spans on; else a block costs 0.2 to 0.3 us, of the hundreds that the smallest request takes.
Names are few, and the same in every plane:

queue     from the request's first byte to its handler: the event loop was busy with others
sign      the signature is checked
bucket    the bucket's record is looked up
receive   bytes of the body are waited for
digest    MD5, SHA-256 and checksums of a block
seal      encryption
code      parity and the fragments' hashes
send      a block's fragments go to their disks
prepare   a majority of the register's replicas promise
sync      fragments become durable
accept    a majority has the record on disk, and before it the small copy that travels along
create    both in one, for a key that is probably new
record    a register is read
fetch     cells of a window are read from disks
open      a window is authenticated and decrypted
reply     the answer is written; of a GET, until the client has taken all of it
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import NamedTuple

SPANS_MAX = 4096
"""Of one request; a larger one's later spans are counted and left out."""

on = False
"""Read it; change it with ``enable``."""


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


class _Nothing:
    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class _Open:
    __slots__ = ("_name", "_start_ns", "_trace")

    def __init__(self, trace: Trace, name: str) -> None:
        self._trace = trace
        self._name = name

    def __enter__(self) -> None:
        self._start_ns = time.perf_counter_ns()

    def __exit__(self, *error: object) -> None:
        self._trace.note(self._name, self._start_ns, time.perf_counter_ns())


_NOTHING = _Nothing()
_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def enable(yes: bool = True) -> None:
    """For the whole process, before it serves."""
    global on
    on = yes


def begin(heard_ns: int = 0) -> Trace | None:
    """A new request of the running task, whose first byte came at ``heard_ns`` (0: now). None when spans are off."""
    if not on:
        return None
    now_ns = time.perf_counter_ns()
    trace = Trace(heard_ns or now_ns)
    if heard_ns:
        trace.note("queue", heard_ns, now_ns)
    _current.set(trace)
    return trace


def current() -> Trace | None:
    """The running task's request; for work that goes on in a thread, which has no task."""
    return _current.get() if on else None


def span(name: str) -> _Nothing | _Open:
    """A block of the running task."""
    return span_of(_current.get(), name) if on else _NOTHING


def span_of(trace: Trace | None, name: str) -> _Nothing | _Open:
    """A block of work done for ``trace``, wherever it runs; None: nothing is noted."""
    return _NOTHING if trace is None else _Open(trace, name)
