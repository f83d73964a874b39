"""Makes identifiers: random bytes from an entropy port (``os.urandom`` in production, a seeded source in
simulations).
"""

from __future__ import annotations

import os
from collections.abc import Callable

Entropy = Callable[[int], bytes]
"""``entropy(n)`` -> n random bytes."""

system_entropy: Entropy = os.urandom

DATA_ID_BYTES = 16
BUCKET_ID_BYTES = 16
UPLOAD_ID_BYTES = 16
INCARNATION_BYTES = 8
DISK_ID_CHARS = 16


def new_disk_id(entropy: Entropy = system_entropy) -> str:
    """16 lower-case hex digits."""
    return entropy(DISK_ID_CHARS // 2).hex()


def new_upload_id(shard: int, entropy: Entropy = system_entropy) -> bytes:
    """A new upload id. It begins with its object's shard, so that its rows and its parts' rows are stored with the
    object's register.
    """
    return bytes([shard]) + entropy(UPLOAD_ID_BYTES - 1)
