"""Two looks at a register, and what follows from them: what was proposed before the first one and is not in the second
one's value is over for good. Pure.

A *look* asks each replica what it has accepted, and settles nothing. Between two looks somebody commits a round: a
gateway that was asked to, or any writer.

Theory of operation. Let a group of replicas report one ballot b in the second look, and each of them something lower in
the first. So each has accepted b after it answered the first look; let t be that moment. Before t it had promised no
ballot above b, or it would have refused b. After t it refuses every ballot below b.

*The group is a quorum.* Then b is chosen.
* A proposal below b can't be chosen any more. A few replicas may still accept it; a later prepare does not choose it,
  since it finds b, or what came after.
* A proposal above b was promised by a quorum, so by a replica of the group, after its t. So it was promised after the
  first look began, and it is based on the value of b, or on what came after.

This holds unless b is the ballot of a create. A proposer that finds a create may apply it to a value that lies below
(``consensus.overtaking``). So a create that a quorum has taken is no such round; one that is carried on is.

*The group is all replicas.* Then besides
* nothing below b lies at any replica, where a proposer might find it;
* each replica holds something, so it refuses every create for ever, whatever its ballot. For a create is promised by no
  replica: no ballot of another proposer, and no clock, ends one that is under way.

A floor (``consensus.floors``) is no such round, though missing rows report it as one: it lies in the past, and replicas
take it whatever they have promised since. So a proposal above it may have been promised before the first look.

What this leaves are proposers that were promised after the first look. What they name must be seen to exist after their
promise: that is asked of everybody who refers to data that is stored apart from the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from storaged.meta.consensus.quorums import Quorum
from storaged.meta.consensus.register import taken_by_create
from storaged.meta.names import ZERO_BALLOT, Ballot, Value


class Held(NamedTuple):
    """What a replica has accepted."""

    ballot: Ballot
    value: Value | None


class Look(NamedTuple):
    """``held``: of each replica that answers. One with a damaged row is not among them. ``fenced``: those at which the
    scope is fenced; ``final``: for ever; ``lends``: by a fence that lends.
    """

    quorum: Quorum
    held: Mapping[str, Held]
    fenced: frozenset[str] = frozenset()
    final: frozenset[str] = frozenset()
    lends: frozenset[str] = frozenset()


def chosen(look: Look) -> Held | None:
    """What a quorum has accepted under one ballot, when no replica reports anything newer. None: a gateway has to
    settle it. The values themselves are compared, for a replica that lies may report any digest.
    """
    found = look.quorum.agreed(look.held)
    if found is None or found.ballot == ZERO_BALLOT or any(held.ballot > found.ballot for held in look.held.values()):
        return None
    return found


def moved_on(first: Look, second: Look, *, everywhere: bool = False) -> Held | None:
    """What was chosen between the looks by a quorum that has accepted it since the first one; with ``everywhere`` by
    all replicas. None: nothing was, as far as can be seen.
    """
    if first.quorum != second.quorum:
        return None
    for found in dict.fromkeys(second.held.values()):
        if not found.ballot.node:  # nothing was accepted; the ballot is zero, or that of a floor
            continue
        alike = [disk for disk, held in second.held.items() if held == found]
        moved = [disk for disk in alike if disk in first.held and first.held[disk].ballot < found.ballot]
        if len(moved) == len(second.quorum.disks):
            return found
        if second.quorum.met(moved) and not everywhere and not taken_by_create(*found):
            return found
    return None


def accepted_everywhere(look: Look, usable: Callable[[Value], bool]) -> bool | None:
    """Whether every replica has accepted a value that was chosen before the look, or a later one. None: a replica does
    not answer. ``usable(value)``: whether the value is that one, another proposal of the same change, or derived from
    one of these.

    A quorum has accepted the chosen value's ballot or a higher one. When the replicas above the lowest ballot are no
    quorum, a member of that quorum holds the lowest ballot. So every replica is at the chosen ballot or above it.
    """
    if not all(disk in look.held for disk in look.quorum.disks):
        return None
    if any(held.value is None or not usable(held.value) for held in look.held.values()):
        return False
    lowest = min(held.ballot for held in look.held.values())
    return not look.quorum.met([disk for disk, held in look.held.items() if held.ballot > lowest])


def outdated(look: Look, usable: Callable[[Value], bool]) -> bool:
    """Whether a quorum reports something newer than each usable value that some replica holds. One replica that lies
    can't say so of what another one has, not even where a third one lags.
    """
    found = [held.ballot for held in look.held.values() if held.value is not None and usable(held.value)]
    newest = max(found, default=ZERO_BALLOT)
    return not found or look.quorum.met([disk for disk, held in look.held.items() if held.ballot > newest])
