"""Bugs in renames. The play ``renaming`` notices them.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_DEPARTURES = "storaged/objects/write/departures.py"
_HISTORY = "storaged/objects/code/history.py"
_PLAY = "renaming"
_UNIT = "tests/unit/test_objects_rename.py"

RENAMING_BUGS = (
    Planted(
        "departure_not_looked_at",
        "a rename does not look at its departure between promise and accept",
        50,
        _PLAY,
        _DEPARTURES,
        "    if found is None or found.id != departure_id or found.ending:\n        raise Changed\n",
        "    assert found is None or found\n",
    ),
    Planted(
        "departure_mark_not_looked_at",
        "a rename is content with a departure that is marked",
        100,
        _PLAY,
        _DEPARTURES,
        "    if found is None or found.id != departure_id or found.ending:\n",
        "    if found is None or found.id != departure_id:\n",
    ),
    Planted(
        "departure_ended_without_a_round",
        "whether a version has arrived is read, and no promise is ended",
        750,
        _PLAY,
        _DEPARTURES,
        "        value = await plane.registers.settle(object_name(bucket.id, bucket.shard_numbers, key))\n",
        "        value = (await plane.registers.read(object_name(bucket.id, bucket.shard_numbers, key))).value\n",
    ),
    Planted(
        "departed_twice",
        "a second rename of a version takes the place of the first",
        50,
        _PLAY,
        _DEPARTURES,
        "        if draft.departure is not None and draft.departure.id != departure.id:\n",
        "        if draft.departure is not None and draft.departure.id == departure.id:\n",
    ),
    Planted(
        "departed_unseen",
        "another version departs than was read",
        300,
        _PLAY,
        _DEPARTURES,
        "        if not seen.is_current(draft):\n            raise Changed\n",
        "        assert seen\n",
    ),
    Planted(
        "finished_without_a_departure",
        "the old key's version goes, whether or not it departs",
        200,
        _PLAY,
        _DEPARTURES,
        "        if not found:\n            return False\n",
        "        found = True\n",
    ),
    Planted(
        "departure_ended_before_it_arrived",
        "a version goes with a departure that is ended, also when the new key does not have it",
        20,
        _PLAY,
        _DEPARTURES,
        "        arrived = has_arrived(value, departure_id)\n",
        "        arrived = value is None or bool(value)\n",
        fast=True,
    ),
    Planted(
        "departure_outlives_its_version",
        "the version that replaces one that departs departs too",
        100,
        _PLAY,
        _HISTORY,
        "            self._null_at, self._copied, self.departure = -1, None, None\n",
        "            self._null_at, self._copied = -1, None\n",
    ),
    Planted(
        "departure_ended_under_another_mark",
        "a departure goes, whoever has marked it",
        0,
        path=_DEPARTURES,
        old="departure.id == departure_id and mark in (None, departure.ending)\n",
        new="departure.id == departure_id\n",
        tests=f"{_UNIT}::test_a_departure_that_another_request_has_marked_since_is_not_ended",
        why="Two requests have to end one departure at once, and its version has to arrive between their rounds.",
    ),
    Planted(
        "arrived_as_data_alone",
        "a version that borrows its data has not arrived",
        0,
        path="storaged/objects/code/lending.py",
        old="    return uses(value, departure_id) or departure_id in made\n",
        new="    return departure_id in made\n",
        tests=f"{_UNIT}::test_a_rename_that_died_after_it_arrived_is_finished_by_the_walk",
        why="In the play all versions have the id of their rename.",
    ),
    Planted(
        "changed_while_it_departs",
        "the metadata of a version changes while it departs, and is not that of what has arrived",
        0,
        path="storaged/objects/write/delete.py",
        old="        if draft.departure is not None:\n            raise Departing(name, draft.departure)\n",
        new="        assert draft\n",
        tests=f"{_UNIT}::test_a_rename_waits_for_another_and_ends_one_that_is_old",
        why="Versions of the play have no metadata.",
    ),
    Planted(
        "one_part_of_a_loan_refers",
        "of what is lent only the first part is referred to",
        50,
        _PLAY,
        "storaged/objects/write/references.py",
        "for loan in sharing_of(decode_object(record)).loans for part in loan.parts}\n",
        "for loan in sharing_of(decode_object(record)).loans for part in [loan.part]}\n",
    ),
    Planted(
        "one_part_of_a_loan_moves",
        "a move of blocks changes the places of a loan's first part alone",
        300,
        _PLAY,
        "storaged/maintain/moved_record.py",
        "    return msgspec.structs.replace(loan, part=first, more=tuple(more))\n",
        "    return msgspec.structs.replace(loan, part=first, more=loan.more if more else ())\n",
        tests=f"{_UNIT}::test_a_move_of_any_part_is_one_of_the_loan",
        why="A block of the second part of an object that is lent has to move.",
    ),
    Planted(
        "parts_of_an_upload_count_as_replaced",
        "the lent parts of an upload are given back as data that nothing can bring back",
        0,
        path="storaged/objects/write/loans.py",
        old='unused, origin = loan.parts, b"" if loan.uploaded or draft.layers()[1] else REPLACED\n',
        new='unused, origin = loan.parts, b"" if draft.layers()[1] else REPLACED\n',
        tests=f"{_UNIT}::test_all_parts_of_an_object_are_lent_and_go_together",
        why="Objects of the play are stored by PUTs.",
    ),
)
