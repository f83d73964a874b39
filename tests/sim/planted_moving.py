"""Bugs in what moves partitions, and in what counts two sets. Plain data: imports nothing of the program."""

from __future__ import annotations

from tests.sim.planted import Planted

_EPOCHS = "storaged/meta/acceptor/epochs.py"
_STATE = "storaged/meta/consensus/acceptor.py"
_MOVER = "storaged/maintain/partition_mover.py"
_MOVES = "storaged/meta/proposer/moving.py"
_VIEWS = "storaged/meta/views.py"
_HANDOVER = "storaged/meta/acceptor/handover.py"
_SPARING = "storaged/cluster/sparing.py"
_MAP = "storaged/cluster/partition_map.py"

MOVING_BUGS = (
    Planted(
        "one_set_counted",
        "while there are two sets a quorum of the coming one alone decides",
        200,
        "moving",
        _VIEWS,
        "View.of(state.epoch, *state.sets, lost=state.lost)",
        "View.of(state.epoch, state.coming or state.present)",
        fast=True,
    ),
    Planted(
        "present_set_counted",
        "while there are two sets a quorum of the present one alone decides",
        300,
        "moving",
        _VIEWS,
        "View.of(state.epoch, *state.sets, lost=state.lost)",
        "View.of(state.epoch, state.present)",
    ),
    Planted(
        "settled_before_whole",
        "a joint state ends in the coming set before that has everything",
        200,
        "moving",
        _MOVER,
        "            whole = await self._bring_up(state)\n",
        "            whole = True\n",
        fast=True,
    ),
    Planted(
        "no_fence_at_the_old",
        "replicas say that they refuse the steps before, and do not",
        300,
        "moving",
        _EPOCHS,
        "        await self.raise_at(partition, epoch)\n        return max",
        "        return max",
    ),
    Planted(
        "unfenced_disks_counted",
        "what disks say counts that still take values of the step before",
        600,
        "moving",
        _MOVER,
        "        answered = fenced - found.away\n",
        "        answered = frozenset(state.disks) - found.away\n",
        open=True,
        why="a disk has to miss the fence and answer the comparison while the third one is away",
    ),
    Planted(
        "copied_from_one",
        "the mover asks one replica which shards there are",
        1500,
        "moving",
        _MOVES,
        "        found = await self._ask(disks, partial(_ranges_of, state.partition),"
        " partial(_are_ranges, state.partition))\n"
        '        _check(Quorum(state.voters[0]), found, state, "say which shards they have")\n',
        "        found = await self._ask(disks[:1], partial(_ranges_of, state.partition),"
        " partial(_are_ranges, state.partition))\n",
    ),
    Planted(
        "retired_rows_rejoin",
        "a disk counts as whole when its partition has moved before",
        300,
        "moving",
        _MOVER,
        "            whole = await self._bring_up(state)\n",
        "            whole = state.step > 2 or await self._bring_up(state)\n",
    ),
    Planted(
        "lifted_not_copied",
        "the replica that comes is not told which fences were lifted",
        1,
        path=_HANDOVER,
        old="            if scope.lifted:\n",
        new="            if False:\n",
        tests="tests/unit/test_partition_moves.py",
    ),
    Planted(
        "fences_not_copied",
        "the replica that comes gets no fence of a bucket",
        300,
        "moving",
        _HANDOVER,
        "            if scope.nonce:\n",
        "            if False:\n",
        fast=True,
    ),
    Planted(
        "fences_by_step",
        "without fences_by_step",
        300,
        "moving",
        rule="fences_by_step",
    ),
    Planted(
        "steps_durable",
        "without steps_durable",
        600,
        "moving",
        rule="steps_durable",
        open=True,
        why="a node has to die between its first promise in a step and the fence; tests/unit/test_replica.py",
    ),
    Planted(
        "promised_before_the_step_is_durable",
        "a ballot of a later step is promised before that step is on disk",
        1,
        path=_EPOCHS,
        old="        return step_of(epoch) > step_of(durable) and self._rules.steps_durable\n",
        new="        return False\n",
        tests="tests/unit/test_replica.py",
    ),
    Planted(
        "epoch_not_durable",
        "the step of a partition is forgotten with the process",
        1,
        path=_EPOCHS,
        old="        written = state.epochs[partition]  # never lower than one that is already on its way\n",
        new="        durable[partition] = fence\n        return\n        written = 0\n",
        tests="tests/unit/test_replica.py",
    ),
    Planted(
        "first_set_may_have_chosen",
        "without first_set_may_have_chosen",
        600,
        "moving",
        rule="first_set_may_have_chosen",
        open=True,
        why="a copy has to be lost where the first set has chosen; tests/unit/test_joint_quorums.py",
    ),
    Planted(
        "joint_quorum_alone_chooses",
        "what the first set alone has chosen does not count while there are two",
        1,
        path="storaged/meta/consensus/copies.py",
        old="quorum.may_have_chosen(may_hold) if rules.first_set_may_have_chosen else quorum.met(may_hold)",
        new="quorum.met(may_hold)",
        tests="tests/unit/test_joint_quorums.py",
    ),
    Planted(
        "no_create_while_joint",
        "without no_create_while_joint",
        600,
        "collecting moves",
        rule="no_create_while_joint",
        open=True,
    ),
    Planted(
        "common_promises_shared",
        "what is promised in one step is promised in all steps",
        200,
        "moving",
        _STATE,
        "        if epoch < FIRST_STEP:\n            return self.common\n"
        "        found = self._steps.get(epoch >> STEP_SHIFT)\n"
        "        return ZERO_BALLOT if found is None else found.common\n",
        "        return max(step.common for step in self._steps.values())\n",
        fast=True,
    ),
    Planted(
        "out_without_a_majority",
        "the vote of one node puts a disk out",
        100,
        "moving",
        _SPARING,
        "    if len(said) < majority:\n        return None\n",
        "    if not said:\n        return None\n    majority = 1\n",
        fast=True,
    ),
    Planted(
        "returned_rows_rejoin",
        "a disk that was out and comes back counts as whole: its rows of before count again",
        300,
        "moving",
        _MOVER,
        "            whole = await self._bring_up(state)\n",
        "            whole = self._ports.layouts.partitions.out.number > 1 or await self._bring_up(state)\n",
    ),
    Planted(
        "rows_are_where_they_should_be",
        "partitions that never moved are where the layout without the disks that are out would have them",
        1,
        path=_MAP,
        old="            base = current\n",
        new="            base = self.target(current)\n",
        tests="tests/unit/test_sparing.py",
    ),
    Planted(
        "out_without_a_vote_on_time",
        "a disk is out as soon as a majority sees it away",
        1,
        path=_SPARING,
        old="return bool(self.state) and self.for_s >= for_s",
        new="return bool(self.state)",
        tests="tests/unit/test_sparing.py",
    ),
    Planted(
        "votes_not_verified",
        "votes count whoever signed them",
        1,
        path="storaged/cluster/votes.py",
        old='    if "storage" not in confirmed_roles',
        new='    if False and "storage" not in confirmed_roles',
        tests="tests/unit/test_sparing.py",
    ),
)
