"""Bugs in how layouts are decided and how the system partition moves. Plain data: imports nothing of the program."""

from __future__ import annotations

from tests.sim.planted import Planted

_ACCEPTING = "storaged/node/accepting.py"
_APPLYING = "storaged/node/applying.py"
_BOOK = "storaged/cluster/layouts.py"
_CERTIFICATES = "storaged/cluster/certificates.py"
_PARTITIONS = "storaged/cluster/partitions.py"
_SUCCESSION = "storaged/cluster/succession.py"
_SYSTEM_MOVE = "storaged/node/system_move.py"

LAYOUT_BUGS = (
    Planted(
        "layout_without_certificate",
        "a layout that moves data is used for its signature alone",
        50,
        "layouts",
        _BOOK,
        "            verify_certificate(signed, layout, before, self._authority)\n",
        "            pass\n",
        fast=True,
    ),
    Planted(
        "certificate_of_one",
        "the acceptance of one node is enough",
        200,
        "layouts",
        _CERTIFICATES,
        "    return is_quorum(sets, before.seeds_lost, accepted)\n",
        "    return any(seed in accepted for seed in before.seeds)\n",
    ),
    Planted(
        "certificate_of_the_coming_set",
        "while the system partition moves a majority of the coming set alone accepts layouts",
        20,
        "layouts",
        _CERTIFICATES,
        "    sets = tuple(seeds for seeds in (before.seeds, before.seeds_next) if seeds or seeds is before.seeds)\n",
        "    sets = (before.seeds_next or before.seeds,)\n",
    ),
    Planted(
        "accepted_undecided",
        "a node accepts a layout that the register does not hold",
        365,
        "layouts",
        _ACCEPTING,
        "        if decided is None or decided.payload != signed.payload:\n",
        "        if decided is None:\n",
    ),
    Planted(
        "accepted_twice",
        "a node accepts two layouts after one generation",
        100,
        "layouts",
        _ACCEPTING,
        "promise.generation >= generation and promise.layout != signed.hash",
        "promise.generation > generation and promise.layout != signed.hash",
        first=25,
    ),
    Planted(
        "decided_is_replaced",
        "the register takes another layout though the one that it holds is decided and not yet in force",
        270,
        "layouts",
        _APPLYING,
        "held is None or held.hash != layout.predecessor or is_pending(held, self._layouts)",
        "held is None",
    ),
    Planted(
        "seeds_settled_unasked",
        "the exchange of a seed disk ends before the new one has everything",
        75,
        "layouts",
        _ACCEPTING,
        "(reason := await self.may_settle(layout))",
        "(reason := '')",
    ),
    Planted(
        "seeds_differ",
        "the exchange of a seed disk ends although rows differ",
        75,
        "layouts",
        _SYSTEM_MOVE,
        "    raise ServiceUnavailable(f\"the seed disks differ in {name.key.decode('utf-8', 'replace')[:80]!r};"
        ' gateways copy")\n',
        "    return\n",
    ),
    Planted(
        "new_seed_unasked",
        "the exchange of a seed disk ends although the new one does not answer",
        1,
        path=_SYSTEM_MOVE,
        old="        if state.comes not in {*answered, *self._layouts.partitions.out.disks}:\n",
        new="        if False:\n",
        tests="tests/unit/test_system_move.py",
        why="a majority of the coming set without the new disk has everything then: no quorum misses it",
    ),
    Planted(
        "no_fence_at_the_old_seeds",
        "nodes compare the rows of seed disks that still take values of the step before",
        1,
        path=_SYSTEM_MOVE,
        old="                await replica.fence_epoch(EpochFence(disk, state.epoch, SYSTEM_PARTITION))\n",
        new="                pass\n",
        tests="tests/unit/test_system_move.py",
        why="the change of the register that decides the end is of the joint step: a majority refuses earlier ones",
    ),
    Planted(
        "seeds_without_step",
        "ballots of the system partition do not name its step",
        450,
        "layouts",
        _PARTITIONS,
        "        epoch = epoch_of(current.seeds_step, current.epoch)\n",
        "        epoch = epoch_of(0, current.epoch)\n",
    ),
    Planted(
        "three_sets",
        "a joint state is followed by another one",
        1,
        path=_PARTITIONS,
        old="        if after.present not in before.sets or after.coming:\n",
        new="        if after.present not in before.sets:\n",
        tests="tests/property/test_partitions.py",
        why="the mover asks for no such step, and gateways are trusted to check: no seed makes one",
    ),
    Planted(
        "three_sets_of_seeds",
        "a layout that moves the system partition is followed by another one before that has ended",
        1,
        path=_SUCCESSION,
        old="        if after.seeds not in (before.seeds, before.seeds_next) or after.seeds_next:\n",
        new="        if after.seeds not in (before.seeds, before.seeds_next):\n",
        tests="tests/unit/test_layout_history.py",
        why="administrators of the play sign no such layout",
    ),
)
