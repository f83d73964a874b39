"""Each part of the collector's rule, broken. ``collecting`` notices.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_GC = "storaged/maintain/garbage_page.py"
_DISUSE = "storaged/maintain/disuse.py"
_LOOKS = "storaged/meta/consensus/looks.py"
_CONDEMNED = "tests/doubles/fragments.py"
_PLAY = "collecting"

COLLECTOR_BUGS = (
    Planted(
        "no_round",
        "what two looks agree on counts, although nothing was committed between them",
        100,
        _PLAY,
        _LOOKS,
        "if disk in first.held and first.held[disk].ballot < found.ballot]",
        "if disk in first.held]",
        tests="tests/unit/test_looks.py",
        why="A promise from before the looks has to be kept until after the deletion: 270 seeds showed none.",
    ),
    Planted(
        "looked_before_condemned",
        "data is condemned after the looks",
        200,
        _PLAY,
        "storaged/maintain/deletion.py",
        "        proofs = await prove(list(found))\n",
        "        proofs = await prove(list(found))\n        await use.mark(everything)\n",
        tests="tests/integration/test_maintain_collect.py::test_data_that_a_record_names_after_the_look_is_not_deleted",
        why="A writer's promise and its sync have to come between the round and the second look, which is some ms.",
    ),
    Planted(
        "orphans_by_a_majority",
        "data that may be in a create does not wait for every replica",
        400,
        _PLAY,
        _GC,
        "elif proof.gone or part or (proof.everywhere and not proof.uploads):",
        "elif proof.gone or part or not proof.uploads:",
        tests=(
            "tests/integration/test_maintain_collect.py"
            "::test_an_orphan_waits_for_a_replica_that_answers_and_has_not_accepted_the_round"
        ),
        why=(
            "Only data that is stored with the record is in a create, and each accept of it stores the copy anew: a "
            "chosen record keeps its copies. What goes is the copy of a create that one replica alone has taken. "
            "Until another replica is back, its register is not settled then."
        ),
    ),
    Planted(
        "all_data_is_replaced",
        "a settled read suffices for data of which nothing is known",
        100,
        _PLAY,
        _GC,
        "if garbage.entry.origin == REPLACED else",
        "if garbage.entry.origin in (b'', REPLACED) else",
    ),
    Planted(
        "references_not_looked_at",
        "what the round's record refers to goes too",
        160,
        _PLAY,
        _GC,
        "elif any(entry.data_id == garbage.data_id for entry in proof.entries):",
        "elif False:",
        first=31,  # about one seed of thirty shows it, and 33 does
        fast=True,
    ),
    Planted(
        "nobody_pardons",
        "a sync or a touch of what is condemned does not spare it",
        200,
        _PLAY,
        _CONDEMNED,
        "    def pardon(self, data_ids: Iterable[bytes]) -> None:\n"
        "        self._condemned.difference_update(data_ids)\n",
        "    def pardon(self, data_ids: Iterable[bytes]) -> None:\n        pass\n",
        tests="tests/integration/test_maintain_collect.py::test_data_that_a_record_names_after_the_look_is_not_deleted",
        why="As with looked_before_condemned.",
    ),
    Planted(
        "synced_before_the_promise",
        "a writer sees its fragments beside the prepare, not after the promise",
        0,
        _PLAY,
        "storaged/objects/write/writer.py",
        "        await promised.wait()\n        held, self.held = self.held, None\n",
        "        held, self.held = self.held, None\n",
        tests="tests/unit/test_objects_writer.py::test_fragments_are_seen_after_each_promise",
        why="The play imitates the writer (``Collecting._made_durable``), and this is the program's.",
    ),
    Planted(
        "orphans_stay",
        "the sweep retires nothing",
        20,
        _PLAY,
        "storaged/maintain/sweep.py",
        "                if not claimed:\n",
        "                if False:\n",
        fast=True,
    ),
    Planted(
        "fences_that_may_be_lifted",
        "a bucket that no directory names is gone while it is fenced, whether or not the fence stays",
        100,
        "hiding",
        _DISUSE,
        "            for_ever = look.quorum.met(look.final)\n",
        "            for_ever = True\n",
    ),
    Planted(
        "one_says_that_the_fence_stays",
        "one replica alone says that a fence stays for ever",
        100,
        "hiding",
        _DISUSE,
        "            for_ever = look.quorum.met(look.final)\n",
        "            for_ever = bool(look.final)\n",
    ),
    Planted(
        "uploads_by_a_majority",
        "that a key has no open upload is told by a majority",
        150,
        "hiding",
        _DISUSE,
        "owner.table != Table.OBJECT or await self._no_replica_has_uploads(owner):\n            return None\n"
        "        found: set[bytes] = set()\n",
        "owner.table != Table.OBJECT:\n            return None\n"
        "        if not [1 async for _ in living_uploads(self._context.scanner, owner)]:\n            return None\n"
        "        found: set[bytes] = set()\n",
    ),
    Planted(
        "no_row_of_an_upload_by_a_majority",
        "an upload without a row at a majority has ended",
        0,
        "hiding",
        _DISUSE,
        "        if value is None:\n            look = await self._context.look(name)\n",
        "        if False:\n            look = await self._context.look(name)\n",
        tests="tests/integration/test_collect_lies.py",
        why="It is asked of a part that was written again, which the play does not miss.",
    ),
    Planted(
        "empty_by_a_majority",
        "a bucket is deleted when a majority lists nothing, whatever the third replica has",
        0,
        "buckets",
        "storaged/objects/system/buckets.py",
        "            if await is_doubted(plane, bucket):\n",
        "            if False:\n",
        tests="tests/integration/test_collect_lies.py",
        why="No replica of the play lies.",
    ),
)
