"""Bugs in fences that lend. Plain data: imports nothing of the program."""

from __future__ import annotations

from tests.sim.planted import Planted

_FENCES = "storaged/meta/acceptor/fences.py"
_ACCEPTOR = "storaged/meta/consensus/acceptor.py"
_ROUNDS = "storaged/meta/consensus/rounds.py"
_MOVES = "storaged/meta/proposer/moving.py"
_PASSES = "    return fence.nonce == nonce and (settles or fence.lends)\n"
_CAN_PROMISE = '        """No quorum can promise, for fences that lend alone."""\n'

FENCE_BUGS = (
    Planted("lends_by_nonce", "without lends_by_nonce", 100, "moving", rule="lends_by_nonce", fast=True),
    Planted(
        "any_nonce_passes",
        "a fence that lends takes settling rounds with any nonce, and changes too",
        0,
        path=_ACCEPTOR,
        old=_PASSES,
        new="    return fence.lends or (fence.nonce == nonce and settles)\n",
        tests="tests/unit/test_lending_fences.py",
    ),
    Planted(
        "final_fence_lends",
        "a final fence takes changes with its nonce",
        100,
        "moving",
        _ACCEPTOR,
        _PASSES,
        "    return fence.nonce == nonce and (settles or fence.lends or fence.final)\n",
    ),
    Planted(
        "lends_after_its_end",
        "a fence that was final lends again when it is asked to",
        100,
        "moving",
        _FENCES,
        "        final = request.final or (present is not None and present.final)\n",
        "        final = request.final or (present is not None and present.final and not request.lends)\n",
    ),
    Planted(
        "late_fence_ends_lending",
        "a plain fence that comes late takes the place of the one that lends",
        100,
        "moving",
        _FENCES,
        "        lent = present is not None and present.lends and present.nonce == nonce\n",
        "        lent = False\n",
        fast=True,
    ),
    Planted(
        "lending_not_kept",
        "that a fence lends is forgotten at a restart",
        0,
        path="storaged/meta/storage/batch.py",
        old="    return FINAL if fence.final else LENDS if fence.lends else 0\n",
        new="    return FINAL if fence.final else 0\n",
        tests="tests/unit/test_meta_store.py",
        why="most runs of the play are not on files",
    ),
    Planted(
        "lending_not_copied",
        "the disk that comes to a partition gets a plain fence in place of one that lends",
        100,
        "moving",
        _MOVES,
        'return ScopeFence(scope, lends, False, lifted if lifted < lends else b"", True)',
        'return ScopeFence(scope, lends, False, lifted if lifted < lends else b"")',
        fast=True,
    ),
    Planted(
        "lent_rows_not_moved",
        "a partition with rows that differ behind a fence that lends waits until that has ended",
        300,
        "moving",
        _MOVES,
        "            perhaps |= {its.scope: its.nonce for its in said if its.lends}\n",
        "",
    ),
    Planted(
        "one_says_that_it_was_lifted",
        "the disk that comes gets no fence where one replica of two says that the one that lends was lifted",
        300,
        "moving",
        _MOVES,
        'return ScopeFence(scope, lends, False, lifted if lifted < lends else b"", True)',
        'return ScopeFence(scope, lends if lends > lifted else b"", False, lifted, lends > lifted)',
        tests="tests/unit/test_partition_moves.py",
    ),
    Planted(
        "one_lifts_it_elsewhere",
        "a disk that comes to another partition loses its fence that lends where one replica of two says so",
        1500,
        "moving",
        "storaged/meta/acceptor/handover.py",
        "            if doubted and present is not None and present.lends:\n",
        "            if False:\n",
        tests="tests/unit/test_partition_moves.py",
        why="a replica that lies, one that is away, and a disk that has the fence of another partition have to meet",
    ),
    Planted(
        "one_keeps_it_from_being_set",
        "a disk takes no fence of a nonce that one replica of two has called lifted, of another partition",
        0,
        path="storaged/meta/acceptor/handover.py",
        old="            if scope.lifted and (present is not None or not doubted):\n",
        new="            if scope.lifted:\n",
        tests="tests/unit/test_partition_moves.py",
    ),
    Planted(
        "one_says_that_it_lends",
        "a refused change is told to look for the nonce where one replica says that its fence lends",
        0,
        path=_ROUNDS,
        old=_CAN_PROMISE + "        return self._quorum.lost(self._lenders)\n",
        new=_CAN_PROMISE + "        return bool(self._lenders)\n",
        tests="tests/unit/test_lending_fences.py",
    ),
    Planted(
        "one_keeps_from_the_nonce",
        "a refused change is not told to look for the nonce where one replica says that its fence does not lend",
        300,
        "moving",
        _ROUNDS,
        "(self._doubted or (self._lenders and not self.fence_lends))",
        "self._doubted",
    ),
    Planted(
        "lenders_are_being_deleted",
        "storage nodes take a bucket whose fence lends for one that is being deleted",
        0,
        path="storaged/maintain/disuse.py",
        old="        if look.quorum.met(look.fenced - look.lends):\n",
        new="        if look.quorum.met(look.fenced):\n",
        tests="tests/unit/test_judging_lenders.py",
    ),
    Planted(
        "lenders_are_living",
        "storage nodes take a bucket whose fence lends at one replica for a living one",
        0,
        path="storaged/maintain/disuse.py",
        old="        if look.quorum.met(look.fenced - look.lends):\n",
        new="        if look.quorum.met(look.fenced) and not look.lends:\n",
        tests="tests/unit/test_judging_lenders.py",
    ),
    Planted(
        "rows_of_deleted_buckets_count",
        "the data of a deleted bucket stays while most replicas have rows from before",
        60,
        "lenders moves",
        "storaged/maintain/disuse.py",
        "            if for_ever and await self.is_gone(owner.scope):\n",
        "            empty = [disk for disk, held in look.held.items() if not (held.value and held.value.visibility)]\n"
        "            if for_ever and look.quorum.met(empty) and await self.is_gone(owner.scope):\n",
        first=390,  # rare: 406 shows it
    ),
    Planted(
        "pages_of_deleted_buckets_count",
        "the pages of a deleted bucket stay at replicas that have rows from before",
        30,
        "lenders moves",
        "storaged/maintain/manifest_gc.py",
        " or await self._may_be_gone(owner.scope):\n",
        ":\n",
        fast=True,
    ),
)
