"""Heads of bodies, in bodies and in rows."""

from __future__ import annotations

import pytest

from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.storage.row_head import head_of, message_of, with_head
from storaged.meta.storage.rowvalue import heads_of, pack_row
from storaged.meta.store_ports import Slot

MESSAGE = b"\x93abcdef" + bytes(300)


def test_the_head_is_the_part_of_the_message_that_was_named() -> None:
    body = with_head(MESSAGE, 1, 4)
    assert (head_of(body), message_of(body)) == (b"abc", MESSAGE)


def test_a_body_that_begins_otherwise_is_its_own_head_and_has_no_message() -> None:
    for body in (MESSAGE, b"", b"\x91"):
        assert (head_of(body), message_of(body)) == (body, None)


def test_a_head_too_far_behind_for_the_lead_is_refused() -> None:
    with pytest.raises(ValueError, match="65,535"):
        with_head(bytes(70_000), 0, 65_532)


@pytest.mark.parametrize("sequence", [1, 127, 128, 200, 70_000])
@pytest.mark.parametrize("operation", [b"o" * 16, b"", b"o" * 8, b"\xc5" * 16])
@pytest.mark.parametrize("node", ["g", "gateway-with-a-long-name", "ö" * 30])
@pytest.mark.parametrize(
    "body",
    [
        with_head(MESSAGE, 1, 4),
        with_head(MESSAGE, 1, 1),
        with_head(b"abc", 0, 2),
        MESSAGE,
        b"",
        b"\xc1" * 3,
        bytes(70_000),
        with_head(bytes(70_000), 3, 9),
    ],
)
def test_heads_are_found_in_rows_of_every_form(sequence: int, operation: bytes, node: str, body: bytes) -> None:
    name = RegisterName(Table.OBJECT, bytes(16), 0, b"key")
    row = pack_row(
        Slot(name, Ballot(1, 2, node, b"incarnat"), Value(sequence, operation, Visibility.LIVE, body, b"p" * 16))
    )
    assert heads_of([row, row]) == [head_of(body)] * 2
