"""Which writes a disk still takes while it fills up: the table of admission."""

from __future__ import annotations

import pytest

from storaged.disk_room import ROW_BYTES, UNKNOWN_BYTES, Bound, DiskRoom, Use, reserve_of, stays_free
from storaged.meta.acceptor.room import use_of
from storaged.meta.messages import Accept, Create
from storaged.meta.names import ZERO_BALLOT, RegisterName, Table, Value, Visibility
from storaged.units import GIB, MIB

RESERVE = 80 * MIB
AMPLE = Bound(GIB, 0)


def room_with(free: int, *, pending: int = 0, few: bool = False) -> DiskRoom:
    room = DiskRoom()
    room.few = few
    room.look((Bound(free, RESERVE), AMPLE), pending)
    return room


@pytest.mark.parametrize(
    ("eighths", "refused"),
    [
        (9, set()),
        (7, set()),
        (6, set()),
        (5, {Use.ROWS}),
        (4, {Use.ROWS}),
        (3, {Use.ROWS, Use.SETTLING}),
        (0, {Use.ROWS, Use.SETTLING}),
    ],
)
def test_what_is_refused_by_how_much_of_the_reserve_is_free(eighths: int, refused: set[Use]) -> None:
    room = room_with(RESERVE * eighths // 8)
    assert {use for use in Use if use is not Use.DATA and room.refuses(use)} == refused


def test_each_use_leaves_more_free_than_the_next_one() -> None:
    left = [stays_free(use, RESERVE) for use in Use]
    assert left == sorted(left, reverse=True)
    assert (left[0], left[-1]) == (RESERVE, 0)


def test_rows_that_were_taken_since_the_last_look_count() -> None:
    room = room_with(stays_free(Use.ROWS, RESERVE) + 2 * (1000 + ROW_BYTES))
    assert room.take(1000)
    assert room.take(1000)
    assert not room.refuses(Use.ROWS)
    assert not room.take(1000)
    assert room.refuses(Use.ROWS)
    assert not room.refuses(Use.SETTLING)
    assert room.taken_bytes == 3 * (1000 + ROW_BYTES)


def test_rows_that_are_not_in_the_file_yet_count() -> None:
    free = stays_free(Use.ROWS, RESERVE) + MIB
    assert not room_with(free).refuses(Use.ROWS)
    assert room_with(free, pending=2 * MIB).refuses(Use.ROWS)


def test_gateways_are_told_before_the_disk_refuses_and_not_told_to_go_on_at_once() -> None:
    few = RESERVE * 7 // 8
    assert not room_with(few).few
    assert room_with(few - 1).few
    assert not room_with(few - 1).refuses(Use.ROWS)
    assert room_with(few + MIB, few=True).few
    assert not room_with(RESERVE, few=True).few


def test_the_tighter_bound_counts() -> None:
    room = DiskRoom()
    room.look((AMPLE, Bound(0, RESERVE)), 0)
    assert room.refuses(Use.ROWS)
    assert room.refuses(Use.SETTLING)
    assert room.few
    assert not room.refuses(Use.FREEING)


def test_before_the_first_look_nothing_is_refused() -> None:
    room = DiskRoom()
    assert room.left_bytes == UNKNOWN_BYTES
    assert room.take(GIB)


def test_the_reserve_is_a_twentieth_unless_it_is_configured() -> None:
    assert reserve_of(100 * GIB, None) == 5 * GIB
    assert reserve_of(100 * GIB, 3) == 3


def accept(
    body: int, *, visibility: int = Visibility.LIVE, table: int = Table.OBJECT, identity: bool = False
) -> Accept:
    name = RegisterName(table, bytes(16), 0, b"key")
    return Accept("d", name, ZERO_BALLOT, Value(1, bytes(16), visibility, bytes(body)), identity=identity)


def held(body: int) -> Value:
    return Value(1, bytes(16), Visibility.LIVE, bytes(body))


@pytest.mark.parametrize(
    ("request_", "before", "use"),
    [
        (accept(100), None, Use.ROWS),
        (accept(100), held(99), Use.ROWS),
        (accept(100), held(100), Use.FREEING),
        (accept(99), held(100), Use.FREEING),
        (accept(0, visibility=Visibility.TOMBSTONE), None, Use.FREEING),
        (accept(0, visibility=Visibility.TOMBSTONE), held(5), Use.FREEING),
        (accept(100, visibility=Visibility.HIDDEN), held(5), Use.SETTLING),
        (accept(100, identity=True), None, Use.SETTLING),
        (accept(100, identity=True), held(100), Use.FREEING),
        (accept(100, table=Table.SYSTEM), None, Use.SETTLING),
        (accept(100, table=Table.PART), None, Use.ROWS),
        (accept(100, table=Table.UPLOAD), None, Use.ROWS),
        (Create("d", RegisterName(Table.OBJECT, bytes(16), 0, b"k"), ZERO_BALLOT, held(9)), None, Use.ROWS),
    ],
)
def test_what_an_accept_is_for(request_: Accept, before: Value | None, use: Use) -> None:
    assert use_of(request_, before) is use


def test_room_outside_of_the_reserve_is_ample() -> None:
    assert not room_with(RESERVE).ample
    assert not room_with(RESERVE + RESERVE // 16).ample
    assert room_with(RESERVE + RESERVE // 16 + 1).ample
    assert not room_with(RESERVE + RESERVE // 16 + 1, pending=2).ample
