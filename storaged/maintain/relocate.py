"""Relocation: asks gateways to make records name the new places of recoded blocks.

Theory of operation. Only gateways change records. Repair writes blocks to new places, and the moves wait here, in
memory, until a gateway has verified them and changed the record (``mover``; ``moves`` has the contract). The task
``run`` asks: many moves in one call, one call at a time, while repair goes on with the next blocks. Old and new
fragments are both there meanwhile. What a restart makes this node forget is written again, and the sweep of orphans
finds what lies in places that no record names.

When no gateway takes the call, moves wait, and repair recodes nothing more (``away``): it only rebuilds in place, for
which no record changes. A move that a gateway can't verify now is asked again, a few times. One that the record does
not fit any more is dropped: its register is judged again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from storaged.errors import SlowDown, StoragedError
from storaged.maintain.context import MaintainContext, wait_for
from storaged.maintain.moves import (
    CALL_MAX,
    CHANGED,
    LATER,
    MOVED,
    MOVES_A_CALL,
    Cost,
    MoveAnswer,
    MoveAsk,
    MovesAnswer,
    MovesAsk,
    cost_of,
)
from storaged.maintain.rebuild import Move
from storaged.meta.names import RegisterName

ASK_TIMEOUT_S = 60.0
FIRST_ASK_TIMEOUT_S = 10.0
"""Used while no gateway took the last call, so that repair soon notices when one does."""
GATHER_S = 0.2
"""How long a call waits for more moves while there are few."""
BLOCKS_WAITING_MAX = 1024
"""Repair waits while this many blocks wait for a gateway."""
TRIES_MAX = 8
PAUSE_S, PAUSE_S_MAX = 1.0, 60.0


@dataclass
class _Waiting:
    """``since``: when its fragments were written. ``due``: when it is asked next."""

    ask: MoveAsk
    since: float
    due: float
    tries: int = 0

    @property
    def blocks(self) -> int:
        return self.ask.new.count


class Relocator:
    """The moves of one node. ``on_concluded(name, reason)`` is called when no move of the register (packed name) waits
    any more. ``reason``: why the last one was not made; empty when it was.
    """

    def __init__(self, context: MaintainContext, on_concluded: Callable[[bytes, str], None]) -> None:
        self._context = context
        self._on_concluded = on_concluded
        self._waiting: dict[bytes, list[_Waiting]] = {}
        self._came = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._asks_at = 0.0
        self._pause_s = PAUSE_S
        self.away = ""
        """Why no gateway answers; empty when the last call was answered."""
        self.moved = self.refused = 0
        """Blocks that records name in their new places; moves that a gateway refused."""

    def add(self, name: RegisterName, moves: Iterable[Move]) -> None:
        """Their fragments are durable in the new places."""
        now, packed = self._context.clock.monotonic(), name.pack()
        for move in moves:
            for ask in split(MoveAsk(packed, move.entry.data_id, move.old, move.new)):
                self._waiting.setdefault(packed, []).append(_Waiting(ask, now, now))
        self._note_room()
        self._came.set()

    def has(self, name: bytes) -> bool:
        """Moves of this register wait."""
        return name in self._waiting

    @property
    def blocks_waiting(self) -> int:
        return sum(one.blocks for waiting in self._waiting.values() for one in waiting)

    @property
    def busy(self) -> bool:
        """Moves wait, and gateways answer."""
        return bool(self._waiting) and not self.away

    async def room(self) -> None:
        """Returns when few blocks wait, or no gateway answers."""
        await self._room.wait()

    def _note_room(self) -> None:
        if self.away or self.blocks_waiting < BLOCKS_WAITING_MAX:
            self._room.set()
        else:
            self._room.clear()

    # --- asking -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever."""
        while True:
            if not self._waiting:
                await self._came.wait()
            self._came.clear()
            if self.blocks_waiting < BLOCKS_WAITING_MAX // 4:
                await asyncio.sleep(GATHER_S)
            pause_s = self._next_at() - self._context.clock.monotonic()
            if pause_s > 0:
                await wait_for(self._came, pause_s)
            await self.ask_due()

    def _next_at(self) -> float:
        dues = [one.due for waiting in self._waiting.values() for one in waiting]
        return max(self._asks_at, min(dues, default=0.0))

    async def ask_due(self) -> None:
        """One call with what is due, if anything is."""
        now = self._context.clock.monotonic()
        batch = self._due(now) if now >= self._asks_at else []
        if not batch:
            return
        ask = MovesAsk(tuple(one.ask for one in batch))
        try:
            timeout_s = FIRST_ASK_TIMEOUT_S if self.away else ASK_TIMEOUT_S
            found = await self._context.asks.ask("move", ask, MovesAnswer, timeout_s=timeout_s)
            if len(found.answers) != len(batch):
                raise SlowDown("a gateway answered about other moves than it was asked about")
        except StoragedError as error:
            self._pause(error)
            return
        self.away, self._pause_s = "", PAUSE_S
        for one, answer in zip(batch, found.answers, strict=True):
            self._take(one, answer)
        self._note_room()

    def _due(self, now: float) -> list[_Waiting]:
        """As many moves as go into a call, those of one register together."""
        found: list[_Waiting] = []
        cost = Cost()
        for waiting in self._waiting.values():
            for one in waiting:
                more = cost + cost_of(one.ask)
                if found and (len(found) >= MOVES_A_CALL or not more.within(CALL_MAX)):
                    return found
                if one.due <= now:
                    found.append(one)
                    cost = more
        return found

    def _pause(self, error: StoragedError) -> None:
        """No gateway answers: moves are asked again after a pause that doubles."""
        if not self.away:
            self._context.log(f"{self.blocks_waiting} blocks wait for a gateway to name their new places: {error}")
        self.away = error.message
        self._asks_at = self._context.clock.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, PAUSE_S_MAX)
        self._drop(self._too_old(), error.message)
        if not self._waiting:
            self.away = ""  # nothing would be asked any more, so the next block has to find out
        self._note_room()

    def _too_old(self) -> list[_Waiting]:
        """Moves whose fragments the sweep of orphans may find soon."""
        oldest = self._context.clock.monotonic() - self._context.limits.orphan_age_ms / 4000
        return [one for waiting in self._waiting.values() for one in waiting if one.since < oldest]

    def _take(self, one: _Waiting, answer: MoveAnswer) -> None:
        one.tries += 1
        if answer.code == LATER and one.tries < TRIES_MAX:
            pause_s = min(PAUSE_S * 2 ** (one.tries - 1), PAUSE_S_MAX)
            one.due = self._context.clock.monotonic() + pause_s
            return
        reason = "" if answer.code == MOVED else f"a gateway does not move its blocks: {answer.reason}"
        if answer.code == MOVED:
            self.moved += one.blocks
        elif answer.code != CHANGED:
            self.refused += answer.code != LATER
            self._context.log(f"{one.ask.name[18:98]!r}: {reason}")
        self._drop([one], reason)

    def _drop(self, some: Sequence[_Waiting], reason: str) -> None:
        for one in some:
            waiting = self._waiting[one.ask.name]
            waiting.remove(one)
            if not waiting:
                del self._waiting[one.ask.name]
                self._on_concluded(one.ask.name, reason)


def split(ask: MoveAsk) -> list[MoveAsk]:
    """As moves each of which fits into a call."""
    blocks = ask.new.count
    while blocks > 1 and not cost_of(_part_of(ask, 0, blocks)).within(CALL_MAX):
        blocks //= 2
    return [_part_of(ask, start, blocks) for start in range(0, ask.new.count, blocks)]


def _part_of(ask: MoveAsk, start: int, blocks: int) -> MoveAsk:
    count = min(blocks, ask.new.count - start)
    return msgspec.structs.replace(ask, new=msgspec.structs.replace(ask.new, first=ask.new.first + start, count=count))
