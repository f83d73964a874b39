"""What a storage node asks of gateways: a bounded queue, which gateways empty.

A storage node changes no register (``meta.authority``): where its background work needs one settled or changed, it asks
a gateway. Gateways often have no address. So they call: each gateway's first process fetches asks from every storage
node (``maintain.asks``, a call that waits for the next one) and hands in what came of them. ``answers`` is their side.

Theory of operation
    An ask has a kind, a request and an answer (``KINDS``). It waits until a gateway takes it. A gateway names the asks
    that it works on whenever it calls; an ask that is not named for ``LEASE_S`` is given to the next gateway that
    calls. So it may be carried out twice, and each kind must bear that. The first answer counts.

    An asker may be malicious: the gateway verifies every request itself, and believes nothing that it can find out.
    Each kind says how.

    Hints are registers to be settled at some time; no caller waits for them. They are a set, so a register that is
    found again is asked for once. What does not fit is found again by the next walk.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple, TypeVar

import msgspec

from storaged.clock import Clock
from storaged.cluster.ports import Call, Method, Methods
from storaged.cluster.rpc import faults
from storaged.cluster.rpc.authority import grant
from storaged.cluster.rpc.framing import ErrorHead
from storaged.errors import NoSuchBucket, PeerRefused, PeerTimeout, PeerUnreachable, ServiceUnavailable, SlowDown
from storaged.ids import Entropy, system_entropy
from storaged.maintain.moves import DiscardAsk, MovesAnswer, MovesAsk
from storaged.meta.names import RegisterName, Value
from storaged.wire import MALFORMED, Message, decode, encode

T = TypeVar("T", bound=Message)

LEASE_S = 6.0
"""A gateway that works on an ask calls at least every ``WAIT_S_MAX`` and a little more."""

WAIT_S_MAX = 2.0
ASKS_MAX = 1_000
"""Asks whose askers wait, of all kinds."""

HINTS_MAX = 10_000
NAMES_A_SETTLE = 100
ANSWER_TIMEOUT_S = 30.0
ASK_BYTES_MAX = 4 * 1024 * 1024
"""Of one ask. Also of all asks in one reply, but for the first."""


class Settle(Message, frozen=True):
    """Commit an identity round of each of these registers (packed names, up to ``NAMES_A_SETTLE``) at a new ballot.
    ``value``: there is one name, and its value is wanted.
    """

    names: tuple[bytes, ...]
    value: bool = False


SETTLED, UNSETTLED, FENCED, FENCED_FOR_EVER = range(4)


class SettledNames(Message, frozen=True):
    """For each name what came of it: SETTLED (a round was committed), UNSETTLED (not now: no majority, say), FENCED
    (the bucket is being deleted), FENCED_FOR_EVER (it was). ``reasons``: of the others in words, else empty. ``value``:
    what the round committed, where it was wanted.
    """

    results: tuple[int, ...]
    reasons: tuple[str, ...]
    value: Value | None = None


class EndLoans(Message, frozen=True):
    """Look at the loans of these objects (packed names, up to ``NAMES_A_SETTLE``), and end those that nothing uses."""

    names: tuple[bytes, ...]


class EndedLoans(Message, frozen=True):
    """``failed``: how many of the objects could not be looked at now."""

    failed: int


class Divide(Message, frozen=True):
    """Code what these objects (packed names, up to ``NAMES_A_SETTLE``) keep whole."""

    names: tuple[bytes, ...]


class DividedNames(Message, frozen=True):
    """For each name why some of it stays whole, now or until it is written again; empty when nothing does."""

    reasons: tuple[str, ...]


class AskKind(NamedTuple):
    """``request``, ``answer``: their messages. ``why``: what storage nodes need it for. ``verified``: what the gateway
    checks. ``harm``: what a hostile storage node can do with it.
    """

    request: type[Message]
    answer: type[Message]
    why: str
    verified: str
    harm: str


KINDS: Final[Mapping[str, AskKind]] = {
    "discard": AskKind(
        DiscardAsk,
        MovesAnswer,
        "a fragment that is not its block's own is where repair has to write",
        "that the survivors of the block agree on other hashes (``discard``)",
        "makes the gateway read blocks, at a bounded rate",
    ),
    "divide": AskKind(
        Divide,
        DividedNames,
        "the layout trusts no operator alone, and objects from before lie whole on disks",
        "names of objects; the gateway reads the records itself, and codes only what is whole",
        "makes the gateway read records, at a bounded rate",
    ),
    "loans": AskKind(
        EndLoans,
        EndedLoans,
        "records lend data to other keys, and what borrowed it may be gone",
        "names of objects; the gateway reads the records itself, and ends a loan only after a round of the borrower",
        "makes the gateway read records, at a bounded rate",
    ),
    "move": AskKind(
        MovesAsk,
        MovesAnswer,
        "repair has written blocks to other disks, and their records have to name these",
        "the record, the bucket's signed countries, the layout's domains, that all new fragments are durable and what"
        " the survivors say (``moves``)",
        "has blocks that are below target moved to other allowed disks",
    ),
    "settle": AskKind(
        Settle,
        SettledNames,
        "catch-up of rows on which no majority agrees; collection; damaged rows",
        "names of registers outside of the system table; the gateway makes the round itself",
        "has registers settled again and again, which delays writes of their keys",
    ),
}


class Asked(Message, frozen=True):
    """``request``: the encoded message of its kind."""

    id: int
    kind: str
    request: bytes


class Answered(Message, frozen=True):
    """``answer``: the encoded message of the kind, empty when ``error`` says why there is none."""

    id: int
    answer: bytes = b""
    error: ErrorHead | None = None


class TakeAsks(Message, frozen=True):
    """Hands in ``answers``, says which asks are being worked on (``working``), and takes up to ``room`` more; waits for
    the first up to ``wait_ms``.
    """

    answers: tuple[Answered, ...] = ()
    working: tuple[int, ...] = ()
    room: int = 0
    wait_ms: int = 0


class TakenAsks(Message, frozen=True):
    asks: tuple[Asked, ...] = ()


class _Waiting:
    """An ask that has no answer yet. ``taken_at``: when a gateway named it last; None: none has it."""

    __slots__ = ("answered", "ask", "taken_at", "taken_by")

    def __init__(self, ask: Asked) -> None:
        self.ask = ask
        self.answered: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self.taken_at: float | None = None
        self.taken_by = ""


class Asks:
    """One per storage node. ``ask``, ``settle`` and ``hint`` may be called at any time; ``run`` sends the hints."""

    def __init__(
        self, clock: Clock, log: Callable[[str], None] = lambda line: None, entropy: Entropy = system_entropy
    ) -> None:
        self._clock = clock
        self._log = log
        self._ids = itertools.count(int.from_bytes(entropy(6), "big"))  # answers to an earlier life mean nothing
        self._waiting: dict[int, _Waiting] = {}
        self._hints: dict[bytes, None] = {}
        self._came = asyncio.Event()
        self.answered = self.unanswered = self.hints_dropped = 0

    def __len__(self) -> int:
        """Asks and hints that wait."""
        return len(self._waiting) + len(self._hints)

    # --- asking -------------------------------------------------------------------------------------------------------

    async def ask(self, kind: str, request: Message, answer: type[T], *, timeout_s: float = ANSWER_TIMEOUT_S) -> T:
        """What a gateway answers. Raises PeerUnreachable when none took the ask in time, PeerTimeout when one did and
        did not answer (it may yet carry it out), PeerRefused with the code of a gateway's error, SlowDown when too many
        wait.
        """
        assert isinstance(request, KINDS[kind].request), kind
        if len(self._waiting) >= ASKS_MAX:
            raise SlowDown(f"{len(self._waiting)} questions to gateways wait for an answer.")
        waiting = _Waiting(Asked(next(self._ids), kind, encode(request)))
        if len(waiting.ask.request) > ASK_BYTES_MAX:
            raise ValueError(f"an ask of {len(waiting.ask.request)} bytes")
        self._waiting[waiting.ask.id] = waiting
        self._came.set()
        try:
            async with asyncio.timeout(timeout_s):
                found = await waiting.answered
        except TimeoutError:
            self.unanswered += 1
            if waiting.taken_at is None:
                raise PeerUnreachable("No gateway took what this node asked; it asks again later.") from None
            raise PeerTimeout(f"{waiting.taken_by} took too long with what this node asked.") from None
        finally:
            del self._waiting[waiting.ask.id]
        self.answered += 1
        if found.error is not None:
            raise faults.from_head(found.error, waiting.taken_by)
        try:
            return decode(found.answer, answer)
        except MALFORMED as error:
            raise PeerRefused(f"{waiting.taken_by} answers what cannot be read: {error}", faults.BAD_REPLY) from None

    async def settle(self, name: RegisterName, timeout_s: float = ANSWER_TIMEOUT_S) -> Value | None:
        """Has a gateway commit an identity round of this register. Returns the value.

        Raises as ``Registers.settle``: ServiceUnavailable, NoSuchBucket (with the detail ``final``).
        """
        try:
            found = await self.ask("settle", Settle((name.pack(),), True), SettledNames, timeout_s=timeout_s)
        except (PeerUnreachable, PeerRefused) as error:
            raise ServiceUnavailable(f"A gateway has to settle this key, and none does now: {error.message}") from None
        if len(found.results) != 1 or len(found.reasons) != 1:
            raise ServiceUnavailable("A gateway answers for other keys than it was asked.")
        result = found.results[0]
        if result in (FENCED, FENCED_FOR_EVER):
            raise NoSuchBucket(**({"final": "true"} if result == FENCED_FOR_EVER else {}))
        if result != SETTLED:
            raise ServiceUnavailable(f"A gateway could not settle this key now: {found.reasons[0]}")
        return found.value

    # --- hints --------------------------------------------------------------------------------------------------------

    def hint(self, name: RegisterName) -> None:
        """This register should be settled at some time."""
        if len(self._hints) < HINTS_MAX:
            self._hints[name.pack()] = None
        else:
            self.hints_dropped += 1

    async def run(self, interval_s: float = 0.5) -> None:
        """Sends hints, for ever. Those that no gateway settles are dropped: the walk finds them again."""
        while True:
            await asyncio.sleep(interval_s)
            while self._hints:
                await self._send(list(self._hints)[:NAMES_A_SETTLE])

    async def _send(self, names: list[bytes]) -> None:
        try:
            found = await self.ask("settle", Settle(tuple(names)), SettledNames)
        except (PeerUnreachable, PeerRefused, SlowDown) as error:
            self._log(f"{len(names)} registers are not settled now: {error.message}")
        else:
            failed = [reason for reason in found.reasons if reason]
            if failed:
                self._log(f"{len(failed)} of {len(names)} registers are not settled now, the first: {failed[0]}")
        finally:
            for name in names:
                self._hints.pop(name, None)

    # --- what gateways call -------------------------------------------------------------------------------------------

    def methods(self) -> Methods:
        return grant({"maintain.asks": Method(TakeAsks, self._take)})

    async def _take(self, request: TakeAsks, call: Call) -> TakenAsks:
        self._hand_in(request.answers, call.peer.name)
        now = self._clock.monotonic()
        for number in request.working:
            waiting = self._waiting.get(number)
            if waiting is not None and waiting.taken_by == call.peer.name:
                waiting.taken_at = now
        if request.room <= 0:
            return TakenAsks()
        until = now + min(request.wait_ms / 1000, WAIT_S_MAX)
        while True:
            taken = self._free(request.room, call.peer.name)
            remaining_s = until - self._clock.monotonic()
            if taken or remaining_s <= 0:
                return TakenAsks(tuple(taken))
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(remaining_s, LEASE_S)):
                    await self._came.wait()

    def _hand_in(self, answers: Iterable[Answered], node: str) -> None:
        for answer in answers:
            waiting = self._waiting.get(answer.id)
            if waiting is not None and not waiting.answered.done():
                waiting.taken_by = node
                waiting.answered.set_result(answer)

    def _free(self, room: int, node: str) -> list[Asked]:
        """Asks that no gateway works on, in their order."""
        now = self._clock.monotonic()
        found: list[Asked] = []
        size = 0
        for waiting in self._waiting.values():
            if len(found) >= room:
                break
            leased = waiting.taken_at is not None and now - waiting.taken_at < LEASE_S
            if leased or waiting.answered.done():
                continue
            size += len(waiting.ask.request)
            if found and size > ASK_BYTES_MAX:
                break
            waiting.taken_at, waiting.taken_by = now, node
            found.append(waiting.ask)
        return found


def names_in(request: Settle | EndLoans | Divide) -> list[RegisterName]:
    """Raises PeerRefused for names that can't be."""
    if len(request.names) > NAMES_A_SETTLE:
        raise PeerRefused(f"{len(request.names)} names at once", faults.BAD_MESSAGE)
    try:
        return [RegisterName.unpack(name) for name in request.names]
    except (ValueError, IndexError, msgspec.MsgspecError) as error:
        raise PeerRefused(f"not the name of a register: {error}", faults.BAD_MESSAGE) from None
