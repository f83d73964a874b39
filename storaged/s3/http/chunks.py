"""Chunked bodies, decoded as their bytes arrive: HTTP/1.1's transfer coding, and what it has in common with S3's
aws-chunked (``auth.aws_chunked``). Pure.

    SIZE-HEX [extension] CRLF data CRLF ... 0 [extension] CRLF [trailer CRLF]... CRLF

Theory of operation. A chunk may have one byte, and each chunk costs a microsecond or more. So 64 KiB of the smallest
chunks would block the event loop for tens of milliseconds. Therefore a decoder takes at most ``CHUNKS_A_TURN`` chunks
at a time and then sets ``stopped``; its caller yields to the loop, and calls ``feed`` again. A line is matched whole,
by one expression over bytes: nothing is decoded to text before it is valid, and what a lenient parser would repair is
refused.
"""

from __future__ import annotations

import re
from typing import ClassVar

from storaged.errors import BadRequest, S3Error
from storaged.units import KIB
from storaged.wire import Buffer

CHUNKS_A_TURN = 64
"""64 chunks take 0.1 ms. Chunks of ordinary size never reach this number in one read."""
LINE_BYTES_MAX = 1 * KIB
"""The line with a chunk's size and extensions, or one line of the trailer."""
TRAILER_BYTES_MAX = 8 * KIB

_CRLF = b"\r\n"
_NEWLINE = re.compile(rb"\n")
_LINE = re.compile(rb"[^\n]*\n")
_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n")


class ChunkReader:
    """Call ``feed`` with pieces until ``ended``; then ``rest`` has the bytes after the body."""

    __slots__ = ("_after_data", "_last", "_left", "_trailer_bytes", "chunks", "data_bytes", "ended", "rest", "stopped")

    size_line: ClassVar[re.Pattern[bytes]]
    """The whole line before a chunk's data; group 1 is the size."""
    error: ClassVar[type[S3Error]]

    def __init__(self) -> None:
        self._left = 0
        self._after_data = False
        self._last = False
        self._trailer_bytes = 0
        self.rest: Buffer = b""
        """Fed bytes that were not decoded: an incomplete line, what ``stopped`` left, or what follows the end."""
        self.chunks = 0
        self.data_bytes = 0
        self.stopped = False
        """``feed(b"")`` would decode more."""
        self.ended = False

    def feed(self, data: Buffer) -> list[Buffer]:
        """The data of at most ``CHUNKS_A_TURN`` more chunks, as views of what was fed. Raises ``error``, and the errors
        of the subclass."""
        view = memoryview(b"".join((self.rest, data)) if self.rest else data)
        position, end, last_chunk = 0, len(view), self.chunks + CHUNKS_A_TURN
        out: list[Buffer] = []
        self.stopped = False
        while position < end and not self.ended:
            if self._left:
                piece = view[position : position + self._left]
                position += len(piece)
                self._left -= len(piece)
                self.data_bytes += len(piece)
                self._after_data = not self._left
                out.append(piece)
                self._on_data(piece)
            elif self._after_data:
                if view[position : position + 2] == _CRLF:
                    position += 2
                    self._after_data = False
                elif end - position == 1 and view[position] == _CRLF[0]:
                    break
                else:
                    raise self.error("A chunk is longer than its size.")
            elif self._last:
                match = _LINE.match(view, position, position + LINE_BYTES_MAX)
                if match is None:
                    self._check_incomplete(view, position)
                    break
                self._check_trailer_size(len(match[0]))
                self._on_trailer(match[0])
                position = match.end()
            elif self.chunks >= last_chunk:
                self.stopped = True
                break
            else:
                match = self.size_line.match(view, position, position + LINE_BYTES_MAX)
                if match is None:
                    self._check_incomplete(view, position)
                    break
                self.chunks += 1
                self._left = int(match[1], 16)
                self._last = not self._left
                self._on_size(self._left, match)
                position = match.end()
        self.rest = view[position:] if self.stopped else bytes(view[position:])
        return out

    def _check_incomplete(self, view: memoryview, position: int) -> None:
        """The bytes at ``position`` are no valid line. Raises ``error`` if they can't become one."""
        if _NEWLINE.search(view, position, position + LINE_BYTES_MAX):
            raise self.error("The size of a chunk is not a hexadecimal number in a line of its own.")
        if len(view) - position >= LINE_BYTES_MAX:
            raise self.error("A line of the chunked body's framing is too long.")

    def _check_trailer_size(self, size: int) -> None:
        self._trailer_bytes += size
        if self._trailer_bytes > TRAILER_BYTES_MAX:
            raise self.error("The trailer of the chunked body is too long.")

    def _on_size(self, size: int, match: re.Match[bytes]) -> None: ...

    def _on_data(self, data: memoryview) -> None: ...

    def _on_trailer(self, line: bytes) -> None:
        raise NotImplementedError


class TransferChunks(ChunkReader):
    """The chunked transfer coding (RFC 9112 7.1). Extensions and trailers are checked and dropped."""

    __slots__ = ()

    size_line = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
    error = BadRequest

    def _on_trailer(self, line: bytes) -> None:
        if line == _CRLF:
            self.ended = True
        elif not _TRAILER.fullmatch(line):
            raise BadRequest("The trailer of the chunked body is broken.")
