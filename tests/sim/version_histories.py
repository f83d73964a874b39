"""The model of a key with versions, conditions and locks: a class for each operation, for the checker of ``linear``.

A key's state is the list of its versions, newest first. Each operation says whether it could have been answered as it
was, where it took effect, and what the key holds then. Contents are unique, so an ETag says which write made a version.
An open write (it is not known whether it was applied) has the id that lists show for its ETag. A delete marker of an
open delete has the id ``?`` until a list shows it.

Locks depend on time: an operation has the times of its beginning and its end, and where a retention ended in between,
both answers are right.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.sim.linear import Kind, Operation, linearizable

NULL = "null"
UNSEEN = "?"
GOVERNANCE = "GOVERNANCE"


class Lock(NamedTuple):
    mode: str = ""
    until_ms: int = 0
    hold: bool = False


UNLOCKED = Lock()


class Held(NamedTuple):
    """A version. A delete marker has no ETag. In a bucket without versioning the one version is ``null``."""

    id: str
    etag: str
    lock: Lock = UNLOCKED


State = tuple[Held, ...]

DONE, REFUSED, MISSING, DENIED = "done", "refused", "missing", "denied"
"""Answers: success; 412; 404; 403 because of a lock."""


@dataclass
class Act(Operation):
    """``began_ms``, ``ended_ms``: by a clock that all gateways share. ``answer``: of one that is not open."""

    kind: Kind = Kind.PUT
    key: str = ""
    invoked: int = 0
    began_ms: int = 0
    ended_ms: int = 1 << 62
    answer: str = DONE

    def step(self, state: Any) -> tuple[bool, Any]:
        return self.take_effect(state or ())

    def take_effect(self, state: State) -> tuple[bool, State]:
        raise NotImplementedError

    @property
    def unseen(self) -> bool:
        """It is open, and no answer shows that it took effect: the judge leaves it out at first."""
        return False

    def says(self, *possible: str) -> bool:
        """Whether it was answered so, as far as that is known."""
        return self.open or self.answer in possible

    def lasts(self, until_ms: int) -> bool | None:
        """Whether a retention lasted when this took effect; None: it ended meanwhile."""
        if until_ms <= self.began_ms:
            return False
        return True if until_ms > self.ended_ms else None

    def is_kept(self, lock: Lock, *, bypass: bool) -> bool | None:
        if lock.hold:
            return True
        if not lock.mode or (bypass and lock.mode == GOVERNANCE):
            return False
        return self.lasts(lock.until_ms)


def current(state: State) -> Held | None:
    return state[0] if state and state[0].etag else None


@dataclass
class Conditional(Act):
    """``if_match``: an ETag; ``if_absent``: If-None-Match: *."""

    if_match: str = ""
    if_absent: bool = False

    def verdict(self, state: State) -> str:
        there = current(state)
        if self.if_match and there is None:
            return MISSING
        if (self.if_match and there is not None and there.etag != self.if_match) or (self.if_absent and there):
            return REFUSED
        return DONE


@dataclass
class Adds(Conditional):
    """A PUT, a copy, or a Complete. ``id``: of the version that it made."""

    id: str = ""
    etag: str = ""
    versioned: bool = True
    lock: Lock = UNLOCKED
    seen: bool = False

    @property
    def unseen(self) -> bool:
        return self.open and not self.seen

    def take_effect(self, state: State) -> tuple[bool, State]:
        verdict = self.verdict(state)
        if verdict != DONE or not self.says(DONE):
            return self.says(verdict), state
        kept = tuple(held for held in state if held.id != NULL) if self.id == NULL else state
        return True, (Held(self.id, self.etag, self.lock), *(kept if self.versioned else ()))


@dataclass
class Marks(Conditional):
    """A DELETE that names no version. ``id``: of its marker; empty: the bucket has no versioning."""

    id: str = ""

    def take_effect(self, state: State) -> tuple[bool, State]:
        verdict = self.verdict(state)
        if verdict != DONE or not self.says(DONE):
            return self.says(verdict), state
        if not self.id:
            return True, ()
        kept = tuple(held for held in state if held.id != NULL) if self.id == NULL else state
        return True, (Held(self.id, ""), *kept)


@dataclass
class Removes(Act):
    """A DELETE of one version."""

    id: str = ""
    bypass: bool = False

    def take_effect(self, state: State) -> tuple[bool, State]:
        found = next((held for held in state if held.id == self.id), None)
        if found is None:
            return self.says(DONE), state
        kept = self.is_kept(found.lock, bypass=self.bypass)
        if kept is True or (not self.open and self.answer == DENIED):
            return self.says(DENIED) and kept is not False, state
        return True, tuple(held for held in state if held is not found)


@dataclass
class Expires(Act):
    """What lifecycle may have done at any time after it was due: it removed the noncurrent version ``id``, or of those
    that no list has shown the oldest with this ETag.
    """

    id: str = ""
    etag: str = ""

    def take_effect(self, state: State) -> tuple[bool, State]:
        own = [held for held in state if held.id == self.id and (self.id != UNSEEN or held.etag == self.etag)]
        found = own[-1] if own else None
        if found is None or found is state[0] or self.is_kept(found.lock, bypass=False):
            return False, state
        return True, tuple(held for held in state if held is not found)


@dataclass
class Retains(Act):
    """PutObjectRetention."""

    id: str = ""
    mode: str = ""
    until_ms: int = 0
    bypass: bool = False

    def take_effect(self, state: State) -> tuple[bool, State]:
        found = next((held for held in state if held.id == self.id), None)
        if found is None:
            return self.says(MISSING), state
        lock, kept = found.lock, False if not found.lock.mode else self.lasts(found.lock.until_ms)
        if (self.mode == lock.mode and self.until_ms >= lock.until_ms) or (self.bypass and lock.mode == GOVERNANCE):
            kept = False
        if kept is True or (not self.open and self.answer == DENIED):
            return self.says(DENIED) and kept is not False, state
        return self.says(DONE), _with_lock(state, found, Lock(self.mode, self.until_ms, lock.hold))


@dataclass
class Holds(Act):
    """PutObjectLegalHold."""

    id: str = ""
    hold: bool = False

    def take_effect(self, state: State) -> tuple[bool, State]:
        found = next((held for held in state if held.id == self.id), None)
        if found is None:
            return self.says(MISSING), state
        return self.says(DONE), _with_lock(state, found, found.lock._replace(hold=self.hold))


def _with_lock(state: State, found: Held, lock: Lock) -> State:
    return tuple(held._replace(lock=lock) if held is found else held for held in state)


@dataclass
class Lists(Act):
    """ListObjectVersions: (id, ETag) of each version. A marker that no answer named may be that of an open delete, or
    of lifecycle; ``claimed`` are those that an answer named.
    """

    shown: tuple[tuple[str, str], ...] = ()
    claimed: frozenset[str] = field(default_factory=frozenset)

    def take_effect(self, state: State) -> tuple[bool, State]:
        if len(state) != len(self.shown):
            return False, state
        after: list[Held] = []
        for held, (version, etag) in zip(state, self.shown, strict=True):
            fresh = held.id == UNSEEN and not etag and version != NULL and version not in self.claimed
            if held.etag != etag or (held.id != version and not fresh):
                return False, state
            after.append(held._replace(id=version))
        return True, tuple(after)


@dataclass
class Gets(Act):
    """A read of the current version: its ETag; empty for none, or a marker. ``missing``: the answer was 404."""

    etag: str = ""

    def take_effect(self, state: State) -> tuple[bool, State]:
        there = current(state)
        return (there.etag if there is not None else "") == self.etag, state


@dataclass
class Heads(Act):
    """HEAD of a version: its lock, or 404 (``MISSING``)."""

    id: str = ""
    lock: Lock = UNLOCKED

    def take_effect(self, state: State) -> tuple[bool, State]:
        found = next((held for held in state if held.id == self.id), None)
        if found is None:
            return self.answer == MISSING, state
        return self.answer == DONE and found.lock == self.lock, state


# --- the judge


def ordinal_of(version: str) -> int:
    """The register's sequence, which a version's id begins with."""
    return int.from_bytes(base64.urlsafe_b64decode(version)[:8], "big")


def wrong_in_lists(history: Sequence[Operation]) -> list[str]:
    """Lists that no order of operations explains: a version that is there twice, or is out of order."""
    wrong = []
    for one in history:
        if not isinstance(one, Lists):
            continue
        ids = [version for version, _ in one.shown]
        ordinals = [ordinal_of(version) for version in ids if version != NULL]
        if len(ids) != len(set(ids)):
            wrong.append(f"{one.key}: a version is listed twice: {ids}")
        if ordinals != sorted(set(ordinals), reverse=True):
            wrong.append(f"{one.key}: versions are not in the order of their changes: {ordinals}")
    return wrong


def judge(history: Sequence[Operation]) -> list[str]:
    """The violations in a history of several keys."""
    wrong = wrong_in_lists(history)
    by_key: dict[str, list[Operation]] = {}
    for operation in history:
        by_key.setdefault(operation.key, []).append(operation)
    for key, own in sorted(by_key.items()):
        _resolve(own)
        likely = [one for one in own if not (isinstance(one, Act) and one.unseen)]
        if not linearizable(likely) and (len(likely) == len(own) or not linearizable(own)):
            wrong.append(f"{key}: its history is not linearizable")
    return wrong


def _resolve(own: Sequence[Operation]) -> None:
    """Gives open writes the ids that lists show, and gives lists the ids of the markers that answers named."""
    ids = {etag: version for one in own if isinstance(one, Lists) for version, etag in one.shown if etag}
    seen = {one.etag for one in own if isinstance(one, Gets)} | set(ids)
    claimed = frozenset(one.id for one in own if isinstance(one, Marks) and not one.open and one.answer == DONE)
    for one in own:
        if isinstance(one, Adds) and one.open:
            one.seen = one.etag in seen
            if one.id != NULL:
                one.id = ids.get(one.etag, UNSEEN)
        elif isinstance(one, Lists):
            one.claimed = claimed
