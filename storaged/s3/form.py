"""multipart/form-data as browsers send it, read as it arrives: the small fields first, then the file as a stream. Fields behind the file are ignored, as on AWS.

Source: RFC 7578; https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-HTTPPOSTForms.html (fields together at most 20 KB there; 64 KiB here).
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from storaged.errors import MalformedPOSTRequest, MaxMessageLengthExceeded
from storaged.units import KIB
from storaged.wire import Buffer

FIELDS_BYTES_MAX = 64 * KIB
BOUNDARY_CHARS_MAX = 70

_BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,70})"|([^;,\s]{1,70}))', re.IGNORECASE)
_NAME = re.compile(r';\s*name="([^"]*)"', re.IGNORECASE)
_FILENAME = re.compile(r';\s*filename="([^"]*)"', re.IGNORECASE)


def boundary_of(content_type: str) -> str:
    """Raises MalformedPOSTRequest."""
    match = _BOUNDARY.search(content_type)
    if match is None:
        raise MalformedPOSTRequest("The Content-Type of the form names no boundary.")
    return match[1] or match[2]


class FormReader:
    """``fields`` once ``read_fields`` has returned; then ``file`` yields the file's bytes. Names are lower case."""

    def __init__(self, pieces: AsyncIterator[Buffer], boundary: str) -> None:
        self._pieces = pieces
        self._delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
        self._buffer = bytearray(b"\r\n")  # the first boundary has no line before it
        self._taken = 0
        self.fields: dict[str, str] = {}
        self.filename = ""

    async def read_fields(self) -> None:
        """Up to the beginning of the file. Raises MalformedPOSTRequest, MaxMessageLengthExceeded."""
        await self._until(self._delimiter)
        while True:
            if (await self._exactly(2)) != b"\r\n":
                raise MalformedPOSTRequest("The form has no field named file.")
            disposition = await self._disposition()
            name = _NAME.search(disposition)
            if name is None:
                raise MalformedPOSTRequest()
            if name[1].lower() == "file":
                filename = _FILENAME.search(disposition)
                self.filename = re.split(r"[/\\]", filename[1])[-1] if filename else ""
                return
            value = await self._until(self._delimiter)
            self.fields.setdefault(name[1].lower(), value.decode("utf-8", "surrogateescape"))

    async def file(self) -> AsyncIterator[Buffer]:
        """Raises MalformedPOSTRequest when the body ends before the boundary that ends the file."""
        keep = len(self._delimiter) - 1
        while True:
            end = self._buffer.find(self._delimiter)
            if end >= 0:
                if end:
                    yield bytes(self._buffer[:end])
                self._buffer.clear()
                async for _ in self._pieces:  # what follows is nobody's, but has to be read
                    pass
                return
            ready = len(self._buffer) - keep
            if ready > 0:
                data = bytes(self._buffer[:ready])
                del self._buffer[:ready]
                yield data
            await self._more()

    async def _disposition(self) -> str:
        """Headers of a part: the one that counts."""
        found = ""
        while line := await self._until(b"\r\n"):
            text = line.decode("utf-8", "surrogateescape")
            if text.lower().startswith("content-disposition:"):
                found = text
        return found

    async def _until(self, mark: bytes) -> bytes:
        while (end := self._buffer.find(mark)) < 0:
            if self._taken + len(self._buffer) > FIELDS_BYTES_MAX + len(mark):
                raise MaxMessageLengthExceeded("Your POST request fields preceding the upload file were too large.")
            await self._more()
        data = bytes(self._buffer[:end])
        del self._buffer[: end + len(mark)]
        self._taken += end + len(mark)
        if self._taken > FIELDS_BYTES_MAX:
            raise MaxMessageLengthExceeded("Your POST request fields preceding the upload file were too large.")
        return data

    async def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            await self._more()
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    async def _more(self) -> None:
        async for piece in self._pieces:
            self._buffer += piece
            return
        raise MalformedPOSTRequest()
