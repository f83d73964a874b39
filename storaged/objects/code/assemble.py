"""A block's sealed bytes from any k of its fragments. Pure computation, which callers run in threads."""

from __future__ import annotations

from collections.abc import Mapping

from storaged.cluster.layout import Profile
from storaged.objects.code import erasure
from storaged.objects.code.geometry import BlockShape
from storaged.wire import Buffer


def empty_fragments(profile: Profile, shape: BlockShape) -> dict[int, Buffer]:
    """Data fragments that a short block does not reach: they are empty, and need not be read."""
    return {position: b"" for position in range(profile.k) if not shape.fragment_cells(profile, position)}


def assemble(profile: Profile, shape: BlockShape, present: Mapping[int, Buffer]) -> bytearray:
    """The block in the order of the stream. ``present``: position -> whole fragment, any k of them. Raises ValueError
    with fewer.
    """
    if profile.k == 1:
        if not present:
            raise ValueError("no copy")
        return bytearray(next(iter(present.values())))
    fragments: dict[int, Buffer] = dict(present)
    missing = [position for position in range(profile.k) if position not in fragments]
    if missing:
        length = max(shape.fragment_length(profile, position) for position in range(profile.k))
        fragments.update(erasure.reconstruct(profile, present, missing, length))
    sealed = bytearray(shape.sealed_bytes)
    for cell in range(shape.cells):
        stripe, position = divmod(cell, profile.k)
        start, length = cell * shape.cell_bytes, shape.cell_length(cell)
        source = memoryview(fragments[position])
        sealed[start : start + length] = source[stripe * shape.cell_bytes : stripe * shape.cell_bytes + length]
    return sealed
