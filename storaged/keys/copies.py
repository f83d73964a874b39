"""A gateway's own copies of bucket keys: an append-only log in its directory. Beside the ring it is the second home of
every key that the gateway made or used.

    header   4  magic "SKC1"
             16  keyring id
    entry    4  length of the copy, u32 big-endian
             8  xxh3-64 of the copy, big-endian
             .. the copy: message KeyCopy, wrapped under an epoch key as in the ring. No versions: forgotten

Theory of operation
    A copy costs one append and one fdatasync, whatever the number of copies. The last entry of a bucket counts. The log
    is rewritten (a new file beside it, then a rename) when more than half of it is out of date, or when a key was
    forgotten: then nothing of the forgotten key stays in the file. A start cuts off everything from the first entry
    that is not intact: that is the tail of a crash, or damage, and the ring has those keys too. ``cut_bytes`` has the
    length of the cut.

    One process of a gateway has the log open. The others ask it (``node.leader``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple, ParamSpec, TypeVar

import msgspec
import structlog
import xxhash

from storaged.durable import append_durably, replace_file, sync_path
from storaged.errors import KeyringMismatch, KeyringUnavailable
from storaged.keys.bucketkey import KeyCopy
from storaged.keys.material import KEYRING_ID_BYTES
from storaged.units import KIB
from storaged.wire import decode

FILE_NAME: Final = "bucketkeys"
RESTORED_NAME: Final = "bucketkeys.restored"
"""Copies from a backup. `storaged keys restore` puts the file there, and the gateway imports it."""

MAGIC: Final = b"SKC1"
HEADER_BYTES: Final = 4 + KEYRING_ID_BYTES
ENTRY_HEAD_BYTES: Final = 12
COPY_BYTES_MAX: Final = 64 * KIB
"""Some 500 versions of one key."""
SLACK_BYTES: Final = 64 * KIB
"""Bytes that may be out of date before the log is rewritten, however few keys there are."""

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger("keys")


def render_entry(copy: bytes) -> bytes:
    """One entry of the log, for an encoded KeyCopy."""
    assert len(copy) <= COPY_BYTES_MAX
    return len(copy).to_bytes(4, "big") + xxhash.xxh3_64_digest(copy) + copy


def render_log(keyring_id: bytes, copies: Iterable[bytes]) -> bytes:
    """A whole log."""
    return b"".join([MAGIC, keyring_id, *map(render_entry, copies)])


class ReadLog(NamedTuple):
    """``copies``: bucket id -> encoded KeyCopy, the last of each. ``whole_bytes``: the length of the intact part of the
    file.
    """

    copies: dict[bytes, bytes]
    whole_bytes: int


def read_log(content: bytes, keyring_id: bytes) -> ReadLog:
    """Raises KeyringMismatch for a log of another keyring, or a file that is no log."""
    if content[:4] != MAGIC or len(content) < HEADER_BYTES:
        raise KeyringMismatch("This is not a log of bucket keys.")
    if content[4:HEADER_BYTES] != keyring_id:
        raise KeyringMismatch(
            f"The log of bucket keys ({FILE_NAME} in the gateway's directory) is of keyring "
            f"{content[4:HEADER_BYTES].hex()}, not {keyring_id.hex()}."
        )
    copies: dict[bytes, bytes] = {}
    at = HEADER_BYTES
    while at + ENTRY_HEAD_BYTES <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        copy = content[at + ENTRY_HEAD_BYTES : at + ENTRY_HEAD_BYTES + size]
        check = content[at + 4 : at + ENTRY_HEAD_BYTES]
        if len(copy) < size or size > COPY_BYTES_MAX or xxhash.xxh3_64_digest(copy) != check:
            break
        try:
            read = decode(copy, KeyCopy)
        except msgspec.MsgspecError:
            break
        copies.pop(read.bucket_id, None)
        if read.versions:
            copies[read.bucket_id] = copy
        at += ENTRY_HEAD_BYTES + size
    return ReadLog(copies, at)


class CopyLog:
    """``ports.KeyCopies`` over the log, except ``report``, which the caller provides. Use: ``await open()``, at the end
    ``close()``.
    """

    def __init__(self, directory: Path, keyring_id: bytes) -> None:
        self.path = directory / FILE_NAME
        self._restored = directory / RESTORED_NAME
        self._keyring_id = keyring_id
        self._copies: dict[bytes, bytes] = {}
        self._descriptor = -1
        self._closed = False
        self._file_bytes = 0
        self._live_bytes = 0
        self._lock = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="key-copies")
        """One thread: the work of a cancelled caller ends before the next begins."""
        self.cut_bytes = 0
        """Bytes at the end of the log that were no intact entries at the start."""
        self.problem = ""
        """Why the log can't be written; empty when it can."""

    @property
    def count(self) -> int:
        return len(self._copies)

    def newer_than(self, time_ms: int) -> int:
        """How many buckets have a version that was made after this time (ms since 1970)."""
        kept = (decode(copy, KeyCopy).versions for copy in self._copies.values())
        return sum(any(entry.created_ms > time_ms for entry in versions) for versions in kept)

    async def open(self) -> None:
        """Raises KeyringMismatch for a log of another keyring, OSError."""
        async with self._lock:
            await self._in_thread(self._open)

    def _open(self) -> None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            content = b""
        if content and content[:4] != MAGIC:
            aside = self.path.with_name(f"{FILE_NAME}.damaged")
            log.error("the log of bucket keys is damaged, and begun anew", file=str(self.path), kept_as=str(aside))
            self.path.replace(aside)
            self.cut_bytes, content = len(content), b""
        if content:
            found = read_log(content, self._keyring_id)
            self._copies, self.cut_bytes = found.copies, len(content) - found.whole_bytes
        if self.cut_bytes:
            log.warning("the end of the log of bucket keys is cut off", file=str(self.path), bytes=self.cut_bytes)
        self._live_bytes = sum(ENTRY_HEAD_BYTES + len(copy) for copy in self._copies.values())
        if not content or self.cut_bytes or len(content) > HEADER_BYTES + 2 * self._live_bytes + SLACK_BYTES:
            try:
                self._rewrite(self._copies)
            except OSError as error:  # a full disk must not keep the gateway from serving the keys that it has
                self._note(error)
        else:
            self._reopen(len(content))

    def _reopen(self, size: int) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._file_bytes = size

    def _rewrite(self, copies: Mapping[bytes, bytes]) -> None:
        content = render_log(self._keyring_id, copies.values())
        replace_file(self.path, content)
        self._reopen(len(content))

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

    def close(self) -> None:
        self._closed = True
        self._thread.shutdown()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    async def get(self, bucket_id: bytes) -> bytes | None:
        return self._copies.get(bucket_id)

    async def every(self) -> dict[bytes, bytes]:
        return dict(self._copies)

    async def keep(self, bucket_id: bytes, copy: bytes) -> None:
        async with self._lock:
            if self._copies.get(bucket_id) == copy:
                return
            await self._change({**self._copies, bucket_id: copy} if self._is_stale(bucket_id, copy) else None, [copy])
            self._live_bytes += ENTRY_HEAD_BYTES + len(copy) - self._size_of(bucket_id)
            self._copies[bucket_id] = copy

    async def forget(self, bucket_ids: Iterable[bytes]) -> None:
        async with self._lock:
            gone = set(bucket_ids) & self._copies.keys()
            if not gone:
                return
            left = {bucket_id: copy for bucket_id, copy in self._copies.items() if bucket_id not in gone}
            await self._change(left, [])
            self._live_bytes -= sum(map(self._size_of, gone))
            self._copies = left

    async def restored(self) -> dict[bytes, bytes]:
        """Copies that `storaged keys restore` put beside the log. The caller judges and keeps them, then calls
        ``remove_restored``. Raises KeyringMismatch when they are of another keyring or damaged, OSError.
        """
        try:
            content = await self._in_thread(self._restored.read_bytes)
        except FileNotFoundError:
            return {}
        found = read_log(content, self._keyring_id)
        if found.whole_bytes != len(content):
            unread = len(content) - found.whole_bytes
            raise KeyringMismatch(f"{self._restored} is damaged: {unread} bytes at its end can't be read.")
        return found.copies

    async def remove_restored(self) -> None:
        """Removes the file of restored copies, when they are kept in the log."""
        await self._in_thread(self._unlink_restored)

    def _unlink_restored(self) -> None:
        self._restored.unlink(missing_ok=True)
        sync_path(self._restored.parent)

    def _size_of(self, bucket_id: bytes) -> int:
        known = self._copies.get(bucket_id)
        return 0 if known is None else ENTRY_HEAD_BYTES + len(known)

    def _is_stale(self, bucket_id: bytes, copy: bytes) -> bool:
        """Whether more than half of the log would be out of date with one more entry."""
        size = ENTRY_HEAD_BYTES + len(copy)
        live = self._live_bytes + size - self._size_of(bucket_id)
        return self._file_bytes + size > HEADER_BYTES + 2 * live + SLACK_BYTES

    async def _change(self, rewritten: Mapping[bytes, bytes] | None, added: Iterable[bytes]) -> None:
        """``rewritten``: the new content of the log; None: append ``added``. Raises KeyringUnavailable, and has changed
        nothing then.
        """
        if self._closed:
            raise KeyringUnavailable("The log of bucket keys is closed.")
        try:
            if self._descriptor < 0:
                await self._in_thread(self._rewrite, self._copies)
            if rewritten is None:
                await self._in_thread(self._append, b"".join(map(render_entry, added)))
            else:
                await self._in_thread(self._rewrite, rewritten)
        except OSError as error:
            self._note(error)
            raise KeyringUnavailable(f"{self.problem}.") from None
        self.problem = ""

    def _note(self, error: OSError) -> None:
        reason = error.strerror or str(error)
        self.problem = f"{self.path} cannot be written: {reason}"
        log.error("the log of bucket keys cannot be written", file=str(self.path), reason=reason)

    def _append(self, data: bytes) -> None:
        append_durably(self._descriptor, data, self._file_bytes)
        self._file_bytes += len(data)


def write_restored(directory: Path, keyring_id: bytes, copies: Iterable[bytes]) -> None:
    """For `storaged keys restore`: the gateway imports the copies when it starts or is reloaded. Raises OSError."""
    replace_file(directory / RESTORED_NAME, render_log(keyring_id, copies))
