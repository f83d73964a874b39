"""Each part of the collector's rule, broken. ``collecting`` notices.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_DISUSE = "storaged/maintain/disuse.py"
_GC = "storaged/maintain/gc.py"
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
    ),
    Planted(
        "looked_before_condemned",
        "data is condemned after the looks",
        200,
        _PLAY,
        _GC,
        "            proofs = await self._judge.prove(list(by_owner))\n",
        "            proofs = await self._judge.prove(list(by_owner))\n            self._store.condemn(data_ids)\n",
        open=True,
    ),
    Planted(
        "orphans_by_a_majority",
        "data that may be in a create does not wait for every replica",
        400,
        _PLAY,
        _GC,
        "elif proof.gone or part or (proof.everywhere and not proof.uploads):",
        "elif proof.gone or part or not proof.uploads:",
        open=True,
    ),
    Planted(
        "all_data_is_replaced",
        "a settled read suffices for data of which nothing is known",
        100,
        _PLAY,
        _GC,
        "elif garbage.entry.origin == REPLACED:",
        "elif garbage.entry.origin in (b'', REPLACED):",
    ),
    Planted(
        "references_not_looked_at",
        "what the round's record refers to goes too",
        40,
        _PLAY,
        _GC,
        "        elif any(entry.data_id == garbage.data_id for entry in proof.entries):\n"
        "            await self._delete_unclaimed(garbage, proof)\n",
        "",
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
        open=True,
    ),
    Planted(
        "synced_before_the_promise",
        "a writer sees its fragments beside the prepare, not after the promise",
        200,
        _PLAY,
        "tests/sim/collecting.py",
        "        await promised.wait()\n        durable: set",
        "        durable: set",
        open=True,
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
)
