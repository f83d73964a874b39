"""What a storage node tells of its background work, and of itself (``maintain.status``)."""

from __future__ import annotations

from storaged.maintain.job import JobReport
from storaged.maintain.repair import Waits
from storaged.maintain.spare_room import UNKNOWN_BYTES
from storaged.wire import Message

REASONS_MAX = 8


class MaintainStatus(Message, frozen=True):
    """``current``: the counts come from a complete walk that began when the disks were as this node sees them now.
    ``busy``: something is being done, or waits to be done, that could change the counts.
    ``below_target``, ``at_risk``, ``lost``, ``unreadable``: objects. ``parts_below_target``: parts of uploads that are
    not complete.
    ``records_refused``: registers of buckets of which nothing is repaired or moved, because their records are not
    verified, each with the reason.
    ``garbage_waiting``: why data on the garbage lists is not deleted yet although it is due, and how many data ids wait
    for each reason; orphans are among them.
    """

    node: str
    below_target: int
    at_risk: int
    lost: int
    current: bool
    busy: bool
    jobs: tuple[JobReport, ...]
    fragments_rebuilt: int = 0
    bytes_rebuilt: int = 0
    blocks_recoded: int = 0
    fragments_deleted: int = 0
    damaged_found: int = 0
    registers_settled: int = 0
    parts_below_target: int = 0
    unreadable: int = 0
    waits: Waits = Waits()
    audit_alarms: tuple[tuple[str, str], ...] = ()
    records_refused: tuple[tuple[str, str], ...] = ()
    garbage_waiting: tuple[tuple[str, int], ...] = ()
    misplaced: int = 0
    """Objects and parts that are whole, and that the layout in force wants elsewhere, or under another profile."""
    judged: int = 0
    """Objects and parts with fragments that the last complete walk looked at."""
    outdated: int = 0
    """Of those that are misplaced: the layout in force wants them under another profile."""
    layout: int = 0
    """The epoch of the layout by which the last walk judged, or by which the one under way does."""
    unrepaired: tuple[tuple[str, int], ...] = ()
    """Why objects and parts below target are not repaired (``Repair.unrepaired``), the most frequent reasons."""
    away_bytes: int = UNKNOWN_BYTES
    """Of the fragments of these objects that lie on disks that are away (``spare_room``)."""
    partition_bytes: int = UNKNOWN_BYTES
    """What one replica of a partition takes, about."""
    unmoved: tuple[tuple[str, int], ...] = ()
    """Why objects and parts that are misplaced did not move when that was tried, the most frequent reasons."""
    unwritable: str = ""
    """Why the node can't write to its own directory; empty when it can."""
