"""Bugs in how the system partition leaves a seed disk that is out. Plain data: imports nothing of the program."""

from __future__ import annotations

from tests.sim.planted import Planted

_ACCEPTING = "storaged/node/accepting.py"
_DUTY = "storaged/node/system_sparing.py"
_PRESIGNED = "storaged/cluster/presigned.py"
_SUCCESSION = "storaged/cluster/succession.py"
_SYSTEM_MOVE = "storaged/node/system_move.py"
_VOTES = "storaged/cluster/votes.py"

SPARING_BUGS = (
    Planted(
        "sparing_without_room",
        "repair writes anew what has no room on the disks that are left",
        1,
        path="storaged/maintain/spare_watch.py",
        old="        return self._shortage.short_bytes > 0\n",
        new="        return False\n",
        tests="tests/integration/test_sparing_room.py",
        why="disks of plays have no bound",
    ),
    Planted(
        "divided_under_a_fresh_salt",
        "two gateways that code the same body write other fragments under the same ids",
        1,
        path="storaged/objects/write/divide.py",
        old="    new = NewPart(bucket, name, opened.body_dek, part.data_id, part.number, salt)\n",
        new="    new = NewPart(bucket, name, opened.body_dek, part.data_id, part.number)\n",
        tests="tests/integration/test_operators.py::test_two_gateways_code_the_same_bytes_and_one_that_stops_halfway_spoils_nothing",
        why="no play has bodies from before a layout that trusts no operator alone",
    ),
    Planted(
        "partitions_spared_without_room",
        "partitions leave a disk that is out for one without room",
        1,
        path="storaged/maintain/partition_mover.py",
        old="        short = self._short.keys() - outside if self._is_spared(state) else frozenset[str]()\n",
        new="        short = frozenset[str]()\n",
        tests="tests/integration/test_partition_mover.py",
        why="disks of plays have no bound",
    ),
    Planted(
        "presigned_without_votes",
        "a node accepts a layout that was signed beforehand though nobody voted",
        60,
        "sparing system",
        _ACCEPTING,
        "        if layout.if_out:\n",
        "        if False:\n",
    ),
    Planted(
        "presigned_by_old_votes",
        "votes of an earlier loss of the disk count again",
        1,
        path=_VOTES,
        old="    if oldest < since:\n",
        new="    if False:\n",
        tests="tests/integration/test_presigned_apply.py",
        why="a gateway would have to lie with votes of a disk that was a seed disk before, and is one again",
    ),
    Planted(
        "presigned_end_is_missing",
        "the exchange that was signed beforehand is not ended",
        20,
        "sparing system",
        _DUTY,
        "        return None if self.reason or step is None else layout_after(signed, step)\n",
        "        return None\n",
    ),
    Planted(
        "presigned_is_left_decided",
        "a layout that was decided is not finished when the disk is back",
        1,
        path=_DUTY,
        old="            if self._looks % REGISTER_LOOKS:\n",
        new="            if True:\n",
        tests="tests/unit/test_presigned.py",
        why="the gateways have to die, and the disk to come back, within a moment",
    ),
    Planted(
        "presigned_follows_anything",
        "what was signed beforehand follows each layout, not one by its hash",
        1,
        path=_PRESIGNED,
        old='        "predecessor": hashlib.sha256(payload).digest(),\n',
        new='        "predecessor": b"",\n',
        tests="tests/unit/test_presigned.py",
        why="the rules of the history refuse to sign it",
    ),
    Planted(
        "spare_that_is_out_is_waited_for",
        "the exchange does not end while the disk that comes is out, too",
        1,
        path=_SYSTEM_MOVE,
        old="        if state.comes not in {*answered, *self._layouts.partitions.out.disks}:\n",
        new="        if state.comes not in answered:\n",
        tests="tests/unit/test_system_move.py",
        why="two disks of three racks have to be out in the middle of an exchange",
    ),
    Planted(
        "spare_that_is_away",
        "a gateway gives the place of a seed disk to one that does not answer",
        1,
        path=_DUTY,
        old="        usable = {disk.id for disk in layout.disks if disk.id not in out and ports.answers(disk.id)}\n",
        new="        usable = {disk.id for disk in layout.disks}\n",
        tests="tests/unit/test_presigned.py",
        why="it comes back, or goes out, too, and is exchanged in its turn: that takes longer, and no run waits for it",
    ),
    Planted(
        "presigned_changes_more",
        "a layout that was signed beforehand changes more than a seed disk",
        1,
        path=_SUCCESSION,
        old="    if replace(before, **own, if_out=after.if_out) != after:\n",
        new="    if False:\n",
        tests="tests/unit/test_presigned.py",
        why="the program signs no such layout",
    ),
    Planted(
        "presigned_is_not_verified",
        "what follows a layout is taken from a peer without a look at the signatures",
        1,
        path="storaged/cluster/layouts.py",
        old="        return replace(signed, following=genuine(signed, self._administration), votes=())\n",
        new="        return replace(signed, votes=())\n",
        tests="tests/unit/test_presigned.py",
        why="a layout with a wrong signature is refused when it is used: what is lost is the one that was genuine",
    ),
)
