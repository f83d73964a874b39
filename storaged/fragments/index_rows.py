"""What the index of one disk stores besides the entries of fragments, and the values that cross its border."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from storaged.fragments.entry import Entry
from storaged.wire import Message


class Position(NamedTuple):
    """A place in the log. Before it lie all bytes of earlier segments, and of this one those before ``offset``."""

    segment: int
    offset: int


class RetireRow(Message, frozen=True):
    """An entry of the garbage list, and the record in the log that carries it."""

    owner: bytes
    due_ms: int
    segment: int
    record_bytes: int
    sequence: int
    shadows: tuple[int, ...] = ()
    origin: bytes = b""


class SegmentRow(Message, frozen=True):
    """``end``: bytes of log. ``live``: bytes of records that count. ``punched``: bytes given back as holes. ``pins``:
    (segment, bytes of notes here that are needed while it exists).
    """

    end: int
    live: int
    punched: int
    pins: tuple[tuple[int, int], ...] = ()


class CheckpointRow(Message, frozen=True):
    """The log is covered up to ``offset`` of ``segment``."""

    version: int
    disk_id: str
    segment: int
    offset: int
    sequence: int
    fragments: int


class Overlay:
    """Changes since the last checkpoint; None means deleted. ``copies``: data id -> key of the whole copy of block
    0.
    """

    __slots__ = ("copies", "fragments", "retired")

    def __init__(self) -> None:
        self.fragments: dict[bytes, Entry | None] = {}
        self.retired: dict[bytes, RetireRow | None] = {}
        self.copies: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self.fragments) + len(self.retired)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that one commit writes.

    ``segments``: number -> encoded SegmentRow, empty when the segment is gone. ``damaged``: key -> damaged cells, empty
    when the fragment was replaced. ``dead``: segments that nothing refers to once the commit is durable.
    """

    overlay: Overlay
    row: CheckpointRow
    segments: dict[int, bytes]
    damaged: dict[bytes, frozenset[int]]
    dead: tuple[int, ...]
