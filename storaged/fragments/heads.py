"""Heads of a disk's fragments in the order of their ids, for walks over the whole disk. In a thread: they are read from
all over the disk.
"""

from __future__ import annotations

from collections.abc import Sequence

from storaged.errors import FragmentDamaged, FragmentMissing
from storaged.fragments.engine import Engine
from storaged.fragments.ports import FragmentHeader


def heads_after(engine: Engine, after: bytes, limit: int) -> list[tuple[bytes, FragmentHeader | None]]:
    """Of the next ``limit`` fragments; None for one that is gone by now."""
    return _heads(engine, engine.index.keys(after, limit))


def aged(engine: Engine, after: bytes, limit: int, since_ms: int, before_ms: int) -> tuple[list[FragmentHeader], bytes]:
    """As ``ports.NearStore.aged``."""
    keys = engine.index.keys(after, limit)
    entries = engine.index.lookup_all(keys)
    wanted = [
        key
        for key, entry in zip(keys, entries, strict=True)
        if entry is not None and since_ms <= entry.created_ms < before_ms
    ]
    return [header for _, header in _heads(engine, wanted) if header is not None], keys[-1] if keys else b""


def _heads(engine: Engine, keys: Sequence[bytes]) -> list[tuple[bytes, FragmentHeader | None]]:
    page: list[tuple[bytes, FragmentHeader | None]] = []
    for key in keys:
        header = None
        try:
            header = engine.reader.header(key)
        except FragmentMissing:
            pass
        except FragmentDamaged:
            entry = engine.index.lookup(key)
            if entry is not None:
                header = FragmentHeader(key, b"", b"", (), entry.cell_bytes, entry.payload_bytes, entry.created_ms)
        page.append((key, header))
    return page
