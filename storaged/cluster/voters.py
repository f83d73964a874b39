"""Which disks of a replica set count when some of them are lost for good. Pure.

A lost disk counts in no quorum. While it is not replaced, a quorum is a majority of the disks that are left. With three
or more of them that is not enough where they are no more than a majority of the whole set: what was acknowledged by a
majority of the whole set may be at a single one of them, and the others would not find it. Then all that are left have
to answer. This is said with sets of one disk each: a quorum needs a majority of every set (``meta.consensus.quorums``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

Sets = tuple[tuple[str, ...], ...]


def left_of(sets: Sequence[Sequence[str]], lost: Collection[str]) -> Sets:
    """The sets without the disks that are lost."""
    return tuple(tuple(disk for disk in disks if disk not in lost) for disks in sets)


def voting_sets(sets: Sequence[Sequence[str]], lost: Collection[str]) -> Sets:
    """The sets of which an operation needs a majority each."""
    if not lost:
        return tuple(map(tuple, sets))
    found: list[tuple[str, ...]] = []
    for disks, left in zip(sets, left_of(sets, lost), strict=True):
        if 2 < len(left) < len(disks) and len(left) <= len(disks) // 2 + 1:
            found.extend((disk,) for disk in left)
        else:
            found.append(left)
    return tuple(found)


def lacks_quorum(sets: Sequence[Sequence[str]], lost: Collection[str], gone: Collection[str]) -> bool:
    """Whether no quorum is left of these sets, which have ``lost`` disks, when the disks ``gone`` are lost, too."""
    return any(2 * sum(disk not in gone for disk in disks) <= len(disks) for disks in voting_sets(sets, lost))


def is_quorum(sets: Sequence[Sequence[str]], lost: Collection[str], disks: Collection[str]) -> bool:
    """Whether ``disks`` are a quorum of these sets, which have ``lost`` disks."""
    return all(2 * sum(disk in disks for disk in members) > len(members) for members in voting_sets(sets, lost))
