"""Which branches of instrumented modules ran, by path of the module: one byte a branch."""

from __future__ import annotations

HITS: dict[str, bytearray] = {}
