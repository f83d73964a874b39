"""Sizes and durations: constants, and conversion from and to text.

Sizes are counted in bytes, durations in seconds unless a name says otherwise (``_ms``, ``_us``).
"""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_SUFFIXES = {"": 1, "B": 1, "K": KIB, "KB": 1000, "KIB": KIB, "M": MIB, "MB": 1000**2, "MIB": MIB,
             "G": GIB, "GB": 1000**3, "GIB": GIB, "T": TIB, "TB": 1000**4, "TIB": TIB}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """``"64 MiB"`` -> 67108864. Raises ValueError that names the text."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in _SUFFIXES:
        raise ValueError(f"not a size: {text!r} (write it like 512 MiB or 2GB)")
    return int(float(match[1]) * _SUFFIXES[match[2].upper()])


def format_size(count: int) -> str:
    """67108864 -> ``"64.0 MiB"``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_duration(seconds: float) -> str:
    """4 -> ``"4 s"``, 200 -> ``"3 min"``, 7300 -> ``"2 h"``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
