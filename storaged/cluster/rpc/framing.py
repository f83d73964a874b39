"""Parses and packs the frames of the internode protocol: what packets carry. Pure: bytes in, frames out.

A frame is a fixed header, a head (a msgpack message) and a body (raw bytes)::

    0   2  magic "SR"
    2   1  protocol version: 3
    3   1  kind
    4   8  request id, chosen by the caller, never reused on a connection
    12  4  head length, <= 4 MiB
    16  4  body length, <= 64 MiB
    20  4  deadline: milliseconds that the caller still waits (requests; else 0)
    24 ..  head, then body

=========  =============================================  =======================================================
kind       head                                           who
=========  =============================================  =======================================================
1 HELLO    :class:`Hello`                                 the dialling side, first
2 WELCOME  :class:`Hello`                                 the answer when all is well
3 REFUSED  :class:`ErrorHead`                             the reply otherwise; then the connection is closed
4 REQUEST  name length (u8), method name, the request     the dialling side
5 REPLY    the answer                                     the listening side
6 ERROR    :class:`ErrorHead`                             the listening side
7 CANCEL   empty                                          the dialling side: the caller has abandoned this id
=========  =============================================  =======================================================

Theory of operation. :class:`FrameReader` serves a BufferedProtocol: it says where the next bytes go, and learns how
many arrived. It parses small frames in a scratch buffer that it uses again and again. The rest of a frame that does not
fit goes straight into memory of the announced size, so that a body of megabytes is never copied after it was decrypted.
Before that memory is allocated, ``admit`` sees the header and decides: TAKE the frame, SKIP it (its call is abandoned),
or WAIT (no room: the reader stops, and the caller pauses the transport and calls ``resume`` later).

A lone small PUT is six frames, and each passes here twice. So a header is plain integers, checked by one look-up of its
first four bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import Enum, IntEnum
from typing import Final

from storaged.units import KIB, MIB
from storaged.wire import Message, unfilled

PROTOCOL_VERSION: Final = 3
"""2: creates. 3: authority by a table of methods, by certificate for registers of the system table, and ballots that
name their caller. Nodes of different versions do not talk: one would rely on what the other refuses."""

MAGIC: Final = b"SR"
HEAD_BYTES_MAX: Final = 4 * MIB
BODY_BYTES_MAX: Final = 64 * MIB
HANDSHAKE_BYTES_MAX: Final = 4 * KIB
DEADLINE_MS_MAX: Final = 2**32 - 1
_HEADER = struct.Struct(">IQIII")
HEADER_BYTES: Final = _HEADER.size
assert HEADER_BYTES == 24

SCRATCH_BYTES: Final = 256 * KIB + HEADER_BYTES
"""The plaintext of the largest packet, behind the part of a header that came before it."""


class FrameError(Exception):
    """The peer broke the protocol; the connection must end."""


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    REQUEST = 4
    REPLY = 5
    ERROR = 6
    CANCEL = 7


_STARTS: Final = {int(kind): int.from_bytes(MAGIC + bytes((PROTOCOL_VERSION, kind)), "big") for kind in Kind}
"""The first four bytes of each kind's frames as one number: magic, version and kind."""

_KINDS: Final = {start: kind for kind, start in _STARTS.items()}


class Verdict(Enum):
    TAKE = 1
    SKIP = 2
    WAIT = 3


TAKE, SKIP, WAIT = Verdict
REQUEST, REPLY, ERROR, CANCEL = int(Kind.REQUEST), int(Kind.REPLY), int(Kind.ERROR), int(Kind.CANCEL)
"""Globals, because looking up a member through its enum's class costs twice as much, and every frame needs some."""


class Hello(Message, frozen=True):
    """Introduces the sender. ``incarnation``: 8 random bytes per process start. ``version``: the highest protocol
    version that it speaks.
    """

    cluster: str
    name: str
    incarnation: bytes
    version: int


class ErrorHead(Message, frozen=True):
    """An error on the wire: the class's code, its message and details, and the ``remote_code`` of a forwarded
    PeerRefused.
    """

    code: str
    message: str
    details: dict[str, str]
    remote_code: str = ""


Admit = Callable[[int, int, int, int], Verdict]
"""``admit(kind, request_id, head_bytes, body_bytes)``."""

Deliver = Callable[[int, int, int, memoryview, memoryview], None]
"""``deliver(kind, request_id, deadline_ms, head, body)``. ``head`` is valid only during the call; the receiver owns
``body``."""

_EMPTY = memoryview(b"")


def pack_header(kind: int, request_id: int, head_bytes: int, body_bytes: int = 0, deadline_ms: int = 0) -> bytes:
    """Packs a frame's header. Raises ValueError when head or body is too large; then no part of the frame may
    be sent.
    """
    if head_bytes > HEAD_BYTES_MAX or body_bytes > BODY_BYTES_MAX:
        raise ValueError(
            f"a frame has at most {HEAD_BYTES_MAX} bytes of message and {BODY_BYTES_MAX} of body; this has {head_bytes}"
            f" and {body_bytes}"
        )
    return _HEADER.pack(_STARTS[kind], request_id, head_bytes, body_bytes, deadline_ms)


def _header_error(data: bytes | bytearray) -> FrameError:
    """The error that says what is wrong with a header."""
    start, _request_id, head_bytes, body_bytes, _deadline_ms = _HEADER.unpack(data)
    magic, version, kind = data[:2], data[2], data[3]
    if magic != MAGIC:
        return FrameError(f"not a storaged frame: it begins with {magic.hex()}")
    if version != PROTOCOL_VERSION:
        return FrameError(f"the peer speaks protocol version {version}, this daemon {PROTOCOL_VERSION}")
    if start not in _KINDS:
        return FrameError(f"unknown kind of frame {kind}")
    return FrameError(
        f"a frame of {head_bytes} + {body_bytes} bytes is over the limit of {HEAD_BYTES_MAX} + {BODY_BYTES_MAX}"
    )


class FrameReader:
    """Parses the frames of one connection; see the module's theory of operation. Not thread-safe."""

    __slots__ = (
        "_admit",
        "_body",
        "_detached",
        "_end",
        "_filled",
        "_head",
        "_scratch",
        "_skip_bytes",
        "_start",
        "_view",
        "deliver",
        "waiting",
    )

    def __init__(self, admit: Admit, deliver: Deliver, scratch_bytes: int = SCRATCH_BYTES) -> None:
        assert scratch_bytes >= 2 * HEADER_BYTES
        self._admit = admit
        self.deliver = deliver
        """Read again for each frame, so it may be replaced between frames."""
        self._scratch = bytearray(scratch_bytes)
        self._view = memoryview(self._scratch)
        self._start = 0
        self._end = 0
        self._detached: tuple[int, int, int] | None = None
        """Kind, id and deadline of the frame that is read into memory of its own."""
        self._head = _EMPTY
        self._body = _EMPTY
        self._filled = 0
        self._skip_bytes = 0
        self.waiting = False
        """``admit`` returned WAIT; parsing stops until :meth:`resume`."""

    @property
    def mid_frame(self) -> bool:
        """Whether part of a frame has arrived and the rest has not."""
        return not self.waiting and (self._detached is not None or self._skip_bytes > 0 or self._end > self._start)

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._detached is not None:
            if self._filled < len(self._head):
                return self._head[self._filled :]
            return self._body[self._filled - len(self._head) :]
        if len(self._scratch) - self._end < HEADER_BYTES:
            left = self._end - self._start
            self._scratch[:left] = self._scratch[self._start : self._end]
            self._start, self._end = 0, left
            if left == len(self._scratch):
                raise FrameError("bytes arrived although reading is paused")
        return self._view[self._end :]

    def received(self, count: int) -> None:
        """Takes ``count`` bytes that were put into the last :meth:`buffer`.

        Calls ``admit`` for each complete header and ``deliver`` for each complete frame. Raises FrameError.
        """
        detached = self._detached
        if detached is None:
            self._end += count
            self._parse()
            return
        self._filled += count
        if self._filled == len(self._head) + len(self._body):
            head, body = self._head, self._body
            self._detached, self._head, self._body = None, _EMPTY, _EMPTY
            self.deliver(*detached, head, body)

    def resume(self) -> None:
        """After WAIT: calls ``admit`` again and continues with the bytes that had arrived."""
        self.waiting = False
        if self._detached is None:
            self._parse()

    def _parse(self) -> None:
        admit, scratch, view = self._admit, self._scratch, self._view
        start, end = self._start, self._end
        if self._skip_bytes:
            start = self._skip(start, self._skip_bytes)
        while not self.waiting and (head_start := start + HEADER_BYTES) <= end:
            first, request_id, head_bytes, body_bytes, deadline_ms = _HEADER.unpack_from(scratch, start)
            kind = _KINDS.get(first)
            if kind is None or head_bytes > HEAD_BYTES_MAX or body_bytes > BODY_BYTES_MAX:
                raise _header_error(scratch[start:head_start])
            verdict = admit(kind, request_id, head_bytes, body_bytes)
            body_start = head_start + head_bytes
            body_end = body_start + body_bytes
            if verdict is TAKE and body_end <= end:
                start = self._start = body_end
                body = memoryview(bytes(view[body_start:body_end])) if body_bytes else _EMPTY
                self.deliver(kind, request_id, deadline_ms, view[head_start:body_start], body)
            elif verdict is WAIT:
                self.waiting = True
            elif verdict is SKIP:
                start = self._skip(head_start, head_bytes + body_bytes)
            else:
                self._start = head_start
                self._read_detached(kind, request_id, deadline_ms, head_bytes, body_bytes)
                return
        self._start = start
        if start == end:
            self._start = self._end = 0
        elif start and not self.waiting:  # part of a header: the next packet shall find as much room as there is
            left = end - start
            view[:left] = view[start:end]
            self._start, self._end = 0, left

    def _skip(self, start: int, size: int) -> int:
        """Returns where parsing continues: ``size`` bytes after ``start``, or at the end of the bytes that arrived.

        In the second case the rest is skipped when it arrives.
        """
        skipped = min(size, self._end - start)
        self._skip_bytes = size - skipped
        return start + skipped

    def _read_detached(self, kind: int, request_id: int, deadline_ms: int, head_bytes: int, body_bytes: int) -> None:
        """Lets the rest of this frame be read into memory of its own."""
        arrived = self._end - self._start
        self._head = memoryview(bytearray(head_bytes))
        self._body = memoryview(unfilled(body_bytes)) if body_bytes else _EMPTY
        in_head = min(arrived, head_bytes)
        self._head[:in_head] = self._view[self._start : self._start + in_head]
        if arrived > in_head:
            self._body[: arrived - in_head] = self._view[self._start + in_head : self._end]
        self._filled = arrived
        self._detached = (kind, request_id, deadline_ms)
        self._start = self._end = 0
