"""Requests and replies of the methods ``fragment.*``. Every request names the disk. Fragment ids are packed (23
bytes).
"""

from __future__ import annotations

from storaged.fragments.ports import FragmentHeader, FragmentStat, Retirement, Usage
from storaged.wire import Message

MISSING_CELL = -1


class Done(Message, frozen=True):
    """The request was carried out. ``count``: for how many, where that has a meaning."""

    count: int = 0


class WriteRequest(Message, frozen=True):
    """``fragment.write``; the call's body is the payload. With ``sync`` the reply comes after the group's fdatasync.
    ``check``: see ``FragmentStore.write``.
    """

    disk: str
    header: FragmentHeader
    sync: bool = False
    check: bytes = b""


class IdsRequest(Message, frozen=True):
    """``fragment.sync``, ``fragment.stat``, ``fragment.headers``, ``fragment.verify`` (of one)."""

    disk: str
    ids: tuple[bytes, ...]


class DeleteRequest(Message, frozen=True):
    """``created_ms``: empty, or one for each id; then only fragments that are exactly as old are deleted."""

    disk: str
    ids: tuple[bytes, ...]
    created_ms: tuple[int, ...] = ()


class TouchRequest(Message, frozen=True):
    disk: str
    ids: tuple[bytes, ...]
    now_ms: int


class StatsReply(Message, frozen=True):
    stats: tuple[FragmentStat, ...]


class HeadersReply(Message, frozen=True):
    """``headers[i]``: of the i-th id; None for a fragment that is missing or damaged."""

    headers: tuple[FragmentHeader | None, ...]


class ReadRequest(Message, frozen=True):
    disk: str
    id: bytes
    first_cell: int
    count: int


class ReadReply(Message, frozen=True):
    """The reply's body has the cells, one after the other. ``lengths``: bytes of each, MISSING_CELL for a damaged
    one. ``unread``: see ``CellRead``; a node of 0.1.0 does not say so.
    """

    header: FragmentHeader
    lengths: tuple[int, ...]
    unread: bool = False


class ReadsRequest(Message, frozen=True):
    """``fragment.reads``: up to ``READS_MAX`` reads of disks of one node."""

    reads: tuple[ReadRequest, ...]


class ReadsReply(Message, frozen=True):
    """``found[i]``: of the i-th read; None: it has to be asked for alone, because it would wait for its disk, failed,
    or would make the answer too large. The reply's body has the cells of all, one after the other.
    """

    found: tuple[ReadReply | None, ...]


class RetireRequest(Message, frozen=True):
    """``more``: further entries. ``origin``: of the first."""

    disk: str
    data_id: bytes
    owner: bytes
    due_ms: int
    more: tuple[Retirement, ...] = ()
    origin: bytes = b""


class UnretireRequest(Message, frozen=True):
    disk: str
    data_id: bytes


class RetiredRequest(Message, frozen=True):
    disk: str
    now_ms: int
    limit: int


class RetiredReply(Message, frozen=True):
    entries: tuple[tuple[bytes, bytes], ...]


class ScanRequest(Message, frozen=True):
    """``fragment.scan``: one page of at most ``limit`` headers after ``after``."""

    disk: str
    after: bytes
    limit: int


class ScanReply(Message, frozen=True):
    headers: tuple[FragmentHeader, ...]


class UsageRequest(Message, frozen=True):
    disk: str


class UsageReply(Message, frozen=True):
    usage: Usage
