"""What one front may cost, whatever clients do."""

from __future__ import annotations

from dataclasses import dataclass

from storaged.units import KIB, MIB


@dataclass(frozen=True)
class Limits:
    """Bounds of the S3 front; what exceeds them is refused with the S3 error named beside it."""

    requests_max: int = 1024
    """Authenticated and in flight at once, all connections together: SlowDown."""
    connections_max: int = 8192
    """Open at once. For a further one the oldest that has not authenticated is closed; when there is none, the new one,
    without an answer.
    """
    header_line_bytes_max: int = 16 * KIB
    """Request line, or one header: RequestHeaderSectionTooLarge. (1,024 key bytes percent-encoded thrice are 9 KiB.)"""
    headers_max: int = 128
    header_section_bytes_max: int = 32 * KIB
    xml_bytes_max: int = 4 * MIB
    """Of any document; each operation has its own bound below it (``routes``): MaxMessageLengthExceeded."""
    handshake_s: float = 20.0
    """A TLS handshake that takes longer ends its connection."""
    headers_s: float = 75.0
    """An idle connection, or one that has not finished its request's headers, is closed after this long."""
    body_idle_s: float = 30.0
    """Without a byte of the body: RequestTimeout."""
    send_idle_s: float = 60.0
    """A client that takes nothing for so long is disconnected."""
    rate_min_bytes_s: int = 1 * KIB
    """Time spent waiting for a client's bytes beyond ``body_idle_s`` must be earned at this rate: RequestTimeout. So
    must time spent waiting for it to
    take a piece of an answer, beyond ``send_idle_s``."""
    drain_bytes_max: int = 1 * MIB
    """Of an unread body, so that a connection can be kept after an error."""
    linger_s: float = 10.0
    """How long the unread rest of a longer body is thrown away after the answer, so that the client reads the answer
    and not a reset.
    """
    linger_bytes_max: int = 256 * MIB
    read_buffer_bytes: int = 64 * KIB
    """Of one connection, unread, before back-pressure reaches its socket; what the last read brought (up to 64 KiB)
    comes on top.
    """
    stranger_connections_max: int = 2048
    """Of one address, and not authenticated yet: beyond, the oldest is closed. See ``strangers``."""
    stranger_requests_max: int = 256
    """Of those, being served at once: likewise."""
    stranger_bytes_max: int = 64 * MIB
    """Of those, kept unread, or of a form whose policy was not reached: likewise."""
    stranger_chunks: int = 256
    """Chunks (of HTTP's transfer coding) of a request that is not authenticated, however small they are; beyond, on
    average: BadRequest.
    """
    stranger_chunk_bytes_min: int = 64
    deletes_in_flight_max: int = 32
    """Of one DeleteObjects."""
