"""Parses multipart/form-data as browsers send it: the small fields first, then the file as a stream. Fields after the
file are ignored, as on AWS.

What two parsers might read differently is refused: a field or a parameter that comes twice, a line that begins with the
boundary and goes on, a transfer encoding, a file without the delimiter that ends it, lines that end in LF.

Sources: RFC 7578; https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-HTTPPOSTForms.html (there fields have at most
20 KB together, here 64 KiB).
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from storaged.errors import MalformedPOSTRequest, MaxMessageLengthExceeded
from storaged.units import KIB
from storaged.wire import Buffer

FIELDS_BYTES_MAX = 64 * KIB

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_QUOTED = rb'"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*"'
_PARAMETER = re.compile(rb"[ \t]*;[ \t]*(%b)=(%b|%b)" % (_TOKEN, _TOKEN, _QUOTED))
_FORM_DATA = re.compile(rb"[ \t]*form-data", re.IGNORECASE)
_MULTIPART = re.compile(rb"multipart/form-data", re.IGNORECASE)
_BOUNDARY_PARAMETER = re.compile(rb"[ \t]*;[ \t]*(%b)=([0-9A-Za-z'()+_\-./:=?]+|%b)" % (_TOKEN, _QUOTED))
"""Without quotes, a boundary may have characters for which RFC 2045 wants quotes: some clients send such boundaries."""
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")
_HEADER = re.compile(rb"(%b):([^\x00-\x08\x0a-\x1f\x7f]*)" % _TOKEN)
_IDENTITY = frozenset({b"7bit", b"8bit", b"binary"})
"""Values of Content-Transfer-Encoding that change nothing. RFC 7578 4.7 deprecates the header."""


def boundary_of(content_type: str) -> str:
    """The boundary that a Content-Type names. Raises MalformedPOSTRequest."""
    if (
        content_type.isascii()
        and (found := _parameters(content_type.encode("ascii"), _MULTIPART, _BOUNDARY_PARAMETER)) is not None
    ):
        boundary = found.get(b"boundary", b"")
        if _BOUNDARY.fullmatch(boundary):
            return boundary.decode("ascii")
    raise MalformedPOSTRequest(
        "The Content-Type of the form is not multipart/form-data with one boundary of 1 to 70 characters."
    )


def _parameters(value: bytes, begins: re.Pattern[bytes], parameter: re.Pattern[bytes]) -> dict[bytes, bytes] | None:
    """The parameters of a header's value, by lower-case name. None when the value does not begin with ``begins``, has a
    parameter twice, or anything else."""
    match = begins.match(value)
    found: dict[bytes, bytes] = {}
    while match is not None and value[match.end() :].strip(b" \t"):
        match = parameter.match(value, match.end())
        if match is None or match[1].lower() in found:
            return None
        text = match[2]
        found[match[1].lower()] = _unquoted(text) if text.startswith(b'"') else text
    return found if match is not None else None


def _unquoted(text: bytes) -> bytes:
    """Only an escaped quote is unescaped. Before any other character a backslash is itself, as in the names of files
    that browsers on Windows once sent."""
    return text[1:-1].replace(b'\\"', b'"')


class FormReader:
    """``read_fields`` fills ``fields``; then ``file`` yields the file's bytes. Names are in lower case."""

    def __init__(self, pieces: AsyncIterator[Buffer], boundary: str) -> None:
        self._pieces = pieces
        self._delimiter = b"\r\n--" + boundary.encode("ascii")
        self._buffer = bytearray(b"\r\n")  # the first boundary has no line before it
        self._taken = 0
        self.fields: dict[str, str] = {}
        self.filename = ""

    async def read_fields(self) -> None:
        """Reads to the beginning of the file. Raises MalformedPOSTRequest, MaxMessageLengthExceeded."""
        await self._until(self._delimiter)
        while True:
            if not await self._goes_on():
                raise MalformedPOSTRequest("The form has no field named file.")
            disposition = await self._disposition()
            await self._check_content()
            name = disposition.get(b"name", b"").lower().decode("utf-8", "surrogateescape")
            if not name:
                raise MalformedPOSTRequest("A field of the form has no name.")
            if name == "file":
                filename = disposition.get(b"filename", b"").decode("utf-8", "surrogateescape")
                self.filename = re.split(r"[/\\]", filename)[-1]
                return
            value = await self._until(self._delimiter)
            if name in self.fields:
                raise MalformedPOSTRequest("A field of the form came more than once.")
            self.fields[name] = value.decode("utf-8", "surrogateescape")

    async def file(self) -> AsyncIterator[Buffer]:
        """Raises MalformedPOSTRequest when the body ends before the delimiter that ends the file."""
        keep = len(self._delimiter) - 1
        while True:
            end = self._buffer.find(self._delimiter)
            if end >= 0:
                if end:
                    yield bytes(self._buffer[:end])
                del self._buffer[: end + len(self._delimiter)]
                await self._goes_on()
                self._buffer.clear()
                async for _ in self._pieces:  # what follows is ignored, but must be read
                    pass
                return
            ready = len(self._buffer) - keep
            if ready > 0:
                data = bytes(self._buffer[:ready])
                del self._buffer[:ready]
                yield data
            await self._more()

    async def _goes_on(self) -> bool:
        """Whether another part follows a delimiter. Raises MalformedPOSTRequest when the line goes on: then the
        boundary may be the beginning of a field's value."""
        following = await self._exactly(2)
        if following == b"\r\n":
            return True
        while len(self._buffer) < 2 and await self._come():
            pass
        if following != b"--" or (self._buffer and not self._buffer.startswith(b"\r\n")):
            raise MalformedPOSTRequest("A line of the form begins with the boundary and has more text.")
        return False

    async def _check_content(self) -> None:
        """A part's content must not begin with the boundary: parsers disagree on whether the CRLF of the empty line
        before it makes that a delimiter."""
        line = self._delimiter[2:]
        while len(self._buffer) < len(line) and line.startswith(self._buffer):
            await self._more()
        if self._buffer.startswith(line):
            raise MalformedPOSTRequest("The content of a part of the form begins with the boundary.")

    async def _disposition(self) -> dict[bytes, bytes]:
        """Reads a part's headers. Returns the parameters of Content-Disposition."""
        found: dict[bytes, bytes] | None = None
        while line := await self._until(b"\r\n"):
            match = _HEADER.fullmatch(line)
            if match is None:
                raise MalformedPOSTRequest("A header of a part of the form is broken.")
            name = match[1].lower()
            if name == b"content-disposition":
                again, found = found, _parameters(match[2], _FORM_DATA, _PARAMETER)
                if again is not None or found is None:
                    raise MalformedPOSTRequest(
                        "A part of the form must have one Content-Disposition: form-data, with each parameter once."
                    )
            elif name == b"content-transfer-encoding" and match[2].strip(b" \t").lower() not in _IDENTITY:
                raise MalformedPOSTRequest("A part of the form must not have a Content-Transfer-Encoding.")
        return found or {}

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
        if not await self._come():
            raise MalformedPOSTRequest()

    async def _come(self) -> bool:
        """Reads one more piece. False at the end of the body."""
        async for piece in self._pieces:
            self._buffer += piece
            return True
        return False
