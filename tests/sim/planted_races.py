"""Bugs in conditional writes, versions and object lock. The play ``races`` notices them.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_PUT = "storaged/objects/write/put.py"
_DELETE = "storaged/objects/write/delete.py"
_COMPLETE = "storaged/objects/write/complete.py"
_LOCK = "storaged/objects/code/lock.py"
_PLAY = "races"

RACE_BUGS = (
    Planted(
        "condition_before_the_change",
        "the condition of a PUT is judged before its body is read, and not in the change (without versioning)",
        60,
        _PLAY,
        _PUT,
        "            check_write(conditions, current_of(write.place, self._found, self.keys, conditions))\n",
        "            pass\n",
    ),
    Planted(
        "condition_before_the_version",
        "the condition of a PUT is judged before its body is read, and not in the change (with versioning)",
        60,
        _PLAY,
        _PUT,
        "            check_write(conditions, judged(write.place, newest, self.keys, conditions))\n",
        "            pass\n",
    ),
    Planted(
        "condition_of_a_complete",
        "the condition of a Complete is judged before the change alone",
        100,
        _PLAY,
        _COMPLETE,
        "        check_write(conditions, judged(upload.place, newest, self._keys, conditions))\n",
        "",
    ),
    Planted(
        "condition_of_a_delete",
        "a DELETE does not look at its condition",
        20,
        _PLAY,
        _DELETE,
        "            check_write(conditions, judged(self._place, version, self.keys, conditions))\n",
        "            pass\n",
        fast=True,
    ),
    Planted(
        "holds_keep_nothing",
        "a legal hold keeps no version",
        40,
        _PLAY,
        _LOCK,
        "    if lock.hold or (lock.until_ms > now_ms",
        "    if (lock.until_ms > now_ms",
        fast=True,
    ),
    Planted(
        "compliance_is_bypassed",
        "who may bypass governance bypasses compliance, too",
        60,
        _PLAY,
        _LOCK,
        "and not (bypass and lock.mode == GOVERNANCE)):\n        raise AccessDenied(_LOCKED)\n\n\ndef with_retention",
        "and not bypass):\n        raise AccessDenied(_LOCKED)\n\n\ndef with_retention",
    ),
    Planted(
        "retention_is_made_shorter",
        "a retention that lasts is replaced by any other",
        40,
        _PLAY,
        _LOCK,
        "        longer = mode == before.mode and until_ms >= before.until_ms\n",
        "        longer = True\n",
        fast=True,
    ),
    Planted(
        "hold_ends_the_retention",
        "a change of the legal hold forgets the retention",
        20,
        _PLAY,
        _LOCK,
        "    return _kept(Lock(before.mode, before.until_ms, hold, not hold))\n",
        '    return _kept(Lock("", 0, hold, not hold))\n',
        fast=True,
    ),
    Planted(
        "marker_takes_the_version",
        "a delete marker takes the place of the version before it",
        20,
        _PLAY,
        _DELETE,
        "        draft.add(entry)\n",
        "        draft.inline and draft.remove(draft.inline[0])\n        draft.add(entry)\n",
        fast=True,
    ),
)
