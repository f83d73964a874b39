"""A bucket whose fence lends, as the background work of storage nodes sees it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from storaged.errors import NoSuchBucket
from storaged.maintain.disuse import Judge, NotYet, _Gone
from storaged.maintain.walk import Range, Walker
from storaged.meta.consensus.looks import Held, Look
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.listing.comparing import CatchUp
from storaged.meta.names import ZERO_BALLOT, Ballot, RegisterName, Table, Value, Visibility

OWNER = RegisterName(Table.OBJECT, b"s" * 16, 0, b"key")
EMPTY = Held(ZERO_BALLOT, None)
OLD = Held(Ballot(1, 1, "gw", b"incarnat"), Value(1, b"o" * 16, Visibility.LIVE, b"body"))
NOTHING, PLAIN, LENDS, FINAL = "nothing", "plain", "lends", "final"


def judge(held: Held = EMPTY, **fences: str) -> Judge:
    """``fences``: of each disk that answers; ``held``: what each holds. The directory does not name the bucket."""
    fenced, final, lends = (
        frozenset(disk for disk, fence in fences.items() if fence in kinds)
        for kinds in ((PLAIN, LENDS, FINAL), (FINAL,), (LENDS,))
    )
    look = Look(Quorum(("a", "b", "c")), dict.fromkeys(fences, held), fenced, final, lends)

    async def looks(_owner: RegisterName) -> Look:
        return look

    async def refresh(_context: object) -> None: ...

    buckets: Any = SimpleNamespace(by_id={}, complete=True, refresh=refresh)
    context: Any = SimpleNamespace(look=looks)
    return Judge(context, buckets)


@pytest.mark.parametrize(
    "fences",
    [
        (LENDS, LENDS, LENDS),
        (LENDS, LENDS, NOTHING),
        (LENDS, LENDS, PLAIN),
        (LENDS, LENDS, FINAL),
        (LENDS, PLAIN, NOTHING),
        (NOTHING, NOTHING, LENDS),
        (NOTHING, NOTHING, FINAL),
        (LENDS, LENDS),
        (LENDS, FINAL),
    ],
)
async def test_registers_behind_fences_that_lend_are_judged_by_rounds_whatever_one_replica_says(
    fences: tuple[str, ...],
) -> None:
    look = await judge(**dict(zip("abc", fences, strict=False)))._first_look(OWNER)
    assert look.held


@pytest.mark.parametrize("liar", [NOTHING, PLAIN, LENDS, FINAL])
async def test_one_replica_that_says_that_its_fence_lends_or_stays_changes_nothing_of_other_buckets(liar: str) -> None:
    with pytest.raises(NotYet):
        await judge(a=liar, b=PLAIN, c=PLAIN)._first_look(OWNER)
    with pytest.raises(_Gone):
        await judge(a=liar, b=FINAL, c=FINAL)._first_look(OWNER)
    assert await judge(a=liar, b=FINAL, c=FINAL).is_proved_gone(OWNER)
    for other in (NOTHING, LENDS, PLAIN):
        assert not await judge(a=liar, b=other, c=other).is_proved_gone(OWNER)
        assert not await judge(a=liar, b=other).is_proved_gone(OWNER)


@pytest.mark.parametrize("other", [NOTHING, PLAIN, LENDS, FINAL, "away"])
async def test_rows_from_before_do_not_keep_the_data_of_a_bucket_whose_fence_stays_at_a_majority(other: str) -> None:
    others = {} if other == "away" else {"c": other}
    assert await judge(OLD, a=FINAL, b=FINAL, **others).is_proved_gone(OWNER)


@pytest.mark.parametrize("other", [NOTHING, PLAIN, LENDS, "away"])
@pytest.mark.parametrize("held", [EMPTY, OLD])
async def test_one_replica_alone_ends_no_bucket_whatever_the_others_hold(held: Held, other: str) -> None:
    others = {} if other == "away" else {"c": other}
    for honest in (NOTHING, PLAIN, LENDS):
        assert not await judge(held, a=FINAL, b=honest, **others).is_proved_gone(OWNER)


@pytest.mark.parametrize(("details", "whole"), [({}, True), ({"final": "true"}, True), ({"lends": "true"}, False)])
async def test_a_range_that_can_be_settled_with_a_nonce_alone_is_not_taken_for_whole(
    details: dict[str, str], whole: bool
) -> None:
    async def catch_up(*_range: object, **_how: object) -> CatchUp:
        raise NoSuchBucket("", **details)

    async def settle(_name: RegisterName) -> None: ...

    context: Any = SimpleNamespace(registers=SimpleNamespace(settle=settle))
    scanner: Any = SimpleNamespace(catch_up=catch_up)
    assert await Walker(context, scanner).settle_range(Range("a", *OWNER[:3])) is whole
