"""Clients that race on a few keys, through several gateways: conditional writes, copies, uploads that two complete at
once, deletions, versions, retention, legal holds, bypasses, lists and reads. Each operation is noted for the judge
(``version_histories``).

``Port`` is what a client's requests go through: the planes of the simulation (``races``), or real gateways
(``tests.chaos.races``).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from tests.sim.linear import Kind, Operation
from tests.sim.version_histories import (
    DONE,
    GOVERNANCE,
    NULL,
    UNLOCKED,
    UNSEEN,
    Act,
    Adds,
    Conditional,
    Expires,
    Gets,
    Heads,
    Holds,
    Lists,
    Lock,
    Marks,
    Removes,
    Retains,
)

PLAIN, VERSIONED, SUSPENDED = "plain", "versioned", "suspended"
"""Kinds of buckets: without versioning; with versioning and Object Lock; with versioning that was suspended."""
COMPLIANCE = "COMPLIANCE"
DAY_S = 86_400


class Refused(Exception):
    """The request changed nothing. ``answer``: as of ``version_histories``; empty: it says nothing about the key."""

    def __init__(self, answer: str = "") -> None:
        super().__init__(answer)
        self.answer = answer


class Unknown(Exception):
    """It is not known whether the request was carried out."""


class Port(Protocol):
    """Requests of one client to one gateway after the other. They raise Refused and Unknown. ETags are without
    quotation marks. ``bucket``: its kind.
    """

    async def put(self, bucket: str, key: str, body: bytes, how: Adds, lock: Lock) -> tuple[str, str]:
        """(version id, ETag). An empty id is that of the null version."""

    async def copy(self, bucket: str, key: str, body: bytes) -> tuple[str, str]:
        """Writes ``body`` elsewhere, and copies it to ``key``."""

    async def begin_upload(self, bucket: str, key: str, body: bytes) -> tuple[Any, str]:
        """An upload with all its parts, and the ETag that it will have."""

    async def complete(self, bucket: str, key: str, upload: Any, how: Conditional) -> tuple[str, str]: ...

    async def delete(self, bucket: str, key: str, version: str, how: Conditional, *, bypass: bool) -> str:
        """The id of the marker, if it made one."""

    async def retain(self, bucket: str, key: str, version: str, lock: Lock, *, bypass: bool) -> None: ...

    async def hold(self, bucket: str, key: str, version: str, *, on: bool) -> None: ...

    async def lock_of(self, bucket: str, key: str, version: str) -> Lock: ...

    async def current(self, bucket: str, key: str) -> str:
        """Its ETag. Refused(MISSING): there is none."""

    async def versions(self, bucket: str, key: str) -> list[tuple[str, str]]:
        """(id, ETag) of each, newest first."""


class Seen(NamedTuple):
    """A version that a client has seen, to be used in later requests."""

    id: str
    etag: str


@dataclass
class Race:
    """``now_ms``: a clock that all clients share. ``short_locks``: the clocks of gateways and ``now_ms`` agree, so that
    retentions may end in the middle.
    """

    chance: random.Random
    now_ms: Callable[[], int]
    etag_of: Callable[[bytes], str]
    short_locks: bool = False
    history: list[Operation] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    walls: list[int] = field(default_factory=list)
    """When each moment was, by ``now_ms``."""
    _seen: dict[str, list[Seen]] = field(default_factory=lambda: defaultdict(list))
    _serial: int = 0

    def moment(self) -> int:
        self.walls.append(self.now_ms())
        return len(self.walls)

    def moment_at(self, wall_ms: int) -> int:
        """The first moment that was not before this time, or one that is to come."""
        return next((index + 1 for index, wall in enumerate(self.walls) if wall >= wall_ms), len(self.walls) + 1)

    async def step(self, port: Port, bucket: str, key: str) -> None:
        """One operation."""
        steps = [
            (30, self._put),
            (5, self._copy),
            (8, self._complete),
            (14, self._mark),
            (12, self._remove),
            (14, self._list),
            (8, self._get),
        ]
        if bucket == VERSIONED:
            steps += [(9, self._retain), (6, self._hold), (8, self._head)]
        weights, choices = zip(*steps, strict=True)
        await self.chance.choices(choices, weights)[0](port, bucket, key)

    async def list(self, port: Port, bucket: str, key: str) -> None:
        await self._list(port, bucket, key)

    # --- what is noted

    async def _note(self, act: Act, work: Coroutine[Any, Any, Any]) -> Any:
        """Carries out ``work``; returns its result, or None."""
        act.invoked, act.began_ms = self.moment(), self.now_ms()
        what, result = type(act).__name__.lower(), None
        try:
            result = await work
        except Refused as refused:
            if not refused.answer:
                self.counts["no answer"] += 1
                return None
            act.answer = refused.answer
        except (Unknown, asyncio.CancelledError) as error:
            self.counts["unknown"] += 1
            if act.kind is not Kind.READ:
                self.history.append(act)
            if isinstance(error, asyncio.CancelledError):
                raise
            return None
        act.ended_ms, act.returned = self.now_ms(), self.moment()
        self.counts[f"{what} {act.answer}"] += 1
        self.history.append(act)
        return result if act.answer == DONE else None

    def _body(self) -> bytes:
        self._serial += 1
        return b"%d " % self._serial + self.chance.randbytes(4).hex().encode()

    def _condition(self, act: Conditional, key: str) -> None:
        """One in two is conditional."""
        kind, seen = self.chance.random(), self._seen[key]
        if kind < 0.25:
            act.if_absent = True
        elif kind < 0.55 and any(one.etag for one in seen):
            # mostly the ETag that is likely to be current
            act.if_match = next(one.etag for one in reversed(seen) if one.etag)
            if self.chance.random() < 0.2:
                act.if_match = self.chance.choice([one.etag for one in seen if one.etag])

    def _choose(self, key: str, *, objects: bool = False) -> Seen | None:
        found = [one for one in self._seen[key] if one.id and (one.etag or not objects)]
        return self.chance.choice(found[-6:]) if found else None

    def _added(self, act: Adds, result: tuple[str, str] | None) -> None:
        if result is None:
            return
        act.id = result[0] or NULL
        if result[1] != act.etag:
            self.wrong.append(f"{act.key}: the ETag of a write is {result[1]}, not {act.etag}")
        self._seen[act.key].append(Seen(act.id, act.etag))

    # --- operations

    def _adding(self, bucket: str, key: str, etag: str) -> Adds:
        version = UNSEEN if bucket == VERSIONED else NULL
        return Adds(key=key, id=version, etag=etag, versioned=bucket != PLAIN)

    async def _put(self, port: Port, bucket: str, key: str) -> None:
        body = self._body()
        act = self._adding(bucket, key, self.etag_of(body))
        self._condition(act, key)
        if bucket == VERSIONED and self.chance.random() < 0.2:
            act.lock = self._lock()
        self._added(act, await self._note(act, port.put(bucket, key, body, act, act.lock)))

    async def put_named(self, port: Port, bucket: str, key: str) -> None:
        """A version with an id of its own, by a gateway for which the bucket has versioning."""
        body = self._body()
        act = Adds(key=key, id=UNSEEN, etag=self.etag_of(body))
        self._added(act, await self._note(act, port.put(bucket, key, body, act, act.lock)))

    async def put_unasked(self, port: Port, bucket: str, key: str) -> None:
        """The null version, whatever the key holds."""
        body = self._body()
        act = Adds(key=key, id=NULL, etag=self.etag_of(body))
        self._added(act, await self._note(act, port.put(bucket, key, body, act, act.lock)))

    async def _copy(self, port: Port, bucket: str, key: str) -> None:
        body = self._body()
        act = self._adding(bucket, key, self.etag_of(body))
        self._added(act, await self._note(act, port.copy(bucket, key, body)))

    async def _complete(self, port: Port, bucket: str, key: str) -> None:
        """Now and then two complete an upload at once: that makes one version."""
        try:
            upload, etag = await port.begin_upload(bucket, key, self._body())
        except (Refused, Unknown):
            return
        act = self._adding(bucket, key, etag)
        self._condition(act, key)
        twice = self.chance.random() < 0.5
        work = self._complete_twice if twice else port.complete
        self._added(act, await self._note(act, work(*((port,) if twice else ()), bucket, key, upload, act)))

    async def _complete_twice(self, port: Port, bucket: str, key: str, upload: Any, act: Adds) -> tuple[str, str]:
        both = await asyncio.gather(
            *(port.complete(bucket, key, upload, act) for _ in range(2)), return_exceptions=True
        )
        done = [one for one in both if not isinstance(one, BaseException)]
        if len(set(done)) > 1:
            self.wrong.append(f"{key}: an upload was completed twice: {done}")
        if done:
            return done[0]
        for one in both:
            if isinstance(one, BaseException) and not isinstance(one, Refused):
                raise one
        answers = {one.answer for one in both if isinstance(one, Refused)}
        if len(answers) > 1 or "" in answers:
            raise Unknown  # a conflict says that one of the two may have been carried out, and is overwritten now
        raise Refused(answers.pop())

    async def _mark(self, port: Port, bucket: str, key: str) -> None:
        act = Marks(Kind.DELETE, key, id={PLAIN: "", SUSPENDED: NULL}.get(bucket, UNSEEN))
        if self.chance.random() < 0.5:
            self._condition(act, key)
            act.if_absent = False
        marker = await self._note(act, port.delete(bucket, key, "", act, bypass=False))
        if marker:
            act.id = marker
            self._seen[key].append(Seen(marker, ""))

    async def _remove(self, port: Port, bucket: str, key: str) -> None:
        seen = self._choose(key)
        if bucket == PLAIN or seen is None:
            await self._mark(port, bucket, key)
            return
        bypass = bucket == VERSIONED and self.chance.random() < 0.4
        act = Removes(Kind.DELETE, key, id=seen.id, bypass=bypass)
        await self._note(act, port.delete(bucket, key, seen.id, Conditional(), bypass=bypass))

    async def _list(self, port: Port, bucket: str, key: str) -> None:
        act = Lists(Kind.READ, key)
        shown = await self._note(act, port.versions(bucket, key))
        if shown is not None:
            act.shown = tuple(shown)
            self._seen[key] = [Seen(version, etag) for version, etag in reversed(shown)]

    async def _get(self, port: Port, bucket: str, key: str) -> None:
        act = Gets(Kind.READ, key)
        act.etag = await self._note(act, port.current(bucket, key)) or ""

    # --- locks

    def _lock(self) -> Lock:
        """Some retentions end soon."""
        kind = self.chance.random()
        if kind < 0.25:
            return Lock(hold=True)
        seconds = self.chance.choice((1, 2, 3)) if self.short_locks and kind < 0.75 else DAY_S
        # in whole seconds, as documents have them
        until_s = self.now_ms() // 1000 + 1 + seconds
        return Lock(self.chance.choice((GOVERNANCE, GOVERNANCE, COMPLIANCE)), until_s * 1000)

    async def _retain(self, port: Port, bucket: str, key: str) -> None:
        seen = self._choose(key, objects=True)
        if seen is None:
            await self._put(port, bucket, key)
            return
        lock, bypass = self._lock()._replace(hold=False), self.chance.random() < 0.4
        if not lock.mode:
            lock = Lock(GOVERNANCE, (self.now_ms() // 1000 + DAY_S) * 1000)
        act = Retains(key=key, id=seen.id, mode=lock.mode, until_ms=lock.until_ms, bypass=bypass)
        await self._note(act, port.retain(bucket, key, seen.id, lock, bypass=bypass))

    async def _hold(self, port: Port, bucket: str, key: str) -> None:
        seen = self._choose(key, objects=True)
        if seen is None:
            await self._put(port, bucket, key)
            return
        act = Holds(key=key, id=seen.id, hold=self.chance.random() < 0.5)
        await self._note(act, port.hold(bucket, key, seen.id, on=act.hold))

    async def _head(self, port: Port, bucket: str, key: str) -> None:
        seen = self._choose(key, objects=True)
        if seen is None:
            await self._list(port, bucket, key)
            return
        act = Heads(Kind.READ, key, id=seen.id)
        act.lock = await self._note(act, port.lock_of(bucket, key, seen.id)) or UNLOCKED


def expiries(race: Race, keys: Sequence[str], *, after_ms: int) -> list[Operation]:
    """Expirations that lifecycle may have made on these keys, where noncurrent versions expire ``after_ms`` after they
    were made, or later. They are of versions that a client saw and the last list does not show, although no deletion of
    them was answered; and of versions that open requests made.
    """
    found: list[Operation] = []
    for key in keys:
        own = [one for one in race.history if one.key == key]
        lists = [one for one in own if isinstance(one, Lists)]
        listed = {version: etag for one in lists for version, etag in one.shown}
        made = {one.etag: one for one in own if isinstance(one, Adds)}
        told = {one.id: one for one in own if isinstance(one, Adds | Marks) and not one.open and one.answer == DONE}
        gone = {one.id for one in own if isinstance(one, Removes) and not one.open and one.answer == DONE}
        last = {version for version, _ in lists[-1].shown} if lists else set()
        for version in sorted((set(told) | set(listed)) - gone - last):
            act = told.get(version) or made.get(listed.get(version, ""))
            found.append(Expires(key=key, invoked=_due(race, act, after_ms), id=version))
        for one in own:
            etag = one.etag if isinstance(one, Adds) else ""
            if isinstance(one, Adds | Marks) and one.open and (not etag or etag not in listed.values()):
                found.append(Expires(key=key, invoked=_due(race, one, after_ms), id=UNSEEN, etag=etag))
    return found


def _due(race: Race, made: Act | None, after_ms: int) -> int:
    return race.moment_at(race.walls[made.invoked - 1] + after_ms) if made is not None else 0
