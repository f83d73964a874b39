"""Bugs in loans between buckets, and in lenders. The play ``lenders`` notices them, or a test of what is rare.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_LOANS = "storaged/objects/write/loans.py"
_LENDERS = "storaged/objects/system/lenders.py"
_BUCKETS = "storaged/objects/system/buckets.py"
_EMPTYING = "storaged/objects/system/emptying.py"
_REGISTERS = "storaged/objects/lender_registers.py"
_ENDED = "storaged/objects/write/ended_uploads.py"
_PLAY = "lenders"
_UNIT = "tests/unit/test_objects_lenders.py"

LENDER_BUGS = (
    Planted(
        "lender_of_a_majority",
        "a bucket becomes a lender although a replica has no fence",
        600,
        _PLAY,
        _BUCKETS,
        "            if left is Left.LOANS and not (everywhere and await self._lenders.may_begin(bucket)):\n"
        "                return Left.OBJECTS\n",
        "            if left is Left.LOANS:\n"
        "                await plane.fences.fence(bucket.id, bucket.shard_numbers, bucket.nonce, lends=True)\n",
        tests=_UNIT,
    ),
    Planted(
        "lender_with_an_object",
        "a bucket becomes a lender although a replica may have an object",
        600,
        _PLAY,
        _LENDERS,
        "        if await is_doubted(self._plane, bucket, everyone=True):\n            return False\n",
        "",
        tests=_UNIT,
    ),
    Planted(
        "lender_after_its_name",
        "the name of a bucket is free before the record of the lender is written",
        10,
        _PLAY,
        _BUCKETS,
        "            lender = await self._lenders.begin(record)\n",
        "            lender = record\n            plane.background.spawn(self._lenders.begin(record))\n",
    ),
    Planted(
        "lenders_key_ends",
        "the deletion of a bucket counts as its end although it lends data",
        600,
        _PLAY,
        _BUCKETS,
        "        return lender is None or lender.nonce < nonce\n",
        "        return True\n",
        tests=_UNIT,
    ),
    Planted(
        "lenders_key_ends_with_its_bucket",
        "the key of a lender ends when an attempt before had noted that it ends with the bucket",
        600,
        _PLAY,
        _LENDERS,
        "        await self._note(lender)\n        return lender\n",
        "        return lender\n",
        tests=_UNIT,
    ),
    Planted(
        "nearly_a_lender",
        "the key of a bucket ends with a lender that it did not become",
        600,
        _PLAY,
        _LENDERS,
        "        return await self._records.is_deleted(last[1].formerly, bucket_id, nonce)\n",
        "        return True\n",
        tests=_UNIT,
    ),
    Planted(
        "late_lender_keeps_its_bucket",
        "the record of a lender that was written late keeps its bucket from its end",
        600,
        _PLAY,
        _BUCKETS,
        "        return lender is None or lender.nonce < nonce\n",
        "        return lender is None\n",
        tests=_UNIT,
        why="A gateway has to sleep in a deletion, and the one that makes the next has to die after it.",
    ),
    Planted(
        "closed_bucket_uses_nothing",
        "a version in a bucket that is closed counts as gone",
        600,
        _PLAY,
        _LOANS,
        '        if error.details.get("final"):\n            return False\n',
        "        return bool(error.details.get('never'))\n",
        tests=_UNIT,
    ),
    Planted(
        "lender_dropped_while_it_begins",
        "the record of a lender is removed while its bucket is being deleted",
        600,
        _PLAY,
        _LENDERS,
        "            if (record.state, record.nonce) == (DELETING, lender.nonce):\n"
        "                return lender  # the deletion goes on\n",
        "",
        tests=_UNIT,
    ),
    Planted(
        "lender_ends_with_a_row",
        "a lender ends although it lends something",
        10,
        _PLAY,
        _LENDERS,
        "await self._remove_versions(lender, row.key)):\n                return lender\n",
        "await self._remove_versions(lender, row.key)):\n                break\n",
        fast=True,
    ),
    Planted(
        "lender_begins_late",
        "the record of a lender is written by an attempt before the last one",
        600,
        _PLAY,
        _LENDERS,
        "            if before is not None and before.nonce > bucket.nonce:\n",
        "            if False and before is not None:\n",
        tests=_UNIT,
    ),
    Planted(
        "inner_loans_lend",
        "a bucket with loans inside of it becomes a lender",
        600,
        _PLAY,
        _EMPTYING,
        "    return Left.LOANS if all(one.scope for loan in sharing.loans for one in loan.borrowers) else",
        "    return Left.LOANS if all(loan.borrowers for loan in sharing.loans) else",
        tests=_UNIT,
    ),
    Planted(
        "lender_counts_as_empty",
        "a bucket ends although copies in other buckets use its data",
        10,
        _PLAY,
        _EMPTYING,
        "        found = left_in(row)\n        if found is Left.OBJECTS:\n            break\n",
        "        if left_in(row) is Left.OBJECTS:\n            return Left.OBJECTS\n",
        fast=True,
    ),
    Planted(
        "final_fence_of_a_lender",
        "the fence of a bucket is final as soon as its name is free, although it lends",
        10,
        _PLAY,
        _BUCKETS,
        "            plane.background.spawn(self._lenders.try_tend(lender))\n            return True\n",
        "            plane.background.spawn(self._lenders.try_tend(lender))\n",
        fast=True,
    ),
    Planted(
        "borrower_without_its_bucket",
        "the record of an owner does not say that a borrower is in another bucket",
        10,
        _PLAY,
        _LOANS,
        '        Borrower(loan_id, name.key, now_ms, b"", name.scope, name.shard),\n',
        "        Borrower(loan_id, name.key, now_ms),\n",
    ),
    Planted(
        "loans_of_lenders_stay",
        "the end of a loan does not use the nonce of a lender",
        10,
        _PLAY,
        _LOANS,
        "    plane, mark = plane.for_lenders(bucket), plane.entropy(MARK_BYTES)\n",
        "    mark = plane.entropy(MARK_BYTES)\n",
    ),
    Planted(
        "uploads_of_lenders_stay",
        "the open uploads of a lender are not ended",
        600,
        _PLAY,
        _LENDERS,
        "        await end_uploads(self._plane.for_lenders(lender), lender)\n",
        "",
        tests=_UNIT,
    ),
    Planted(
        "between_buckets_without_a_round",
        "whether a version of another bucket uses a borrower is read, and no promise is ended",
        60,
        _PLAY,
        _LOANS,
        "        return uses(await registers.settle(name) if settled else (",
        "        return uses((",
    ),
    Planted(
        "late_lender_stays",
        "a lender whose record was written after its bucket had ended is looked after as others",
        600,
        _PLAY,
        _LENDERS,
        "        if await self._has_ended(lender):\n",
        "        if await self._has_ended(lender) and not lender.id:\n",
        tests=_UNIT,
        why="A gateway has to sleep in a deletion while another one makes the next, and its loans have to end.",
    ),
    Planted(
        "failed_lender_stays",
        "the record of a lender stays when its bucket was not deleted",
        450,
        _PLAY,
        _LENDERS,
        "                return lender  # the deletion goes on\n"
        "            await self._records.step(lender, msgspec.structs.replace(lender, state=DELETED))\n"
        "            return None\n",
        "                return lender  # the deletion goes on\n            return lender\n",
    ),
)
