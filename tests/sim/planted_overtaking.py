"""Bugs in what becomes of a create that lies above other values. The play ``stale`` notices some of them.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_OVERTAKING = "storaged/meta/consensus/overtaking.py"
_ADDING = "storaged/objects/code/adding.py"
_UNIT = "tests/unit/test_overtaking.py"
_RARE = "A create has to be chosen beside a change that was interrupted, and be found at one of its replicas alone."

OVERTAKING_BUGS = (
    Planted(
        "chosen_create_dropped",
        "a create is dropped above a history although the silent replica may have it",
        500,
        "stale",
        _OVERTAKING,
        "        return quorum.may_have_chosen(has)\n",
        "        return False\n",
    ),
    Planted(
        "applied_below_a_carried_create",
        "a create that was carried on is applied to what lay below it",
        0,
        path=_OVERTAKING,
        old="        if not taken_by_create(newest, value):\n            return None\n",
        new="",
        tests=f"{_UNIT}::test_nothing_is_applied_to_what_lies_below_a_create_that_was_carried_on",
        why=_RARE,
    ),
    Planted(
        "applied_to_the_highest_sequence",
        "a create is applied to the value with the highest sequence below, though that may not follow what was chosen",
        0,
        path=_OVERTAKING,
        old="        return max(below, key=lambda pair: pair[0])[1] if below else None\n",
        new="        return max(below, key=lambda pair: pair[1].sequence)[1] if below else None\n",
        tests=f"{_UNIT}::test_the_newest_value_below_is_the_one_that_counts",
        why="Two values below a create have to be without a common successor, at three replicas.",
    ),
    Planted(
        "sequences_used_up",
        "a replica that lies uses up the sequences of a register whose other replicas differ",
        0,
        path="storaged/meta/consensus/proposer.py",
        old="        if reply.value is not None and reply.value.sequence > HONEST_SEQUENCE_MAX:\n",
        new="        if False:\n",
        tests=f"{_UNIT}::test_a_replica_that_lies_uses_up_no_sequences_beside_one_that_has_missed_a_write",
        why="Liars of the plays report sequences that can be.",
    ),
    Planted(
        "create_is_a_round",
        "the collector takes a create that a majority has for the round that it waits for",
        0,
        path="storaged/meta/consensus/looks.py",
        old="        if second.quorum.met(moved) and not everywhere and not taken_by_create(*found):\n",
        new="        if second.quorum.met(moved) and not everywhere:\n",
        tests=f"{_UNIT}::test_a_create_that_a_majority_has_taken_is_no_round",
        why=_RARE,
    ),
    Planted(
        "over_beside_a_create",
        "a change counts as lost, and is made again, because a create was chosen that may still be applied to it",
        0,
        path="storaged/meta/consensus/register.py",
        old="        if settled and not taken_by_create(ballot, found):\n",
        new="        if settled:\n",
        tests=f"{_UNIT}::test_an_attempt_is_not_over_because_a_create_was_chosen_beside_it",
        why=_RARE + " About one of 500 seeds of `stale` did that.",
    ),
    Planted(
        "events_are_no_history",
        "a create replaces a record that has pending events or loans, and no versions",
        0,
        path=_ADDING,
        old="        if record.history is None:\n",
        new="        if record.history is None or record.history.is_unversioned:\n",
        tests=f"{_UNIT}::test_events_loans_and_arrivals_of_a_key_without_versioning_stay",
        why="The plays with events have no gateway that does not know of them.",
    ),
    Planted(
        "create_takes_a_locked_version",
        "a create takes the place of a null version that is locked",
        0,
        path=_ADDING,
        old="        draft = Draft(record, Shelf(), _ROOMY)\n",
        new="        draft = Draft(record, Shelf(), _ROOMY, lambda _entry: None)\n",
        tests=f"{_UNIT}::test_a_locked_null_version_is_not_replaced",
        why="No play locks null versions that a gateway without the configuration replaces.",
    ),
)
