"""The one way in which data that no register needs is deleted: mark, settle, compare, delete if unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from storaged.fragments.ports import FragmentId, Retirement
from storaged.maintain.deletion import delete_unneeded
from storaged.maintain.disuse import Proof
from storaged.maintain.garbage_page import DELETIONS_A_CALL, Garbage, _calls
from storaged.meta.names import RegisterName, Table

A, B, C = (RegisterName(Table.OBJECT, b"s" * 16, 0, key) for key in (b"a", b"b", b"c"))


class Noting:
    """A ``Use`` of numbers: even ones may go, and 4 has changed since it was marked."""

    def __init__(self) -> None:
        self.did: list[Any] = []

    async def mark(self, items: Sequence[int]) -> None:
        self.did.append(("mark", *items))

    def unmark(self, items: Sequence[int]) -> None:
        self.did.append(("unmark", *items))

    async def compare(self, owner: RegisterName, items: Sequence[int], proof: Proof) -> Sequence[int]:
        self.did.append(("compare", owner.key, proof.everywhere))
        return [item for item in items if item % 2 == 0]

    def wait(self, items: Sequence[int], reason: str) -> None:
        self.did.append(("wait", *items, reason))

    async def delete_unchanged(self, items: Sequence[int]) -> int:
        self.did.append(("delete", *items))
        return len([item for item in items if item != 4])


async def test_the_steps_are_taken_in_their_order_and_what_has_no_proof_waits() -> None:
    use = Noting()

    async def prove(owners: Sequence[RegisterName]) -> dict[RegisterName, Proof | str]:
        use.did.append("settle")
        return {A: Proof(everywhere=True), B: "a replica is away"}

    assert await delete_unneeded(prove, use, {A: [1, 2, 4], B: [6], C: [8]}) == 1
    assert use.did == [
        ("mark", 1, 2, 4, 6, 8),
        "settle",
        ("compare", b"a", True),
        ("wait", 6, "a replica is away"),
        ("wait", 8, "it was not looked at"),
        ("delete", 2, 4),
        ("unmark", 1, 2, 4, 6, 8),
    ]


async def test_nothing_stays_marked_when_the_settling_fails() -> None:
    use = Noting()

    async def prove(owners: Sequence[RegisterName]) -> dict[RegisterName, Proof | str]:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await delete_unneeded(prove, use, {A: [2]})
    assert use.did == [("mark", 2), ("unmark", 2)]


def test_the_fragments_of_a_data_id_are_deleted_in_one_call_where_they_fit() -> None:
    def garbage(data_id: bytes, count: int) -> Garbage:
        return Garbage(
            Retirement(data_id, A.pack(), 0), A, [FragmentId(data_id, block, 4, 2, 0) for block in range(count)]
        )

    most = DELETIONS_A_CALL
    calls = list(_calls([garbage(b"a", most - 1), garbage(b"b", 2), garbage(b"c", most + 1)]))
    assert [{fragment.data_id for fragment in call} for call in calls] == [{b"a"}, {b"b"}, {b"c"}, {b"c"}]
    assert [len(call) for call in calls] == [most - 1, 2, most, 1]
    assert list(_calls([garbage(b"a", 1), garbage(b"b", 2)])) == [
        [*garbage(b"a", 1).fragments, *garbage(b"b", 2).fragments]
    ]
