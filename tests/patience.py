"""How long tests wait for what must happen. These are guards against waiting for ever, and nothing that a test
measures.

A machine that is ten times slower than the one a test was written on, or does ten other things, must not make it fail.
"""

from __future__ import annotations

GUARD_S = 240.0
"""For something that comes within a second or two. Below pytest's own limit for a test."""

SLOWNESS = 10.0
"""How much slower a machine may be: what a test gives as its longest wait is taken so many times."""
