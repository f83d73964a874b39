"""With how many examples a property is tried: all of them, or a tenth in ``tests/run --fast``."""

from __future__ import annotations

import os

FAST = os.environ.get("STORAGED_TESTS") == "fast"


def examples(count: int) -> int:
    """``count``, or in a fast run a tenth of it, and at least ten."""
    return max(10, count // 10) if FAST else count
