"""The aws-chunked coding of bodies, decoded as they arrive. Pure.

    SIZE-HEX[;chunk-signature=HEX64] CRLF data CRLF ... 0[;chunk-signature=HEX64] CRLF [name:value CRLF]...
    [x-amz-trailer-signature:HEX64 CRLF] CRLF

Lines end in CRLF, and nothing follows the empty line that ends the body. There is one exception: in AWS's own example
of trailers one line ends in LF, or in LF CR LF, and clients follow it (minio-go, with and without signatures). Then an
empty line may come before the signature, or before the empty line that ends the body.

Data is passed on as it arrives, also that of a signed chunk: the signature is checked at the end of the chunk, and the
object plane commits nothing before the body has ended well. So a signed chunk takes no memory, however large it is.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming.html and sigv4-streaming-trailers.html.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from storaged.errors import (
    IncompleteBody,
    InvalidChunkSizeError,
    InvalidRequest,
    MalformedTrailerError,
    SignatureDoesNotMatch,
)
from storaged.s3.auth.sigv4 import ChunkKey, chunk_signature, same, trailer_signature
from storaged.s3.http.chunks import ChunkReader
from storaged.units import GIB
from storaged.wire import Buffer

CHUNK_BYTES_MAX = 5 * GIB
"""The largest part: no body is longer."""

_TRAILER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([ -~\t]*)\r?\n")
"""The value with the white space around it. An expression that left that out would try each place where it may begin
with each where it may end: seconds, for a line of 1 KiB."""
_TRAILER_SIGNATURE = "x-amz-trailer-signature"


class ChunkedDecoder(ChunkReader):
    """Call ``feed`` with pieces to get data, and ``finish`` when the body has ended; then ``trailers`` is complete.

    ``key`` None: chunks have no signatures. ``trailing``: the lower-case names that x-amz-trailer announced; empty: no
    trailer may come. Raises IncompleteBody, SignatureDoesNotMatch, InvalidChunkSizeError, MalformedTrailerError,
    InvalidRequest.
    """

    __slots__ = (
        "_bare_lf",
        "_canonical_trailer",
        "_hash",
        "_key",
        "_may_end",
        "_previous",
        "_signature",
        "_trailer_verified",
        "_trailing",
        "trailers",
    )

    size_line = re.compile(rb"([0-9A-Fa-f]{1,11})(?:;chunk-signature=([^\x00-\x20;\x7f-\xff]*))?\r\n")
    error = InvalidRequest

    def __init__(self, key: ChunkKey | None, trailing: tuple[str, ...]) -> None:
        super().__init__()
        self._key = key
        self._trailing = trailing
        self._previous = key.seed if key else ""
        self._signature = ""
        self._hash = hashlib.sha256()
        self._canonical_trailer = b""
        self._bare_lf = False
        """The last trailer ended in LF alone."""
        self._may_end = False
        """The same, in a body without signatures: the empty line that follows may be the last one or not."""
        self._trailer_verified = key is None or not trailing
        self.trailers: dict[str, str] = {}

    @property
    def signed(self) -> bool:
        return self._key is not None

    def feed(self, data: Buffer) -> list[Buffer]:
        out = super().feed(data)
        if self.ended and self.rest:
            raise InvalidRequest("There is data after the end of the chunked body.")
        return out

    def finish(self) -> None:
        """The connection's body has ended. Raises IncompleteBody if this one has not."""
        if not (self.ended or self._may_end):
            raise IncompleteBody("The chunked body ended before the empty line that ends it.")

    def trailing_checksums(self) -> Mapping[str, str]:
        """Algorithm -> base64 of the checksum, from x-amz-checksum-* trailers."""
        prefix = "x-amz-checksum-"
        return {name[len(prefix) :].upper(): value for name, value in self.trailers.items() if name.startswith(prefix)}

    def _on_size(self, size: int, match: re.Match[bytes]) -> None:
        if self._key is None:
            if match[2] is not None:
                raise InvalidRequest("A chunk of the body is signed, and x-amz-content-sha256 says that none is.")
            return
        if match[2] is None:
            raise SignatureDoesNotMatch("A chunk of the body carries no chunk-signature.")
        if size > CHUNK_BYTES_MAX:
            raise InvalidChunkSizeError()
        self._signature = match[2].decode("ascii")
        if not size:
            self._check_signature(self._key)

    def _on_data(self, data: memoryview) -> None:
        if self._key is not None:
            self._hash.update(data)
            if not self._left:
                self._check_signature(self._key)

    def _check_signature(self, key: ChunkKey) -> None:
        computed = chunk_signature(key, self._previous, self._hash.hexdigest())
        if not same(computed, self._signature):
            raise SignatureDoesNotMatch("The signature of a chunk of the body does not match.")
        self._previous = computed
        self._hash = hashlib.sha256()

    def _on_trailer(self, line: bytes) -> None:
        if line == b"\r\n":
            if self._bare_lf:
                self._bare_lf = False
                self._may_end = self._trailer_verified and len(self.trailers) == len(self._trailing)
            elif len(self.trailers) < len(self._trailing):
                missing = next(name for name in self._trailing if name not in self.trailers)
                raise MalformedTrailerError(f"The trailing header {missing} was announced but did not come.")
            elif not self._trailer_verified:
                raise SignatureDoesNotMatch("The trailing headers carry no x-amz-trailer-signature.")
            else:
                self.ended = True
            return
        match = _TRAILER.fullmatch(line)
        if match is None:
            raise MalformedTrailerError()
        name, value = match[1].decode("ascii").lower(), match[2].strip(b" \t").decode("ascii")
        if "\t" in value:
            raise MalformedTrailerError()
        bare_lf = not line.endswith(b"\r\n")
        if self._key is None or not self._trailing or self._trailer_verified or name != _TRAILER_SIGNATURE:
            self._on_named_trailer(name, value, bare_lf)
            return
        if bare_lf:
            raise MalformedTrailerError()
        if not same(trailer_signature(self._key, self._previous, self._canonical_trailer), value):
            raise SignatureDoesNotMatch("The signature of the trailing headers does not match.")
        self._trailer_verified, self._bare_lf = True, False

    def _on_named_trailer(self, name: str, value: str, bare_lf: bool) -> None:
        """Each announced trailer comes once, before the signature over all of them."""
        late = self._key is not None and self._trailer_verified
        if name not in self._trailing or name in self.trailers or late or self._may_end:
            raise MalformedTrailerError()
        self._bare_lf = bare_lf
        self.trailers[name] = value
        self._canonical_trailer += f"{name}:{value}\n".encode("ascii")
