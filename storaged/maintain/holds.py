"""Data that downloads still read: this node keeps it although it is due for deletion.

Theory of operation. Data that was deleted or replaced, and pages that no record names any more, stay for a delay. A
download that lasts longer holds them: its gateway names them to all storage nodes every few seconds
(``MaintainClient``), and each name counts for ``LEASE_S``. So a gateway that dies holds nothing for long. A storage
node that restarts gets the names again before its collectors begin.

A client that reads slowly must not stop collection for ever. So a name keeps data for at most ``read_hold_s`` after the
first time that a collector spared it, and a disk of which less than ``FREE_SHARE_MIN`` is free keeps nothing. There are
``HELD_MAX`` names at most. A download whose data is gone ends with its connection, as a download of damaged data does:
no byte leaves a gateway before it was authenticated.

Holds serve readers alone. Whether a deletion is right does not depend on them: ``disuse`` decides that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from storaged.clock import Clock
from storaged.fragments.ports import Usage
from storaged.wire import Message

LEASE_S = 20.0
RENEW_S = 5.0
HELD_MAX = 100_000
KEYS_A_CALL = 2_000
KEY_BYTES_MAX = 32
FREE_SHARE_MIN = 0.1
"""As for the warning DISK_FILLING."""
REASON = "a download of it is under way"


class Hold(Message, frozen=True):
    """What long downloads read: data ids, ids of uploads, hashes of pages."""

    keys: tuple[bytes, ...]


def has_room_to_hold(usage: Usage) -> bool:
    """Whether a disk may wait for downloads. Their clients may be slow on purpose, and others want to write."""
    return usage.state != "full" and usage.bytes_free >= FREE_SHARE_MIN * (usage.bytes_used + usage.bytes_free)


@dataclass(slots=True)
class _Held:
    """``until`` (monotonic). ``kept_since``: when a collector spared it for the first time."""

    until: float
    kept_since: float | None = None


class Holds:
    """Of one storage node, for all of its disks."""

    def __init__(self, clock: Clock, hold_s: float) -> None:
        self._clock = clock
        self._hold_s = hold_s
        self._held: dict[bytes, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, keys: Iterable[bytes]) -> None:
        """Names that do not fit are not held."""
        until = self._clock.monotonic() + LEASE_S
        if len(self._held) >= HELD_MAX:
            self._forget()
        for key in keys:
            held = self._held.get(key)
            if held is not None:
                held.until = until
            elif len(self._held) < HELD_MAX:
                self._held[bytes(key)] = _Held(until)

    def keeps(self, *keys: bytes) -> bool:
        """Whether one of these is held, so that a collector that would delete it now spares it."""
        if not self._held:
            return False
        return any(self._keeps(key) for key in keys)

    def _keeps(self, key: bytes) -> bool:
        held, now = self._held.get(key), self._clock.monotonic()
        if held is None:
            return False
        if held.until < now:
            del self._held[key]
            return False
        if held.kept_since is None:
            held.kept_since = now
        return now - held.kept_since < self._hold_s

    def _forget(self) -> None:
        now = self._clock.monotonic()
        self._held = {key: held for key, held in self._held.items() if held.until >= now}
