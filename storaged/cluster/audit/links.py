"""The hashes of an audit log's entries and the links over them, which a node shows its witnesses instead of the
entries.

The newest are kept in memory. Older ones that a witness missed are read from the files, in a thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from storaged.cluster.audit.format import ENTRY_BYTES_MAX, first_link, next_link, parse_line

KEPT_MAX: Final = 16_384
"""Links kept in memory: 3 MiB, some hours of a busy gateway."""


class Link(NamedTuple):
    """One entry as a witness sees it."""

    sequence: int
    hash: bytes
    link: bytes
    time_ms: int


class RecentLinks:
    """The newest links of one chain, entry by entry."""

    def __init__(self, chain: str, kept_max: int = KEPT_MAX) -> None:
        self._kept: deque[Link] = deque(maxlen=kept_max)
        self._last = Link(-1, b"", first_link(chain), 0)

    def add(self, entry_hash: bytes, time_ms: int) -> None:
        self._last = Link(self._last.sequence + 1, entry_hash, next_link(self._last.link, entry_hash), time_ms)
        self._kept.append(self._last)

    @property
    def last(self) -> Link:
        return self._last

    def after(self, sequence: int) -> list[Link] | None:
        """All links after an entry; None when some of them are no longer kept."""
        if sequence >= self._last.sequence:
            return []
        first = self._kept[0].sequence
        if sequence + 1 < first:
            return None
        return [self._kept[index] for index in range(sequence + 1 - first, len(self._kept))]


def read_links(chain: str, files: Sequence[Path], *, after: int = -1, until: int | None = None) -> Iterator[Link]:
    """The links of the entries after ``after`` and up to ``until``, read from a chain's files (in their order).

    Ends where an entry is missing or invalid: what follows is not what was written. Raises OSError.
    """
    last = Link(-1, b"", first_link(chain), 0)
    for path in files:
        with path.open("rb") as file:
            while line := file.readline(ENTRY_BYTES_MAX + 1):
                try:
                    entry = parse_line(line.removesuffix(b"\n"))
                except ValueError:
                    break  # torn by a crash, which ends the file; the log continued in another one
                if (entry.chain, entry.sequence) != (chain, last.sequence + 1) or (
                    until is not None and entry.sequence > until
                ):
                    return
                entry_hash = bytes.fromhex(entry.hash)
                last = Link(entry.sequence, entry_hash, next_link(last.link, entry_hash), entry.time_ms)
                if last.sequence > after:
                    yield last


def first_line(files: Sequence[Path]) -> bytes:
    """The line of a chain's entry 0, without the line's end. Raises OSError; ValueError when the files do not begin
    with it.
    """
    with files[0].open("rb") as file:
        line = file.readline(ENTRY_BYTES_MAX + 1)
    if not line.endswith(b"\n") or parse_line(line[:-1]).sequence != 0:
        raise ValueError(f"{files[0]} does not begin with entry 0 of its chain")
    return line[:-1]
