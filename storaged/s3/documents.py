"""Where documents of clients are understood: small ones at once, others in a thread, so that nobody's document keeps
everybody's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from storaged.units import KIB

INLINE_BYTES_MAX = 16 * KIB
"""The tiniest elements that fit are 4,000, and take some 5 ms; a thread and back takes 0.1. Nearly all documents are
smaller.
"""

T = TypeVar("T")


async def understood(parse: Callable[[bytes], T], document: bytes) -> T:
    """``parse(document)``. Raises what ``parse`` raises."""
    if len(document) > INLINE_BYTES_MAX:
        return await asyncio.to_thread(parse, document)
    return parse(document)
