"""What one S3 port may cost, whatever clients do."""

from __future__ import annotations

from dataclasses import dataclass

from storaged.units import KIB, MIB


@dataclass(frozen=True)
class Limits:
    """Bounds of one S3 port. A request beyond a bound is refused with the S3 error that its description names.

    One attribute for each bound, so there are more than 20."""

    requests_max: int = 1024
    """Authenticated requests in flight at once, of all connections together: SlowDown."""
    connections_max: int = 8192
    """Open connections. For a further one the oldest that has not authenticated is closed; if there is none, the new
    one is closed, without an answer."""
    header_line_bytes_max: int = 16 * KIB
    """The request line, or one header: RequestHeaderSectionTooLarge. (1,024 key bytes percent-encoded three times are
    9 KiB.)"""
    headers_max: int = 128
    header_section_bytes_max: int = 32 * KIB
    xml_bytes_max: int = 4 * MIB
    """Any request document; each operation has its own bound below it (``routes``): MaxMessageLengthExceeded."""
    handshake_s: float = 20.0
    """A TLS handshake that takes longer ends its connection."""
    headers_s: float = 75.0
    """A connection is closed when it has been idle, or a head has been incomplete, for longer."""
    body_idle_s: float = 30.0
    """Waiting for a byte of the body: RequestTimeout."""
    send_idle_s: float = 60.0
    """A client that takes no byte of an answer for longer is disconnected."""
    rate_min_bytes_s: int = 1 * KIB
    """Waiting for a body beyond ``body_idle_s`` in all must be earned at this rate: RequestTimeout. So must waiting for
    the client to take a piece of an answer, beyond ``send_idle_s``."""
    drain_bytes_max: int = 1 * MIB
    """Unread rest of a body that is read and dropped after an error, so that the connection can be kept."""
    linger_s: float = 10.0
    """How long the rest of a longer body is read and dropped after the answer, so that the client reads the answer and
    not a reset."""
    linger_bytes_max: int = 256 * MIB
    read_buffer_bytes: int = 64 * KIB
    """Unread bytes of one connection before back-pressure reaches its socket. The last read may add up to 64 KiB."""
    whole_bytes_max: int = 32 * MIB
    """Memory of all bodies together that are longer than ``read_buffer_bytes`` and kept whole, for callbacks. Those
    beyond are read by tasks, into memory of the pools."""
    unauthenticated_connections_max: int = 2048
    """Per address: connections that have not authenticated. Beyond, the oldest is closed (``unauthenticated``)."""
    unauthenticated_requests_max: int = 256
    """Per address: of those, being served at once. Beyond, the oldest is closed."""
    unauthenticated_bytes_max: int = 64 * MIB
    """Per address: bytes of those that are kept unread, or of forms whose policy has not arrived. Beyond, the oldest is
    closed."""
    unauthenticated_chunks: int = 256
    """HTTP chunks, however small, of a request that is not authenticated. Beyond, chunks must have
    ``unauthenticated_chunk_bytes_min`` on average: BadRequest."""
    unauthenticated_chunk_bytes_min: int = 64
    deletes_in_flight_max: int = 32
    """Deletions of one DeleteObjects that run at once."""
