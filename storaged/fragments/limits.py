"""The bounds and the pace of one disk's fragment store."""

from __future__ import annotations

from dataclasses import dataclass

from storaged.units import MIB


@dataclass(frozen=True)
class StoreLimits:
    """Sizes in bytes unless their names say otherwise."""

    segment_bytes: int = 256 * MIB
    reserve_bytes: int | None = None
    """Free space that fragments never take. None: 5% of the file system."""
    note_reserve_bytes: int = 4 * MIB
    """Kept in a file, so that a full disk still takes the notes that delete."""
    overlay_entries_max: int = 16_384
    """A checkpoint is due after this many changes, or ``replay_bytes_max`` of log. This bounds memory."""
    replay_bytes_max: int = 256 * MIB
    """This bounds the time of a start."""
    writeback_bytes: int = MIB
    compact_garbage_part: float = 0.5
    """A segment is worth rewriting when this share of the bytes that it holds is garbage."""
    compact_bytes_per_s: int = 64 * MIB
    compact_step_bytes: int = MIB
    compact_rest_s: float = 2.0
    """How long after a change the store looks for a segment to rewrite."""
    punch_queue_max: int = 65_536
    queue_bytes_max: int = 64 * MIB
    batch_bytes_max: int = 16 * MIB
    batch_writes_max: int = 512
    read_threads: int = 4
