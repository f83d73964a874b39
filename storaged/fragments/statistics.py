"""What a fragment store reports of itself."""

from __future__ import annotations

from dataclasses import dataclass

from storaged.fragments.ports import Usage


@dataclass(frozen=True)
class FragmentStatistics:
    """Since the start, but for ``usage``. ``groups``: commits in groups; ``writes`` and ``syncs``: among them.
    ``torn_bytes`` and ``gaps``: what the recovery at the start found.
    """

    usage: Usage
    segments: int
    groups: int
    writes: int
    syncs: int
    appended_bytes: int
    compacted_bytes: int
    punched_bytes: int
    checkpoints: int
    overlay_entries: int
    queued_bytes: int
    damaged_fragments: int
    torn_bytes: int
    gaps: int
