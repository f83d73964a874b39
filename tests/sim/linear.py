"""Is a history of one register linearizable? Wing and Gong's search (1993) with Lowe's memoisation (2017), as in
Porcupine.

An operation is invoked and returns; in between it takes effect at one moment. A history is linearizable when moments
can be chosen such that every operation
observed what the register held. An *open* operation (its outcome is unknown, or its process died) may take effect at
any time after its invocation, or never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

Content = bytes | None
"""What the register holds; None: nothing (never written, or deleted)."""


class Kind(Enum):
    READ = "read"
    PUT = "put"
    CAS = "cas"
    DELETE = "delete"


@dataclass
class Operation:
    """``invoked`` and ``returned`` are positions in the order of events. ``observed`` is what the register held before;
    unknown when the operation is open.
    ``expected`` is what a CAS wanted to find."""

    kind: Kind
    key: str
    invoked: int
    new: Content = None
    expected: Content = None
    returned: int = -1
    observed: Content = None
    blind: bool = False
    """A PUT that does not know what it replaced."""

    @property
    def open(self) -> bool:
        return self.returned < 0

    def step(self, state: Content) -> tuple[bool, Content]:
        """Whether it could take effect on ``state``, and what the register holds then."""
        if not self.open and not self.blind and self.observed != state:
            return False, state
        if self.kind is Kind.READ or (self.kind is Kind.CAS and state != self.expected):
            return True, state
        return True, self.new if self.kind is not Kind.DELETE else None


def linearizable(operations: Sequence[Operation]) -> bool:
    """Each key on its own: a history over several registers is linearizable when it is for each (Herlihy and Wing,
    1990).
    """
    by_key: dict[str, list[Operation]] = {}
    for operation in operations:
        by_key.setdefault(operation.key, []).append(operation)
    return all(_register_linearizable(own) for own in by_key.values())


class _Events:
    """Invocations and returns in order, as a doubly linked list from which operations are lifted and into which they
    are put back.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        events = [(operation.invoked, index, True) for index, operation in enumerate(operations)]
        events += [
            (operation.returned, index, False) for index, operation in enumerate(operations) if not operation.open
        ]
        events.sort()
        count = len(events)
        self.operation = [-1] + [index for _, index, _ in events]
        self.is_call = [False] + [call for _, _, call in events]
        self.next = [*range(1, count + 1), 0]
        self.previous = [count, *range(count)]
        self.return_of = [0] * len(operations)
        for position in range(1, count + 1):
            if not self.is_call[position]:
                self.return_of[self.operation[position]] = position

    def lift(self, call: int) -> None:
        for position in (call, self.return_of[self.operation[call]]):
            if position:
                self.next[self.previous[position]] = self.next[position]
                self.previous[self.next[position]] = self.previous[position]

    def put_back(self, call: int) -> None:
        for position in (self.return_of[self.operation[call]], call):
            if position:
                self.next[self.previous[position]] = position
                self.previous[self.next[position]] = position


def _register_linearizable(operations: Sequence[Operation]) -> bool:
    events = _Events(operations)
    state: Content = None
    done = 0
    seen: set[tuple[int, Content]] = set()
    path: list[tuple[int, Content, int]] = []
    position = events.next[0]
    while position:
        if events.is_call[position]:
            index = events.operation[position]
            possible, after = operations[index].step(state)
            if possible and (done | 1 << index, after) not in seen:
                seen.add((done | 1 << index, after))
                path.append((position, state, done))
                state, done = after, done | 1 << index
                events.lift(position)
                position = events.next[0]
            else:
                position = events.next[position]
        elif path:
            position, state, done = path.pop()
            events.put_back(position)
            position = events.next[position]
        else:
            return False
    return True
