"""Bugs in the expiration of objects. Tests of the object plane notice.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from dataclasses import replace

from tests.sim.planted import Planted

_LOOK = "storaged/objects/lifecycle/look.py"
_RULES = "storaged/objects/code/lifecycle.py"
_WORKER = "storaged/maintain/lifecycle.py"
_WALK = "storaged/objects/lifecycle/walk.py"
_TESTS = "tests/unit/test_objects_lifecycle.py"
_WHY = "A look is one change of one register; what matters is what it judges, which tests interleave."


def _bug(name: str, what: str, path: str, old: str, new: str) -> Planted:
    return Planted(name, what, 0, path=path, old=old, new=new, tests=_TESTS, why=_WHY)


LIFECYCLE_BUGS = (
    _bug(
        "judged_outside_of_the_change",
        "the current version expires as the look found it, not as the change finds it",
        _LOOK,
        "        due = current_due(rules, _subject(self._place, self._keys, newest), self._judge.day_ms)\n"
        "        if due is None:\n            return\n"
        "        if due.day > today:\n            self.later.append(due.day)\n            return\n",
        "",
    ),
    _bug(
        "noncurrent_judged_outside_of_the_change",
        "noncurrent versions go as the look found them",
        _LOOK,
        "        if due is not None and due.day <= today:\n            if self._try_remove(draft, entry):\n",
        "        if True:\n            if self._try_remove(draft, entry):\n",
    ),
    _bug(
        "early_by_a_day",
        "a day is due when it begins, not when it has passed",
        _RULES,
        "    return (since_ms + days * day_ms) // day_ms + 1\n",
        "    return (since_ms + days * day_ms) // day_ms\n",
    ),
    _bug(
        "locks_ignored",
        "a lock keeps nothing from expiring",
        _LOOK,
        "        check_removal(entry.kept.lock, self._judge.now_ms(), bypass=False)\n",
        "        return\n",
    ),
    _bug(
        "own_clock",
        "the gateway's own clock says what is due",
        _LOOK,
        "        now_ms = self._plane.now_agreed_ms()\n",
        "        now_ms = self._plane.clock.wall_ms()\n",
    ),
    _bug(
        "rules_of_the_look",
        "a record of the bucket is as good as another",
        _LOOK,
        "        record = self._buckets.try_get(self._bucket.name)\n",
        "        record = self._bucket\n",
    ),
    _bug(
        "row_goes_first",
        "a row of the index goes before its keys were looked at",
        _WORKER,
        "                for key in await self._look_at_all(bucket, judge, row.keys, done):\n",
        "                await drop_row(plane, row.name)\n"
        "                for key in await self._look_at_all(bucket, judge, row.keys, done):\n",
    ),
    _bug(
        "walk_ends_before_it_is_written",
        "the progress of a walk is noted, its notes are not",
        _WALK,
        "    await write_notes(plane, notes)\n",
        "    plane.background.spawn(write_notes(plane, notes))\n    notes.take()\n",
    ),
    _bug(
        "number_of_versions_ignored",
        "the newest noncurrent versions are not kept by their number",
        _RULES,
        "        if newer >= one.rule.newer_noncurrent\n",
        "        if newer >= 0\n",
    ),
    _bug(
        "no_walk_for_what_was_lost",
        "a bucket is walked over once",
        _WORKER,
        "        if state is None or state.rules != wanted or self._is_old(state, now_ms):\n",
        "        if state is None or state.rules != wanted:\n",
    ),
)

_SEEDS = {
    "judged_outside_of_the_change": 60,
    "early_by_a_day": 15,
    "own_clock": 15,
    "rules_of_the_look": 15,
    "walk_ends_before_it_is_written": 15,
    "number_of_versions_ignored": 20,
    "no_walk_for_what_was_lost": 50,
}

LIFECYCLE_PLAY_BUGS = (
    *(
        replace(bug, name=f"{bug.name}_in_a_run", budget=_SEEDS[bug.name], play="lifecycle", tests="", why="")
        for bug in LIFECYCLE_BUGS
        if bug.name in _SEEDS
    ),
    Planted(
        "index_grows",
        "rows of the index stay when their keys were looked at",
        20,
        "lifecycle",
        _WORKER,
        "                await drop_row(plane, row.name)\n",
        "",
    ),
    Planted(
        "index_without_rules",
        "the index of a bucket without rules goes only while its worker lives",
        60,
        "lifecycle",
        _WORKER,
        "        if await read_state(self._plane, bucket) is not None:\n",
        "        if False:\n",
    ),
)
"""Bugs that the play ``lifecycle`` notices."""
