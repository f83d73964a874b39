"""What keeps the versions of a key, broken. ``versions`` notices, or tests of what looks after data.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_HISTORY = "storaged/objects/code/history.py"
_ADDING = "storaged/objects/code/adding.py"
_VERSIONED = "storaged/objects/write/versioned.py"
_REFERENCES = "storaged/objects/write/references.py"
_PLAY = "versions"
_LOCK = "storaged/objects/code/lock.py"
_LOCK_TESTS = "tests/unit/test_objects_lock.py"
_LOCKS_NEED_NO_PLAY = "Locks are judged by one call in the compare-and-set, which the play has; its versions have none."
_TESTS = "tests/integration/test_maintain_versions.py"

VERSION_BUGS = (
    Planted(
        "dropped_at_spill",
        "the record does not refer to the page of what it has no room for",
        10,
        _PLAY,
        _HISTORY,
        "            self._refer(0, self._new_page(going, ()))\n",
        "            self._new_page(going, ())\n",
        fast=True,
    ),
    Planted(
        "page_after_the_head",
        "a new page is written when the record that names it is accepted",
        150,
        _PLAY,
        _VERSIONED,
        "    except PagesToPut:\n"
        "        outcome = await change_once("
        "plane, keys, name, change.update, lambda: change.put_pages(plane.pages, name))\n",
        "    except PagesToPut:\n"
        "        outcome = await change_with_keys(plane.registers, keys, name, change.update)\n"
        "        await change.put_pages(plane.pages, name)\n",
    ),
    Planted(
        "null_kept_twice",
        "a new null version leaves the one before",
        10,
        _PLAY,
        _HISTORY,
        "            if before is not None:\n                self.remove(before)\n        self._entries.insert",
        "        self._entries.insert",
    ),
    Planted(
        "null_on_a_page_forgotten",
        "a null version that goes to a page is not noted",
        20,
        _PLAY,
        _HISTORY,
        "                self._null_at, self._copied = entry.ordinal, _small_part(entry.version)\n",
        "                self._copied = _small_part(entry.version)\n",
    ),
    Planted(
        "branch_loses_the_rest",
        "references that go to a branch are dropped from the record",
        20,
        _PLAY,
        _HISTORY,
        "            self._refer(level + 1, self._new_page((), going))\n",
        "            self._new_page((), going)\n",
    ),
    Planted(
        "newest_leaf_lost",
        "a record whose last version was deleted takes no page in",
        20,
        _PLAY,
        _HISTORY,
        "            self._take_newest(level)\n",
        "            del level[0]\n",
    ),
    Planted(
        "only_the_record_counts",
        "what older versions refer to is garbage",
        40,
        _PLAY,
        _REFERENCES,
        "            async for entry in every_entry(pages, near, decode_object(record), on_unreadable=on_unreadable):\n"
        "                yield entry.version\n",
        "            for version in decode_object(record).versions:\n                yield version\n",
    ),
    Planted(
        "pages_of_versions_not_needed",
        "pages of older versions are garbage",
        40,
        _PLAY,
        _REFERENCES,
        "every_page(pages, name, decode_record(value), on_unreadable=on_unreadable):\n            yield page_hash\n",
        "every_page(pages, name, decode_record(value), on_unreadable=on_unreadable):\n            pass\n",
    ),
    Planted(
        "copies_let_go_of",
        "a new version lets go of the small copies of the null version",
        10,
        _PLAY,
        _VERSIONED,
        "        change = record_change(draft.record(), payload or _payload_of(value, draft.removed))\n",
        "        change = record_change(draft.record(), payload)\n",
    ),
    Planted(
        "ordinals_stand_still",
        "all versions have one ordinal",
        10,
        _PLAY,
        _ADDING,
        "    return value.sequence + 1 if value is not None else 1\n",
        "    return 1\n",
    ),
    Planted(
        "moves_forget_older_versions",
        "a move of blocks leaves out the versions on pages",
        0,
        _PLAY,
        "storaged/maintain/moved_record.py",
        "    draft = await with_draft(pages, name, record, replace_all)\n",
        "    draft = replace_all(Draft(type(record)(record.versions), None))\n",
        tests=f"{_TESTS}::test_recoding_and_moving_back_keep_every_version",
        why="The play does not move blocks.",
    ),
    Planted(
        "partitions_leave_pages",
        "the disk that comes to a partition does not get pages of older versions",
        0,
        _PLAY,
        "storaged/maintain/partition_mover.py",
        "            async for page in pages_in(self._ports.pages, name, row.value, on_unreadable=_only_lost):\n"
        "                near.setdefault(page, name)\n",
        "            async for page in pages_in(self._ports.pages, name, row.value, on_unreadable=_only_lost):\n",
        tests=f"{_TESTS}::test_a_partition_moves_with_the_pages_and_copies_of_all_versions",
        why="The play does not move partitions.",
    ),
    Planted(
        "replaced_by_a_late_gateway",
        "a gateway that does not know of versioning replaces the record",
        0,
        _PLAY,
        "storaged/objects/write/put.py",
        "        if self._found.history is not None:\n            raise HasHistory\n",
        "",
        tests="tests/unit/test_objects_versions.py::test_a_put_that_thinks_the_bucket_has_no_versioning_keeps_all_versions",
        why="The play has the program's changes of records, and not its PUT.",
    ),
    Planted(
        "locks_not_judged",
        "a version is removed without a look at its lock",
        0,
        _PLAY,
        _HISTORY,
        "        self._check(entry)\n",
        "",
        tests=_LOCK_TESTS,
        why=_LOCKS_NEED_NO_PLAY,
    ),
    Planted(
        "compliance_bypassed",
        "the bypass of governance bypasses compliance",
        0,
        _PLAY,
        _LOCK,
        "(bypass and lock.mode == GOVERNANCE)",
        "bypass",
        tests=_LOCK_TESTS,
        why=_LOCKS_NEED_NO_PLAY,
    ),
    Planted(
        "hold_ignored",
        "a legal hold keeps nothing",
        0,
        _PLAY,
        _LOCK,
        "if lock.hold or (",
        "if (",
        tests=_LOCK_TESTS,
        why=_LOCKS_NEED_NO_PLAY,
    ),
    Planted(
        "retention_shortened",
        "a retention is made shorter by all",
        0,
        _PLAY,
        _LOCK,
        "        longer = mode == before.mode and until_ms >= before.until_ms\n",
        "        longer = mode == before.mode\n",
        tests=_LOCK_TESTS,
        why=_LOCKS_NEED_NO_PLAY,
    ),
    Planted(
        "default_forgotten",
        "uploads in parts do not get the default of the bucket",
        0,
        _PLAY,
        "storaged/objects/write/complete.py",
        "        self._lock = lock_of_new(plane, bucket, upload.record.lock)\n",
        "        self._lock = upload.record.lock\n",
        tests=_LOCK_TESTS,
        why=_LOCKS_NEED_NO_PLAY,
    ),
    Planted(
        "lock_lost_with_tags",
        "a change of metadata forgets the lock",
        0,
        _PLAY,
        "storaged/objects/write/metadata.py",
        "        draft.replace(entry, entry._replace(version=after))\n",
        "        draft.replace(entry, entry._replace(version=after, kept=type(entry.kept)(entry.ordinal)))\n",
        tests=_LOCK_TESTS,
        why=_LOCKS_NEED_NO_PLAY,
    ),
)
