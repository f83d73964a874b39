"""The judge of races refuses impossible histories, and no others."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.sim.linear import Kind
from tests.sim.version_histories import (
    DENIED,
    GOVERNANCE,
    MISSING,
    NULL,
    REFUSED,
    UNLOCKED,
    UNSEEN,
    Act,
    Adds,
    Expires,
    Gets,
    Heads,
    Holds,
    Lists,
    Lock,
    Marks,
    Removes,
    Retains,
    judge,
)

HOUR_MS = 3_600_000


def id_of(ordinal: int) -> str:
    return base64.urlsafe_b64encode(ordinal.to_bytes(8, "big") + bytes(16)).decode()


ONE, TWO, THREE = map(id_of, (1, 2, 3))


def in_turn(*acts: Act) -> list[Any]:
    """One operation after the other; an open one begins at its place."""
    for number, act in enumerate(acts):
        act.key, act.invoked, act.began_ms, act.ended_ms = "key", 2 * number + 1, number * 1000, number * 1000 + 10
        if act.returned != -2:
            act.returned = 2 * number + 2
    for act in acts:
        act.returned = -1 if act.returned == -2 else act.returned
    return list(acts)


def put(version: str, etag: str, **more: Any) -> Adds:
    return Adds(id=version, etag=etag, **more)


def listed(*shown: tuple[str, str]) -> Lists:
    return Lists(Kind.READ, shown=shown)


def locked(version: str = ONE, **lock: Any) -> list[Act]:
    return [put(version, "a", lock=Lock(**lock))]


def remove(version: str = ONE, **more: Any) -> Removes:
    return Removes(Kind.DELETE, id=version, **more)


KEPT = {"mode": GOVERNANCE, "until_ms": HOUR_MS}

RIGHT = {
    "versions": [put(ONE, "a"), put(TWO, "b"), listed((TWO, "b"), (ONE, "a")), Gets(Kind.READ, etag="b")],
    "null versions": [put(NULL, "a"), put(NULL, "b"), Marks(Kind.DELETE, id=NULL), listed((NULL, ""))],
    "without versioning": [put(NULL, "a", versioned=False), Marks(Kind.DELETE, id=""), listed()],
    "conditions": [
        put(ONE, "a", if_absent=True),
        put("", "b", if_match="x", answer=REFUSED),
        Marks(Kind.DELETE, id=TWO, if_match="a"),
        put("", "b", if_match="a", answer=MISSING),
    ],
    "an open write that was applied": [put(UNSEEN, "a", returned=-2), listed((ONE, "a"))],
    "an open write that was not": [put(UNSEEN, "a", returned=-2), listed()],
    "a marker of an open delete": [
        put(ONE, "a"), Marks(Kind.DELETE, id=UNSEEN, returned=-2), listed((TWO, ""), (ONE, "a")), remove(TWO),
        listed((ONE, "a")),
    ],
    "a lock": [*locked(**KEPT), remove(answer=DENIED), remove(bypass=True), listed()],
    "a retention that ends": [*locked(mode=GOVERNANCE, until_ms=1005), remove(), listed()],
    "lifecycle": [put(ONE, "a"), put(TWO, "b"), Expires(id=ONE, returned=-2), listed((TWO, "b"))],
}  # fmt: skip

WRONG = {
    "a version is lost": [put(ONE, "a"), put(TWO, "b"), listed((TWO, "b"))],
    "a version comes back": [put(ONE, "a"), remove(), listed((ONE, "a"))],
    "a version is there twice": [put(ONE, "a"), listed((ONE, "a"), (ONE, "a"))],
    "another order": [put(ONE, "a"), put(TWO, "b"), listed((ONE, "a"), (TWO, "b"))],
    "ordinals": [put(TWO, "a"), put(ONE, "b"), listed((ONE, "b"), (TWO, "a"))],
    "two null versions": [put(NULL, "a"), put(NULL, "b"), listed((NULL, "b"), (NULL, "a"))],
    "two creates": [put(ONE, "a", if_absent=True), put(TWO, "b", if_absent=True)],
    "an update is lost": [put(ONE, "a"), put(TWO, "b", if_match="a"), put(THREE, "c", if_match="a")],
    "a refusal without a reason": [put(ONE, "a"), put("", "b", if_match="a", answer=REFUSED)],
    "a missing object that is there": [put(ONE, "a"), put("", "b", if_match="a", answer=MISSING)],
    "a refused write": [put(ONE, "a"), put(UNSEEN, "b", if_match="x", returned=-2), listed((TWO, "b"), (ONE, "a"))],
    "an older version is read": [put(ONE, "a"), put(TWO, "b"), Gets(Kind.READ, etag="a")],
    "a marker of nobody": [put(ONE, "a"), listed((TWO, ""), (ONE, "a"))],
    "a lock is ignored": [*locked(**KEPT), remove()],
    "a hold is ignored": [put(ONE, "a"), Holds(id=ONE, hold=True), remove(bypass=True)],
    "compliance is bypassed": [*locked(mode="COMPLIANCE", until_ms=HOUR_MS), remove(bypass=True)],
    "a lock that nobody set": [put(ONE, "a"), remove(answer=DENIED)],
    "a lock after its end": [*locked(mode=GOVERNANCE, until_ms=500), remove(answer=DENIED)],
    "a shorter retention": [*locked(**KEPT), Retains(id=ONE, mode=GOVERNANCE, until_ms=HOUR_MS - 1)],
    "a lock is forgotten": [*locked(**KEPT), Heads(Kind.READ, id=ONE, lock=UNLOCKED)],
    "lifecycle deletes what is locked": [
        *locked(hold=True), put(TWO, "b"), Expires(id=ONE, returned=-2), listed((TWO, "b")),
    ],
    "lifecycle deletes the current version": [put(ONE, "a"), Expires(id=ONE, returned=-2), listed()],
    "lifecycle deletes early": [put(ONE, "a"), put(TWO, "b"), listed((TWO, "b")), Expires(id=ONE, returned=-2)],
}  # fmt: skip


@pytest.mark.parametrize("what", RIGHT)
def test_what_can_have_been_is_right(what: str) -> None:
    assert judge(in_turn(*RIGHT[what])) == []


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_have_been_is_wrong(what: str) -> None:
    assert judge(in_turn(*WRONG[what]))
