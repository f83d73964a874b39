"""Bugs in the store of a disk, and in lists.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

REDO = "storaged/meta/storage/redo.py"
OPENING = "storaged/meta/storage/opening.py"
CHECKPOINT = "storaged/meta/storage/checkpoint.py"
OVERLAY = "storaged/meta/storage/overlay.py"
HEAP = "storaged/meta/storage/heap.py"
SUMS = "storaged/meta/storage/sums.py"
QUEUE = "storaged/meta/storage/write_queue.py"
AGREEMENT = "storaged/meta/listing/agreement.py"
SHARDS = "storaged/meta/listing/shards.py"
CACHE = "storaged/meta/listing/cache.py"
DIFFERENCES = "storaged/meta/listing/differences.py"
RANGES = "storaged/meta/storage/dirty_ranges.py"
SCAN = "storaged/meta/storage/scan.py"
COMPARING = "storaged/meta/listing/comparing.py"

_STORES = (
    Planted(
        "replay_skips_last",
        "a start leaves out the last group of the redo log",
        120,
        "files",
        OPENING,
        "        for body in state.redo.bodies:\n",
        "        for body in state.redo.bodies[:-1]:\n",
    ),
    Planted(
        "replay_backwards",
        "a start applies the groups of the redo log in the wrong order",
        200,
        "files",
        OPENING,
        "        for body in state.redo.bodies:\n",
        "        for body in state.redo.bodies[::-1]:\n",
    ),
    Planted(
        "torn_group_replayed",
        "a start takes a group whose body is not whole",
        300,
        "files",
        REDO,
        "        return fits and xxhash.xxh3_64_intdigest(body, self._seed) == place.check\n",
        "        return fits\n",
    ),
    Planted(
        "copies_not_restored",
        "a start forgets the small copies of the redo log",
        100,
        "files",
        OPENING,
        "            state.restorable.extend(batch.copy for batch in batches if batch.copy is not None)\n",
        "",
    ),
    Planted(
        "sums_only_grow",
        "the sum of a shard keeps what a row was before",
        20,
        "files",
        SUMS,
        '            change = check_number(row) - check_number(stamps_before.get(at, b""))\n',
        "            change = check_number(row)\n",
    ),
    Planted(
        "sums_count_the_log_twice",
        "rows of a checkpoint that are written again after a kill count twice in the sum of their shard",
        100,
        "files",
        "storaged/meta/storage/reader.py",
        "(0 if root is None else check_stored(transaction, root, key))",
        "0",
    ),
    Planted(
        "half_overwritten_early",
        "the redo log overwrites a half that LMDB does not have yet",
        100,
        "files",
        REDO,
        "        if self._lasts[other] > self._applied:\n            return False\n",
        "",
        tests="tests/unit/test_meta_redo.py::test_a_half_is_written_over_only_when_lmdb_has_what_is_in_it",
        why="Checkpoints keep up with what a run writes, so that the other half is in LMDB when this one is full.",
    ),
    Planted(
        "checkpoint_marks_too_much",
        "a checkpoint counts as applied what was logged while it was made",
        200,
        "files",
        CHECKPOINT,
        "                state.put_mark(transaction, self._sequence, closed=last)\n",
        "                state.put_mark(transaction, state.redo.sequence, closed=last)\n",
        tests="tests/unit/test_meta_redo.py::test_a_log_put_back_from_before_is_refused",
        why=(
            "A group has to be logged while a checkpoint is made, and the node has to die before the next checkpoint."
        ),
    ),
    Planted(
        "checkpoint_before_copies",
        "a checkpoint takes rows from the log before their copies are synced elsewhere",
        300,
        "files",
        CHECKPOINT,
        "            state.hooks.sync_copies()\n",
        "",
        fast=True,
    ),
    Planted(
        "frozen_dropped_early",
        "a checkpoint drops the frozen overlay before LMDB has its rows",
        200,
        "files",
        CHECKPOINT,
        "                self.applier.apply(transaction, state.frozen)\n",
        "                taken, state.frozen = state.frozen, Overlay()\n"
        "                self.applier.apply(transaction, taken)\n",
    ),
    Planted(
        "frozen_over_fresh",
        "a read prefers the row that a checkpoint is writing to a newer one",
        200,
        "files",
        OVERLAY,
        "    for overlay in overlays:\n        table",
        "    for overlay in overlays[::-1]:\n        table",
    ),
    Planted(
        "shown_before_durable",
        "a group can be read before it is durable",
        300,
        "files",
        QUEUE,
        "        assert self._loop is not None\n        if not state.redo.try_write(",
        "        assert self._loop is not None\n        state.fresh.add(group)\n        if not state.redo.try_write(",
        tests="tests/unit/test_meta_redo.py::test_a_write_to_the_log_that_finds_no_space_ends_the_writer_until_the_next_start",
        why="Replicas answer nothing about a register whose accept is on its way, whatever its store shows.",
    ),
    Planted(
        "failed_write_acknowledged",
        "a write that the disk refused is acknowledged",
        200,
        "files",
        QUEUE,
        "        if error is not None and not self._state.reason:  # noting",
        "        if False:  # noting",
    ),
    Planted(
        "failed_store_opened_again",
        "a store whose write failed is used again",
        2000,
        "files",
        OPENING,
        "        _refuse_failed(directory)\n",
        "",
        tests="tests/unit/test_meta_store.py::test_a_store_whose_write_failed_stays_readable_and_is_never_opened_again",
        why="What was acknowledged is in the files of a run whatever failed. A drive that drops pages after a failed"
        " sync, and says that a later sync succeeded, is what the rule is for.",
    ),
    Planted(
        "heap_numbers_again",
        "the heap gives the same number to every row of a checkpoint",
        100,
        "files",
        HEAP,
        "                    following += 1\n",
        "",
    ),
)

_DAMAGED = (
    "tests/unit/test_meta_listing.py"
    "::test_a_damaged_row_of_one_replica_is_never_taken_for_absent_where_rows_of_any_replica_count"
)

_LISTS = (
    Planted(
        "last_rows_not_brought_up",
        "a quick comparison leaves out what differs after the last piece that all replicas have",
        10,
        "listing",
        DIFFERENCES,
        "            gaps.append((reached, None))\n",
        "            pass\n",
        fast=True,
    ),
    Planted(
        "digests_not_compared",
        "replicas agree on a piece whatever their digests say",
        200,
        "listing",
        AGREEMENT,
        "        same.setdefault((answer.digest, answer.through, answer.done, answer_hash), []).append(disk)\n",
        "        same.setdefault((b'', answer.through, answer.done, b''), []).append(disk)\n",
        fast=True,
    ),
    Planted(
        "digest_of_keys_alone",
        "a cached digest stays valid when rows change",
        300,
        "listing",
        RANGES,
        "        if self._counts[at] == count and not count % 2:\n            return False\n",
        "        if not count % 2:\n            return False\n",
    ),
    Planted(
        "dirty_key_missed",
        "a write of the last key of a range does not invalidate its digest",
        2000,
        "listing",
        RANGES,
        "            and (through is None or key <= through)\n",
        "            and (through is None or key < through)\n",
    ),
    Planted(
        "remembered_list_believed",
        "a list that is remembered is shown although its digest has changed",
        200,
        "listing",
        SHARDS,
        "        if held is None or held.digest != answer.digest or held.done != answer.done:\n",
        "        if held is None:\n",
    ),
    Planted(
        "remembered_end",
        "a remembered list ends where it ended then",
        2000,
        "listing",
        SHARDS,
        "        if held is None or held.digest != answer.digest or held.done != answer.done:\n",
        "        if held is None or held.digest != answer.digest:\n",
        open=True,
        why="A page ends where the answer that it got ends, not where the remembered list ended. What is remembered"
        " only says which rows need not be sent, and how many pieces are asked for at once.",
    ),
    Planted(
        "remembered_with_prefix",
        "remembered lists with a delimiter serve pages that begin within them",
        2000,
        "listing",
        CACHE,
        "    if exactly:\n        return shard.pieces.get(after)\n",
        "",
        fast=True,
    ),
    Planted(
        "newest_listed",
        "a list shows the newest row where replicas differ",
        300,
        "listing",
        AGREEMENT,
        "        settled = _agreed(feed.view, rows)\n",
        "        held = [(row.ballot, row.value) for row in rows.values() if row.ballot]\n"
        "        settled = max(held, key=lambda pair: pair[0], default=None)\n",
    ),
    Planted(
        "page_beyond_known",
        "a page goes further than one of the answers looked",
        300,
        "listing",
        AGREEMENT,
        '    return (min(ends), False) if ends else (b"", True)\n',
        '    return (max(ends), False) if ends else (b"", True)\n',
        tests="tests/property/test_listing.py",
        why="A replica has to lag where another answer goes further, and the page has to end between the two.",
    ),
    Planted(
        "horizon_ignored",
        "keys of a common prefix are judged although a replica has not looked as far",
        2000,
        "listing",
        AGREEMENT,
        "        if key > horizons.get(common_prefix(key, query.prefix, query.delimiter), key):\n            continue",
        "        if False:\n            continue",
        tests="tests/unit/test_meta_listing.py::test_keys_behind_a_settled_one_in_a_common_prefix_are_not_settled",
        why="A key that only some of the answers have seen is read, and so shown rightly. It costs that read.",
    ),
    Planted(
        "prefix_hidden_by_deleted",
        "a common prefix whose first key is gone is not looked into further",
        2000,
        "listing",
        AGREEMENT,
        "        if group and group not in shown and settled.horizons.get(group) == key:\n",
        "        if False:\n",
    ),
    Planted(
        "damaged_row_not_shown",
        "a replica does not name its damaged rows among those that are visible",
        0,
        "lending",
        SCAN,
        "                if everything or shipped:",
        "                if everything:",
        tests=_DAMAGED,
        why="The row that is damaged has to be the only one that shows that there is something.",
    ),
    Planted(
        "damaged_row_is_absent",
        "a damaged row counts as none where rows of any replica count",
        0,
        "lending",
        COMPARING,
        '                    raise ServiceUnavailable("A row is damaged at one of its replicas.")\n',
        "                    continue\n",
        tests=_DAMAGED,
        why="The row that is damaged has to be the only one that shows that there is something.",
    ),
)

STORE_BUGS = (*_STORES, *_LISTS)
