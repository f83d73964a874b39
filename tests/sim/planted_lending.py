"""Bugs in lending data to other keys. The play ``lending`` notices them.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_LOANS = "storaged/objects/write/loans.py"
_COPY = "storaged/objects/write/lent_copy.py"
_HISTORY = "storaged/objects/code/history.py"
_REFERENCES = "storaged/objects/write/references.py"
_MOVED = "storaged/maintain/moved_record.py"
_LOOKS = "storaged/meta/consensus/looks.py"
_PLAY = "lending"
_UNIT = "tests/unit/test_objects_loans.py"
_UNIT_MOVED = "tests/unit/test_moved_record.py"
_CREATES = "tests/unit/test_loans_and_creates.py"

LENDING_BUGS = (
    Planted(
        "lent_after_the_accept",
        "the borrower is added when the borrowing version is accepted",
        100,
        _PLAY,
        _LOANS,
        "    await add_borrower(plane, bucket, wanted)\n"
        "    try:\n"
        "        await check_everywhere(plane, wanted.owner, borrower_id)\n"
        "        return await commit(lambda: check_lent(plane, wanted.owner, borrower_id))\n",
        "    async def nothing() -> None: ...\n\n"
        "    try:\n"
        "        done = await commit(nothing)\n"
        "        await add_borrower(plane, bucket, wanted)\n"
        "        return done\n",
        fast=True,
    ),
    Planted(
        "loan_not_looked_at",
        "a copy does not look at its borrower between promise and accept",
        100,
        _PLAY,
        _LOANS,
        "    if found is None or found[1].ending:\n        raise NotLent\n",
        "    assert found is None or found\n",
    ),
    Planted(
        "mark_not_looked_at",
        "a copy is content with a borrower that is marked",
        310,
        _PLAY,
        _LOANS,
        "    if found is None or found[1].ending:\n",
        "    if found is None:\n",
    ),
    Planted(
        "ended_without_a_round",
        "whether a version uses a borrower is read, and no promise is ended",
        250,
        _PLAY,
        _LOANS,
        "    used = await _is_used(plane, name_of_borrower(bucket, borrower), borrower_id, settled=True)\n",
        "    used = await _is_used(plane, name_of_borrower(bucket, borrower), borrower_id)\n",
    ),
    Planted(
        "ended_under_another_mark",
        "a borrower or its mark is removed although another request has marked it since",
        1000,
        _PLAY,
        _LOANS,
        "                if borrower.id == borrower_id and borrower.ending == mark:\n",
        "                if borrower.id == borrower_id:\n",
        tests=f"{_UNIT}::test_a_loan_that_another_request_has_marked_since_is_not_ended_nor_unmarked",
        why="Two requests have to look at one borrower at once, and its version has to go between their rounds.",
    ),
    Planted(
        "lent_again",
        "data is lent that its record has no more",
        150,
        _PLAY,
        _LOANS,
        "def _loan_of(draft: Draft, wanted: Wanted) -> Loan:\n"
        '    """Of the version that has this data, without borrowers."""\n'
        "    entry = draft.find(wanted.named) if wanted.named is not None else draft.newest\n"
        "    if entry is None or not wanted.are_parts_of(entry.version):\n        raise NotLent\n"
        "    version = entry.version\n",
        "_SEEN, _decoded = [], decode_record\n\n"
        "def decode_record(value):\n"  # all that a look at loans has read may be lent ever after
        "    _SEEN.extend(_decoded(value).versions)\n"
        "    return _decoded(value)\n\n"
        "def _loan_of(draft, wanted):\n"
        "    _SEEN.extend(entry.version for entry in draft.inline)\n"
        "    version = next((one for one in _SEEN if wanted.are_parts_of(one)), None)\n"
        "    if version is None:\n        raise NotLent\n",
    ),
    Planted(
        "lent_beside_an_empty_replica",
        "data is lent while a late create may overwrite its record",
        1000,
        _PLAY,
        _LOANS,
        "        await check_everywhere(plane, wanted.owner, borrower_id)\n",
        "",
        tests=_CREATES,
        why="A replica has to miss two changes in a row, take a create, and be one of two in the next round.",
    ),
    Planted(
        "lent_by_any_row",
        "data is lent where every replica holds some row, not the loan",
        0,
        path=_LOOKS,
        old="    if any(held.value is None or not usable(held.value) for held in look.held.values()):\n",
        new="    if any(held.value is None for held in look.held.values()):\n",
        tests=f"{_CREATES}::test_no_data_is_lent_below_a_create_that_one_replica_has",
    ),
    Planted(
        "lent_by_an_earlier_proposal",
        "a replica that has the loan by an earlier proposal of the change counts, too",
        0,
        path=_LOOKS,
        old="    return not look.quorum.met([disk for disk, held in look.held.items() if held.ballot > lowest])\n",
        new="    return bool(lowest)\n",
        tests="tests/unit/test_looks.py::test_a_chosen_value_is_accepted_everywhere_when_no_replica_may_be_below_it",
    ),
    Planted(
        "loans_refer_to_nothing",
        "what is lent counts as unused when no version of its own key has it",
        50,
        _PLAY,
        _REFERENCES,
        "    loans = _loans_in(record) if table == Table.OBJECT else ()\n",
        "    loans: tuple[Loan, ...] = ()\n",
        fast=True,
    ),
    Planted(
        "moved_for_the_version_alone",
        "a move of blocks changes the version's places, and not the loan's",
        250,
        _PLAY,
        _MOVED,
        "        draft.loans = tuple(loans)\n",
        "",
    ),
    Planted(
        "moved_beside_an_unread_page",
        "a move changes a loan's places while the page with its version can't be read",
        1000,
        _PLAY,
        _MOVED,
        "    if left if unread else left - applied_to_loans:\n",
        "    if left - applied_to_loans:\n",
        tests=f"{_UNIT}::test_what_is_lent_does_not_move_while_the_page_of_its_version_cannot_be_read",
        why="No replica may give the page, while a majority of them takes the change of its record.",
    ),
    Planted(
        "loans_go_with_the_last_version",
        "a deleted key keeps no loans",
        70,
        _PLAY,
        _HISTORY,
        "        shares = bool(self.loans or self.borrowed or self.departure or self.arrivals)\n",
        "        shares = bool(entries and (self.loans or self.borrowed))\n",
    ),
    Planted(
        "lent_to_other_countries",
        "a copy to a bucket with other countries borrows the data of its source, too",
        0,
        path="storaged/objects/code/lending.py",
        old="    return owner_bucket.id == bucket.id or set(owner_bucket.countries) == set(bucket.countries)\n",
        new="    return True\n",
        tests="tests/unit/test_objects_lenders.py::test_buckets_with_other_countries_do_not_lend",
    ),
    Planted(
        "lent_as_the_record_says",
        "a copy borrows the parts that a record names, not those that are sealed in it",
        0,
        path=_COPY,
        old="for part in opened.meta.parts) or (opened.version.context_id,))\n",
        new="for part in opened.version.parts) or (opened.version.context_id,))\n",
        tests=f"{_UNIT}::test_a_record_that_names_other_parts_than_are_sealed_lends_nothing",
    ),
    Planted(
        "checksum_of_parts_for_one_of_the_whole",
        "a copy that asks for a checksum of the whole object gets the composite one of its source",
        0,
        path=_COPY,
        old="    return tuple(info.checksums) == (algorithm,) and info.checksum_type == FULL_OBJECT\n",
        new="    return tuple(info.checksums) == (algorithm,)\n",
        tests=f"{_UNIT}::test_a_copy_of_an_upload_that_names_a_checksum_gets_one_of_the_whole_object",
    ),
    Planted(
        "lent_as_the_pages_say",
        "a copy borrows the parts that pages name, not those that are sealed in it",
        0,
        path=_COPY,
        old="    if len(sealed) != len(entries) or not all(map(SealedPart.names, sealed, entries)):\n",
        new="    if len(sealed) != len(entries):\n",
        tests=f"{_UNIT}::test_a_record_that_names_other_parts_than_are_sealed_lends_nothing",
    ),
    Planted(
        "lent_pages_refer_to_nothing",
        "lent data counts as unused when its parts are on pages, and no version of its own key has it",
        250,
        _PLAY,
        _REFERENCES,
        "    for loan in paged.values():\n",
        "    for loan in list[Loan]():\n",
    ),
    Planted(
        "lent_pages_are_not_needed",
        "pages with lent parts are swept when no version of their own key names them",
        250,
        _PLAY,
        _REFERENCES,
        "            for page_hash in loan.pages[:PAGES_MAX]:\n",
        "            for page_hash in loan.pages[:0]:\n",
    ),
    Planted(
        "lent_pages_stay_where_they_are",
        "a move of blocks changes the places on a version's pages, and not those on the pages of its loan",
        1000,
        _PLAY,
        _MOVED,
        "    if not to_this:\n        return loan\n",
        "    if not to_this or loan.part is None:\n        applied |= to_this\n        return loan\n",
        tests=f"{_UNIT}::test_a_move_of_a_part_on_a_lent_page_is_one_change_of_version_and_loan",
        why="A block of an object on pages that is lent has to move, and then the version has to go.",
    ),
    Planted(
        "moved_beside_an_unread_loan",
        "a move changes a version's places while the pages of a loan can't be read",
        0,
        path=_MOVED,
        old="        except DataDamaged:\n            return None\n",
        new="        except DataDamaged:\n            moved = loan\n",
        tests=f"{_UNIT}::test_nothing_moves_while_a_page_of_a_loan_cannot_be_read",
    ),
    Planted(
        "sealed_pages_before_the_promise",
        "the pages of a copy are put before its promise, so that a sweep that looked before may delete them",
        0,
        path=_COPY,
        old="borrowed, outgoing)\n    named",
        new="borrowed, outgoing)\n    await sealed.put()\n    sealed._pages = {}\n    named",
        tests=f"{_UNIT}::test_the_pages_of_a_copy_are_put_between_promise_and_accept",
    ),
    Planted(
        "moved_over_what_others_wrote",
        "a move writes the record that it read, whatever others have made of that since",
        100,
        _PLAY,
        _MOVED,
        "        if value.sequence != self._seen.sequence:\n",
        "        if value.sequence < self._seen.sequence:\n",
    ),
    Planted(
        "moved_where_it_is_not",
        "a move counts as made in a record that has not the version any more",
        0,
        path=_MOVED,
        old="        if entry is None:\n            return None\n        applied",
        new="        if entry is None:\n            left.clear()\n            continue\n        applied",
        tests=f"{_UNIT_MOVED}::test_a_move_is_made_in_what_the_record_is_then",
        why="Nothing is lost by it: the collector asks the record before it deletes.",
    ),
    Planted(
        "one_of_the_versions_moves",
        "of the versions that have a part of an upload the first alone moves",
        0,
        path=_MOVED,
        old="            if not left and not any(one.version.multipart for one, _ in changed):\n",
        new="            if not left:\n",
        tests=f"{_UNIT_MOVED}::test_parts_of_an_upload_move_in_every_version_that_has_them"
        "_and_only_in_the_record_that_was_read",
        why="No two versions of the play have a part in common.",
    ),
)
