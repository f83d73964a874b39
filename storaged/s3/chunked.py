"""aws-chunked bodies, decoded as they arrive.

    SIZE-HEX[;chunk-signature=HEX64] CRLF data CRLF ... 0[;chunk-signature=HEX64] CRLF [name:value CRLF]... [x-amz-trailer-signature:HEX64 CRLF] CRLF

Unsigned data is passed on at once. A signed chunk is held back until its signature holds: it is bounded to 16 MiB, the size AWS's own clients stay far below.
Source: https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming.html and sigv4-streaming-trailers.html.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from storaged.errors import IncompleteBody, InvalidChunkSizeError, InvalidRequest, MalformedTrailerError, SignatureDoesNotMatch
from storaged.s3.sigv4 import ChunkKey, chunk_signature, same, trailer_signature
from storaged.units import KIB, MIB
from storaged.wire import Buffer

SIGNED_CHUNK_BYTES_MAX = 16 * MIB
LINE_BYTES_MAX = 1 * KIB
TRAILER_BYTES_MAX = 4 * KIB
CHUNK_SIZE_DIGITS_MAX = 11

_SIGNATURE = "chunk-signature="
_TRAILER_SIGNATURE = "x-amz-trailer-signature"


class ChunkedDecoder:
    """``feed`` pieces, get data back; ``finish`` when the body has ended; then ``trailers`` is complete.

    ``key`` None: chunks carry no signatures. ``trailing``: the names that x-amz-trailer announced, lower case; empty: no trailer may come.
    Raises IncompleteBody, SignatureDoesNotMatch, InvalidChunkSizeError, MalformedTrailerError, InvalidRequest.
    """

    def __init__(self, key: ChunkKey | None, trailing: tuple[str, ...]) -> None:
        self._key = key
        self._trailing = trailing
        self._previous = key.seed if key else ""
        self._state = "size"
        self._line = bytearray()
        self._left = 0
        self._signature = ""
        self._held: list[Buffer] = []
        self._hash = hashlib.sha256()
        self._trailer_bytes = 0
        self._canonical_trailer = b""
        self._trailer_verified = key is None or not trailing
        self.trailers: dict[str, str] = {}

    @property
    def signed(self) -> bool:
        return self._key is not None

    def feed(self, piece: Buffer) -> list[Buffer]:
        """Data that may be used now. Views of ``piece``, not copies."""
        view = memoryview(piece)
        position, end = 0, len(view)
        out: list[Buffer] = []
        while position < end:
            if self._state == "data":
                taken = min(self._left, end - position)
                self._data(view[position : position + taken], out)
                position += taken
            elif self._state == "done":
                if bytes(view[position:]).strip(b"\r\n"):
                    raise InvalidRequest("There is data behind the end of the chunked body.")
                position = end
            else:
                newline = bytes(view[position : position + LINE_BYTES_MAX + 1]).find(b"\n")
                if newline < 0:
                    self._line += view[position:]
                    position = end
                    self._bound_line()
                else:
                    self._line += view[position : position + newline + 1]
                    position += newline + 1
                    self._bound_line()
                    line, self._line = bytes(self._line), bytearray()
                    self._on_line(line, out)
        return out

    def finish(self) -> None:
        """The connection's body has ended: was this one complete?"""
        if self._state in ("size", "data", "data-end"):
            raise IncompleteBody("The chunked body ended before its last chunk.")
        missing = [name for name in self._trailing if name not in self.trailers]
        if missing:
            raise MalformedTrailerError(f"The trailing header {missing[0]} was announced but did not come.")
        if not self._trailer_verified:
            raise SignatureDoesNotMatch("The trailing headers carry no x-amz-trailer-signature.")

    def trailing_checksums(self) -> Mapping[str, str]:
        """Algorithm -> base64, of x-amz-checksum-* trailers."""
        prefix = "x-amz-checksum-"
        return {name[len(prefix) :].upper(): value for name, value in self.trailers.items() if name.startswith(prefix)}

    def _bound_line(self) -> None:
        if len(self._line) > LINE_BYTES_MAX:
            raise InvalidRequest("A line of the chunked body's framing is too long.")

    def _on_line(self, line: bytes, out: list[Buffer]) -> None:
        if self._state == "size":
            self._on_size(line, out)
        elif self._state == "data-end":
            if line not in (b"\r\n", b"\n"):
                raise InvalidRequest("A chunk is longer than its declared size.")
            self._state = "size"
        else:
            self._on_trailer(line)

    def _on_size(self, line: bytes, out: list[Buffer]) -> None:
        text = line.decode("latin-1").rstrip("\r\n")
        size_text, _, extension = text.partition(";")
        size_text = size_text.strip()
        if not size_text or len(size_text) > CHUNK_SIZE_DIGITS_MAX or not all(c in "0123456789abcdefABCDEF" for c in size_text):
            raise InvalidRequest("The size of a chunk is not a hexadecimal number.")
        size = int(size_text, 16)
        extension = extension.strip()
        self._signature = extension[len(_SIGNATURE) :] if extension.startswith(_SIGNATURE) else ""
        if self._key is not None:
            if not self._signature:
                raise SignatureDoesNotMatch("A chunk of the body carries no chunk-signature.")
            if size > SIGNED_CHUNK_BYTES_MAX:
                raise InvalidChunkSizeError(f"A signed chunk has at most {SIGNED_CHUNK_BYTES_MAX} bytes.")
        self._left = size
        if size:
            self._state = "data"
        else:
            self._release(out)
            self._state = "trailer"

    def _data(self, data: memoryview, out: list[Buffer]) -> None:
        self._left -= len(data)
        if self._key is None:
            out.append(data)
        else:
            self._hash.update(data)
            self._held.append(data)
        if not self._left:
            self._release(out)
            self._state = "data-end"

    def _release(self, out: list[Buffer]) -> None:
        if self._key is None:
            return
        computed = chunk_signature(self._key, self._previous, self._hash.hexdigest())
        if not same(computed, self._signature):
            raise SignatureDoesNotMatch("The signature of a chunk of the body does not match.")
        self._previous = computed
        out.extend(self._held)
        self._held = []
        self._hash = hashlib.sha256()

    def _on_trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line)
        if self._trailer_bytes > TRAILER_BYTES_MAX:
            raise MalformedTrailerError("The trailing headers are too long.")
        text = line.decode("latin-1").strip()
        if not text:
            # AWS's own example ends the last trailer with LF CRLF, others send CRLF CRLF: one blank line may come before the signature.
            if self._trailer_verified and len(self.trailers) >= len(self._trailing):
                self._state = "done"
            return
        name, colon, value = text.partition(":")
        name, value = name.strip().lower(), value.strip()
        if name == _TRAILER_SIGNATURE and self._key is not None:
            if not same(trailer_signature(self._key, self._previous, self._canonical_trailer), value):
                raise SignatureDoesNotMatch("The signature of the trailing headers does not match.")
            self._trailer_verified = True
            return
        if not colon or name not in self._trailing or name in self.trailers:
            raise MalformedTrailerError()
        self.trailers[name] = value
        self._canonical_trailer += f"{name}:{value}\n".encode("latin-1")
