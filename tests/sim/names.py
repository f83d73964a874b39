"""Clients rename, write, delete and read a few objects, through the program's own object plane: as ``races``, with one
history for all keys together.

The judge finds a moment for each request, in which it took effect at both of its keys: an object has one name at any
time, for all readers. Only one thing is not of one moment: who replaces or deletes an object while it is renamed may
find it under the new name afterwards, so a rename first sees its object, and moves it later, unless another rename did.

Requests of unknown outcome are sent again, with the same client token, to whatever gateway. Gateways pause and die, and
look for renames that have died. Small bodies are sealed anew, others are coded, and lent. Fragment stores never fail,
and the other parts of disks do so rarely: so most requests get through. In the end all keys are deleted, and their rows
go.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from storaged.errors import NoSuchKey, OutcomeUnknown, StoragedError
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import Visibility, object_name
from storaged.objects.api import BodyChecks, NewMeta, Renaming
from storaged.objects.plane import ObjectPlane
from storaged.objects.write.departures import end_old
from tests.doubles.disks import Disks
from tests.sim.cluster import Gateway, Weather
from tests.sim.linear import Kind, Operation
from tests.sim.parts import ClockJumps, Suspensions, Trouble
from tests.sim.races import OWNER, PlanePort, Races, bucket_of, pieces
from tests.sim.racing import PLAIN
from tests.sim.scenario import play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

KEYS = ("a", "b", "c")
CALLS = 7
"""Of each worker."""
CODED_BYTES = 70_000
OLD_MS = -(1 << 50)
"""Looks spare no rename because it is young."""
LOOKS_MAX = 8
"""At all keys in the end."""


class Object(NamedTuple):
    """``moved``: how often it was renamed."""

    etag: str
    moved: int = 0


class State(NamedTuple):
    """``seen``: what each rename wants to move. ``gone``: what renames have moved away. ``came``: by which rename."""

    under: tuple[Object | None, ...] = (None,) * len(KEYS)
    seen: frozenset[tuple[int, Object]] = frozenset()
    gone: frozenset[Object] = frozenset()
    came: frozenset[tuple[str, Object]] = frozenset()

    def at(self, key: str) -> Object | None:
        return self.under[KEYS.index(key)]

    def having(self, key: str, what: Object | None) -> State:
        at = KEYS.index(key)
        return self._replace(under=(*self.under[:at], what, *self.under[at + 1 :]))


@dataclass
class Act(Operation):
    """Of all keys together: to the checker they are one."""

    kind: Kind = Kind.PUT
    key: str = "all"
    invoked: int = 0
    at: str = ""
    etag: str = ""

    def step(self, state: Any) -> tuple[bool, Any]:
        return self.take_effect(state or State())

    def take_effect(self, state: State) -> tuple[bool, State]:
        raise NotImplementedError


class Puts(Act):
    def take_effect(self, state: State) -> tuple[bool, State]:
        return True, state.having(self.at, Object(self.etag))


class Deletes(Act):
    def take_effect(self, state: State) -> tuple[bool, State]:
        return True, state.having(self.at, None)


class Gets(Act):
    """No ETag: it found nothing."""

    def take_effect(self, state: State) -> tuple[bool, State]:
        there = state.at(self.at)
        return (there.etag if there is not None else "") == self.etag, state


@dataclass
class Sees(Act):
    """The first half of a rename."""

    number: int = 0

    def take_effect(self, state: State) -> tuple[bool, State]:
        there = state.at(self.at)
        if there is None:
            return False, state
        return True, state._replace(seen=state.seen | {(self.number, there)})


@dataclass
class Moves(Act):
    """The second half; ``at_once``: both. ``at``, ``to``: the keys. ``token``: of the client; a later request with it
    does nothing, as long as the object is there.
    """

    number: int = 0
    to: str = ""
    token: str = ""
    at_once: bool = False

    def take_effect(self, state: State) -> tuple[bool, State]:
        there = state.at(self.to)
        if not self.open and there is not None and (self.token, there) in state.came and there.etag == self.etag:
            return True, state
        wanted = next((what for number, what in state.seen if number == self.number), None)
        if self.at_once:
            wanted = state.at(self.at)
        if wanted is None or wanted in state.gone or (not self.open and wanted.etag != self.etag):
            return False, state
        now = Object(wanted.etag, wanted.moved + 1)
        if state.at(self.at) == wanted:
            state = state.having(self.at, None)
        came = state.came | {(self.token, now)}
        return True, state.having(self.to, now)._replace(gone=state.gone | {wanted}, came=came)


class Names(Races):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        bucket = bucket_of(PLAIN)
        self.names = {key: object_name(bucket.id, bucket.shard_numbers, key.encode()) for key in KEYS}
        self.last_seen = dict.fromkeys(self.names)
        self._number = 0
        self._disks = Disks(self.layout)

    def make_plane(self, gateway: Gateway) -> ObjectPlane:
        plane = super().make_plane(gateway)
        plane.stores = plane.liveness = self._disks  # type: ignore[assignment]
        return plane

    def join_parts(self) -> None:
        super().join_parts()
        self.parts = [part for part in self.parts if isinstance(part, Trouble | Suspensions | ClockJumps)]
        self.parts = [part for part in self.parts if self._chance.random() < 0.5]
        self.world.weather = Weather(0.0, 0.01, 0.05)

    async def worker(self, gateway: Gateway) -> None:
        chance = self._chance
        for _ in range(CALLS):
            await asyncio.sleep(chance.uniform(0, 0.05))
            self.found.operations += 1
            kind, key = chance.random(), chance.choice(KEYS)
            port = self._ports.of(gateway)
            if kind < 0.25:
                await self._put(port, key)
            elif kind < 0.32:
                await self._note(Deletes(Kind.DELETE, at=key), port.objects.delete(port.buckets[PLAIN], key.encode()))
            elif kind < 0.6:
                await self._get(port, key)
            elif kind < 0.68:
                with contextlib.suppress(StoragedError):
                    await end_old(port.plane, port.buckets[PLAIN], self.names[key], fresh_ms=OLD_MS)
            else:
                await self._rename(key, chance.choice([other for other in KEYS if other != key]))

    # --- requests

    async def _note(self, act: Act, work: Coroutine[Any, Any, Any]) -> bool:
        """False: nothing, or nobody knows what, was done."""
        act.invoked = self.moment()
        try:
            await work
        except NoSuchKey:
            act.etag = ""
        except (StoragedError, asyncio.CancelledError) as error:
            unknown = isinstance(error, OutcomeUnknown | asyncio.CancelledError)
            self.found.unknown += unknown
            self.found.refused += not unknown
            if unknown and act.kind is not Kind.READ:
                self.history.append(act)
            if isinstance(error, asyncio.CancelledError):
                raise
            return False
        act.returned = self.moment()
        self.history.append(act)
        return True

    async def _put(self, port: PlanePort, key: str) -> None:
        self._number += 1
        body = b"%d " % self._number
        if self._chance.random() < 0.5:
            body = body.ljust(CODED_BYTES, b".")
        await self._note(
            Puts(at=key, etag=hashlib.md5(body).hexdigest()),
            port.objects.put(
                port.buckets[PLAIN], key.encode(), pieces(body), NewMeta(), BodyChecks(size=len(body)), owner=OWNER
            ),
        )

    async def _get(self, port: PlanePort, key: str) -> None:
        act = Gets(Kind.READ, at=key)

        async def read() -> None:
            stream = await port.objects.get(port.buckets[PLAIN], key.encode())
            try:
                body = b"".join([bytes(piece) async for piece in stream.chunks()])
                act.etag = stream.info.etag
            finally:
                await stream.close()
            if hashlib.md5(body).hexdigest() != act.etag:
                self.complain(f"{key} has another body than its ETag says")

        await self._note(act, read())

    async def _rename(self, source: str, key: str) -> None:
        """Sent again until its outcome is known, or the client gives up."""
        self._number += 1
        token = f"token {self._number}" if self._chance.random() < 0.7 else ""
        for _ in range(3):
            gateway = self._chance.choice(self.gateways)
            if await self._rename_once(self._ports.of(gateway), source, key, token) or not token:
                return
            await asyncio.sleep(self._chance.uniform(0, 0.3))

    async def _rename_once(self, port: PlanePort, source: str, key: str, token: str) -> bool:
        self._number += 1
        began, number = self.moment(), self._number
        sees = Sees(Kind.CAS, invoked=began, at=source, number=number)
        moves = Moves(Kind.CAS, invoked=began, at=source, to=key, number=number, token=token or f"none {number}")
        asked = Renaming(source.encode(), key.encode(), token.replace(" ", ""))
        try:
            result = await port.objects.rename(port.buckets[PLAIN], asked)
        except NoSuchKey:
            missing = Gets(Kind.READ, invoked=began, at=source)
            missing.returned = self.moment()
            self.history.append(missing)
            return True
        except (StoragedError, asyncio.CancelledError) as error:
            self.found.unknown += 1
            self.history += [sees, moves]
            if isinstance(error, asyncio.CancelledError):
                raise
            return False
        moves.etag, moves.returned = result.etag, self.moment()
        self.history += [sees, moves]
        self.found.done["renames"] += 1
        return True

    # --- the end

    async def look_at_the_end(self, reader: Gateway) -> None:
        self.world.weather = Weather()
        await asyncio.sleep(1.0)
        port = self._ports.of(reader)
        await self._end_all(port)
        listed = list((await port.objects.list_objects(port.buckets[PLAIN])).keys)
        for key in KEYS:
            before = len(self.history)
            await self._get(port, key)
            if len(self.history) == before:
                self.complain(f"{key} cannot be read after everything healed")
                continue
            last = self.history[-1]
            assert isinstance(last, Gets)
            if bool(last.etag) != (key.encode() in listed):
                self.complain(f"{key} is listed, and can't be read" if not last.etag else f"{key} is not listed")
        for key in KEYS:
            await port.objects.delete(port.buckets[PLAIN], key.encode())
        await self._end_all(port)
        for key in KEYS:
            value = (await reader.client.read(self.names[key])).value
            if value is not None and value.visibility != Visibility.TOMBSTONE:
                self.complain(f"the row of {key} stays when all keys are deleted")

    async def _end_all(self, port: PlanePort) -> None:
        """All renames that have died, and all loans that nothing uses, end."""
        for _ in range(LOOKS_MAX):
            for key in KEYS:
                with contextlib.suppress(StoragedError):
                    await end_old(port.plane, port.buckets[PLAIN], self.names[key], fresh_ms=OLD_MS)
            await port.plane.background.settle()

    def judge(self) -> Verdicts:
        verdict = has_moments(self.history)
        self.found.done["judged"] = verdict is not None
        if verdict is False:
            self.complain("the history of all keys is not linearizable")
        self.history = []
        return super(Races, self).judge()


STATES_MAX = 8_000


def has_moments(history: Sequence[Operation]) -> bool | None:
    """Whether each request can have taken effect at one moment. None: there are too many possibilities."""
    acts = [act for act in history if isinstance(act, Act)]
    read = {act.etag for act in acts if not act.open and not isinstance(act, Puts)}
    acts = [act for act in acts if not (isinstance(act, Puts) and act.open and act.etag not in read)]
    at_once = [replace(act, at_once=True) if isinstance(act, Moves) and act.open else act for act in acts]
    found = _has_moments([act for act in at_once if not (isinstance(act, Sees) and act.open)])
    return _has_moments(acts) if found is False else found


def _has_moments(acts: list[Act]) -> bool | None:
    """As ``linear``, but what is of unknown outcome is tried last: most of that was never done."""
    acts.sort(key=lambda act: (act.open, act.returned, act.invoked))
    seen: set[tuple[int, State]] = set()
    closed = sum(1 << index for index, act in enumerate(acts) if not act.open)
    waiting: list[tuple[int, State]] = [(0, State())]
    while waiting:
        done, state = waiting.pop()
        if done & closed == closed:
            return True
        ends = next(act.returned for index, act in enumerate(acts) if not done >> index & 1)
        possible = []
        for index, act in enumerate(acts):
            if not done >> index & 1 and act.invoked < ends:
                fits, after = act.step(state)
                following = done | 1 << index, after
                if fits and following not in seen and (after != state or not act.open):
                    possible.append(following)
        if len(seen) + len(possible) > STATES_MAX:
            return None
        seen.update(possible)
        waiting += reversed(possible)
    return False


def run_names(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Names(seed, loop, rules))
