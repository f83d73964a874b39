"""The states and events of a change, and which states each event may lead to. Pure data; ``proposer`` is the
machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum, unique
from typing import Final


@unique
class State(IntEnum):
    """Where a change is, and what the shell does when the state is entered."""

    NEW = 0
    """Nothing was asked yet: call ``create`` or ``begin``."""
    CREATING = 1
    """Send ``request`` with ``fragments`` to all disks of ``view``; give each answer to ``created``. After a while:
    ``on_slow``."""
    PREPARING = 2
    """Send ``request`` to all disks of ``view``, or when ``sparing`` to those of one quorum first; give each answer to
    ``promised``. A while after a refusal: ``on_slow``."""
    GATHERING = 3
    """A quorum has promised. Wait up to ``gather_s`` for the others, and see that all were asked; then ``waited``."""
    SYNCING = 4
    """Wait until the fragments that the change names are durable; then ``synced``, or ``data_failed``. The deadline
    waits too."""
    CARRYING = 5
    """Fetch the small copy with the data id ``carry`` from any replica; then ``carried``."""
    ACCEPTING = 6
    """Send ``request`` with ``fragments`` to all disks of ``view``; give each answer to ``accepted``. A while after a
    refusal: ``on_slow``."""
    RETRYING = 7
    """Pause up to ``pause_s``; then ``begin``."""
    DONE = 8
    """``outcome``."""
    FAILED = 9
    """``error``."""
    REFRESHING = 10
    """A replica knows a later step of the register's partition, or no quorum answers. Learn where the partition is now,
    then ``refreshed``."""


@unique
class Event(IntEnum):
    """The calls that may change the state."""

    CREATE = 0
    BEGIN = 1
    CREATED = 2
    PROMISED = 3
    ACCEPTED = 4
    ON_SLOW = 5
    WAITED = 6
    SYNCED = 7
    CARRIED = 8
    DATA_FAILED = 9
    EXPIRE = 10
    REFRESHED = 11


NEW, CREATING, PREPARING, GATHERING, SYNCING, CARRYING, ACCEPTING, RETRYING, DONE, FAILED, REFRESHING = State
"""Globals: a member is found through its enum's class at twice the price."""

_AGAIN: Final = (RETRYING, REFRESHING)
_DECIDED: Final = (SYNCING, CARRYING, ACCEPTING, *_AGAIN, DONE, FAILED)

TRANSITIONS: Final[Mapping[State, Mapping[Event, Sequence[State]]]] = {
    NEW: {Event.CREATE: (CREATING,), Event.BEGIN: (PREPARING,)},
    CREATING: {Event.CREATED: (*_AGAIN, DONE), Event.ON_SLOW: _AGAIN, Event.EXPIRE: (FAILED,)},
    PREPARING: {
        Event.PROMISED: (GATHERING, *_DECIDED),
        Event.ON_SLOW: _AGAIN,
        Event.EXPIRE: (FAILED,),
    },
    GATHERING: {Event.PROMISED: _DECIDED, Event.WAITED: (GATHERING, *_DECIDED), Event.EXPIRE: (FAILED,)},
    SYNCING: {Event.SYNCED: (CARRYING, ACCEPTING, FAILED), Event.DATA_FAILED: (FAILED,)},
    CARRYING: {
        Event.CARRIED: (GATHERING, SYNCING, CARRYING, ACCEPTING, *_AGAIN, FAILED),
        Event.EXPIRE: (FAILED,),
    },
    ACCEPTING: {Event.ACCEPTED: (*_AGAIN, DONE, FAILED), Event.ON_SLOW: _AGAIN, Event.EXPIRE: (FAILED,)},
    RETRYING: {Event.BEGIN: (PREPARING,), Event.EXPIRE: (FAILED,)},
    REFRESHING: {Event.REFRESHED: (RETRYING, FAILED), Event.EXPIRE: (FAILED,)},
    DONE: {},
    FAILED: {},
}
"""The states that each event may lead to. The diagram in README.md shows the same."""
