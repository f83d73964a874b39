"""The judge is judged first: known histories, and a brute-force search over all orders of small random ones."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.sim.linear import Content, Kind, Operation, linearizable


def put(invoked: int, returned: int, new: bytes, observed: Content = None) -> Operation:
    return Operation(Kind.PUT, "k", invoked, new=new, returned=returned, observed=observed)


def read(invoked: int, returned: int, observed: Content) -> Operation:
    return Operation(Kind.READ, "k", invoked, returned=returned, observed=observed)


GOOD = {
    "one after the other": [put(0, 1, b"a"), read(2, 3, b"a")],
    "a read beside a put may see the old value": [put(0, 3, b"a"), read(1, 2, None)],
    "a read beside a put may see the new value": [put(0, 3, b"a"), read(1, 2, b"a")],
    "an open put may take effect late": [Operation(Kind.PUT, "k", 0, new=b"a"), read(1, 2, None), read(3, 4, b"a")],
    "an open put may never take effect": [Operation(Kind.PUT, "k", 0, new=b"a"), read(1, 2, None)],
    "a failed condition observed what was there": [
        put(0, 1, b"a"),
        Operation(Kind.CAS, "k", 2, new=b"c", expected=b"b", returned=3, observed=b"a"),
        read(4, 5, b"a"),
    ],
}

BAD = {
    "a read misses a put that returned": [put(0, 1, b"a"), read(2, 3, None)],
    "two reads see values in opposite orders": [
        put(0, 1, b"a"),
        put(2, 9, b"b", b"a"),
        read(3, 4, b"b"),
        read(5, 6, b"a"),
    ],
    "a value that nobody wrote": [read(0, 1, b"x")],
    "an open put taken back": [Operation(Kind.PUT, "k", 0, new=b"a"), read(1, 2, b"a"), read(3, 4, None)],
    "two conditions met by one value": [
        Operation(Kind.CAS, "k", 0, new=b"a", expected=None, returned=3, observed=None),
        Operation(Kind.CAS, "k", 1, new=b"b", expected=None, returned=2, observed=None),
    ],
    "a failed condition judged a value that never was": [
        put(0, 1, b"a"),
        Operation(Kind.CAS, "k", 2, new=b"c", expected=b"b", returned=3, observed=b"z"),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_linearizable_history_passes(name: str) -> None:
    assert linearizable(GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_a_history_that_is_not_linearizable_is_refused(name: str) -> None:
    assert not linearizable(BAD[name])


def test_keys_are_judged_apart() -> None:
    other = Operation(Kind.READ, "other", 2, returned=3, observed=b"a")
    assert linearizable([put(0, 1, b"a"), Operation(Kind.PUT, "other", 0, new=b"a", returned=1), other])
    assert not linearizable([put(0, 1, b"a"), other])


def _by_brute_force(operations: list[Operation]) -> bool:
    """Every order of every choice of open operations that respects what returned before what was invoked."""
    opened = [operation for operation in operations if operation.open]
    closed = [operation for operation in operations if not operation.open]
    for choice in range(1 << len(opened)):
        chosen = closed + [operation for bit, operation in enumerate(opened) if choice >> bit & 1]
        for order in permutations(chosen):
            if any(
                not later.open and later.returned < earlier.invoked
                for at, earlier in enumerate(order)
                for later in order[at + 1 :]
            ):
                continue
            state: Content = None
            for operation in order:
                possible, state = operation.step(state)
                if not possible:
                    break
            else:
                return True
    return False


CONTENT = st.sampled_from([None, b"a", b"b"])


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    count = draw(st.integers(1, 5))
    moments = draw(st.permutations(range(2 * count)))
    found = []
    for index in range(count):
        invoked, returned = sorted(moments[2 * index : 2 * index + 2])
        kind = draw(st.sampled_from(Kind))
        opened = draw(st.integers(0, 4)) == 0
        found.append(
            Operation(kind, "k", invoked, draw(CONTENT), draw(CONTENT), -1 if opened else returned, draw(CONTENT))
        )
    return found


@settings(max_examples=examples(300), deadline=None)
@given(histories())
def test_the_search_finds_what_trying_every_order_finds(operations: list[Operation]) -> None:
    assert linearizable(operations) == _by_brute_force(operations)
