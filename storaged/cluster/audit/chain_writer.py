"""Builds the lines of one chain and writes them to its files."""

from __future__ import annotations

import os
from pathlib import Path

from storaged.cluster.audit.files import file_name
from storaged.cluster.audit.format import GENESIS, Event, Head, make_line
from storaged.durable import sync_path
from storaged.ids import system_entropy
from storaged.units import MIB

FILE_BYTES_MAX = 64 * MIB
SALT_BYTES = 16


class ChainLines:
    """Where the next entry of a chain goes: its number, its predecessor's hash, its file. No I/O."""

    def __init__(self, directory: Path, chain: str, file_bytes_max: int) -> None:
        self.head = Head(chain, -1, GENESIS)
        """The last entry that was built."""
        self._directory = directory
        self._file_bytes_max = file_bytes_max
        self._ordinal = 0
        self._part = 0
        self._file_bytes = 0
        """Bytes of the current file, queued ones included."""
        self._new_file = True

    def begin(self, previous: str, ordinal: int) -> None:
        """Sets the hash that entry 0 follows, and the number of this chain among those of the node."""
        self.head = Head(self.head.chain, -1, previous)
        self._ordinal = ordinal

    def rewind(self, durable: Head) -> None:
        """Drops all entries after ``durable``; the next one goes into a new file."""
        self.head = durable
        self._new_file = True

    def build(self, event: Event, time_ms: int) -> tuple[bytes, str]:
        """The line of the next entry, and its hash. Raises ValueError or TypeError for fields that are too large or not
        JSON.
        """
        chain, sequence, previous = self.head
        return make_line(chain, sequence + 1, time_ms, event, previous, system_entropy(SALT_BYTES).hex())

    def needs_file(self, line: bytes) -> bool:
        """Whether the line must go into a new file."""
        return self._new_file or self._file_bytes + len(line) > self._file_bytes_max

    def begin_file(self) -> int:
        """Lets the next line begin a new file. Returns which file of the chain that is, from 1 on."""
        self._part += 1
        self._new_file = False
        self._file_bytes = 0
        return self._part

    def add(self, line: bytes, digest: str) -> Path | None:
        """Makes a built line the last entry. Returns the file that it begins, None when it continues one."""
        path = None if self._file_bytes else self._directory / file_name(self._ordinal, self.head.chain, self._part)
        self.head = Head(self.head.chain, self.head.sequence + 1, digest)
        self._file_bytes += len(line)
        return path


class ChainFile:
    """The file that is being written. Blocking; used by one thread at a time. All methods raise OSError."""

    def __init__(self) -> None:
        self.descriptor = -1
        self._durable_bytes = 0

    def begin(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.close()
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._durable_bytes = 0
        sync_path(path.parent)

    def append(self, lines: bytes) -> None:
        """Durable when it returns."""
        data = memoryview(lines)
        while data:
            data = data[os.write(self.descriptor, data) :]
        os.fdatasync(self.descriptor)
        self._durable_bytes += len(lines)

    def cut(self) -> None:
        """Cuts off what is not durable, and closes the file."""
        if self.descriptor < 0:
            return
        try:
            os.ftruncate(self.descriptor, self._durable_bytes)
            os.fsync(self.descriptor)
        finally:
            self.close()

    def close(self) -> None:
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)
