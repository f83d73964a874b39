"""The body of an object on its way in: how it is read, and what it must match."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

from msgspec import Struct, field

from storaged.wire import Buffer


class BodyChecks(Struct, frozen=True):
    """What a body must match, and which checksums of it are kept.

    ``size``: None when it is not known before the end (chunked without a decoded length). ``md5``: 16 raw bytes.
    ``checksums``: algorithm -> base64, declared in headers. ``algorithms``: computed and kept even without a declared
    value; ``api.DEFAULT_ALGORITHM`` when none is named. ``trailing``: called once the body was read, returns algorithm
    -> base64 from the trailer; may raise. ``sha256``: hex of the signed payload hash; empty when it need not be
    checked.
    """

    size: int | None = None
    md5: bytes | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)
    algorithms: tuple[str, ...] = ()
    trailing: Callable[[], Mapping[str, str]] | None = None
    sha256: str = ""


Body = AsyncIterator[Buffer]
"""Pieces of a body as they arrive. A piece stays valid until the consumer asks for the next. Raises IncompleteBody (the
client is gone), XAmzContentSHA256Mismatch, ...
"""


class WholeBody(Protocol):
    """A Body that can also be read whole. ``put`` does so when the declared size is at most that of ``try_put``, and
    then asks for no piece: such an object needs no generator and no copy, and one pass.
    """

    async def whole(self) -> Buffer:
        """All bytes of the body, after every check that the pieces would pass. The caller compares their number with
        the declared size. The memory does not change before the call that was given this body returns. Raises what the
        pieces would raise.
        """


class FillingBody(Protocol):
    """A Body that can also fill its reader's memory directly, without a buffer in between."""

    async def fill(self, view: memoryview) -> int:
        """Fills ``view`` and returns the number of bytes; fewer than fit only at the end of the body. ``view`` belongs
        to the body until this returns or raises. Raises what the pieces would raise.
        """
