"""Turns at a contended register: the queue at a replica, and what a process makes of its answers, whatever they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from storaged.errors import InvalidRequest, PeerUnreachable, ServiceUnavailable
from storaged.meta.acceptor import turns
from storaged.meta.acceptor.turns import TurnKeeper
from storaged.meta.consensus.quorums import View
from storaged.meta.messages import TURN_GRANTED, TURN_QUEUED, TURN_REFUSED, Turn, TurnReply
from storaged.meta.names import RegisterName, Table
from storaged.meta.proposer import contention
from storaged.meta.proposer.contention import Contention
from storaged.meta.transport.calls import TaskPool
from tests.sim.virtual import VirtualClock, VirtualLoop, run

NAME = RegisterName(Table.OBJECT, b"bucket 123456789", 3, b"key")
OTHER = NAME._replace(key=b"other")


def on_virtual_time(test: Callable[[], object]) -> None:
    run(VirtualLoop(), test())  # type: ignore[arg-type]


@dataclass
class Asker:
    """A process of a node that asks a keeper."""

    keeper: TurnKeeper
    process: bytes
    node: str = "g1"
    replies: list[TurnReply] = field(default_factory=list)

    def ask(self, number: int = 1, *, end: bool = False, name: RegisterName = NAME) -> None:
        self.keeper.ask(self.node, Turn("d0", name, self.process, number, end), self.replies.append)

    @property
    def states(self) -> list[int]:
        return [reply.state for reply in self.replies]


def askers(count: int, keeper: TurnKeeper, node: str = "g1") -> list[Asker]:
    return [Asker(keeper, b"process%d" % number, node) for number in range(count)]


# --- the queue at a replica -------------------------------------------------------------------------------------------


def test_processes_get_turns_in_the_order_of_their_requests() -> None:
    async def play() -> None:
        keeper = TurnKeeper()
        first, second, third = askers(3, keeper)
        for asker in (first, second, third):
            asker.ask()
        assert (first.states, second.states, third.states) == ([TURN_GRANTED], [], [])
        assert not first.replies[0].shared
        first.ask(end=True)
        assert (second.states, third.states) == ([TURN_GRANTED], [])
        assert second.replies[0].shared
        second.ask(end=True)
        assert third.states == [TURN_GRANTED]
        third.ask(end=True)
        assert len(keeper) == 0

    on_virtual_time(play)


def test_registers_have_queues_of_their_own() -> None:
    async def play() -> None:
        first, second = askers(2, TurnKeeper())
        first.ask()
        second.ask(name=OTHER)
        assert second.states == [TURN_GRANTED]

    on_virtual_time(play)


def test_a_request_that_waits_is_answered_soon_and_keeps_its_place() -> None:
    async def play() -> None:
        first, second, third = askers(3, TurnKeeper())
        first.ask()
        second.ask()
        await asyncio.sleep(turns.POLL_S)
        assert second.states == [TURN_QUEUED]
        assert second.replies[0].waited_ms == 1000 * turns.POLL_S
        third.ask()
        first.ask(end=True)
        assert third.states == []
        second.ask()
        assert second.states == [TURN_QUEUED, TURN_GRANTED]

    on_virtual_time(play)


def test_a_process_that_does_not_ask_again_loses_its_place() -> None:
    async def play() -> None:
        first, second, third = askers(3, TurnKeeper())
        first.ask()
        second.ask()
        await asyncio.sleep(turns.POLL_S)
        first.ask(2)  # a turn that it keeps for long
        for _ in range(3):
            await asyncio.sleep(turns.LEASE_S)
            third.ask()
        await asyncio.sleep(turns.LEASE_S)
        assert TURN_GRANTED in third.states
        assert TURN_GRANTED not in second.states

    on_virtual_time(play)


def test_the_next_request_of_a_process_ends_its_turn() -> None:
    async def play() -> None:
        first, second = askers(2, TurnKeeper())
        first.ask(1)
        second.ask()
        first.ask(2)
        assert second.states == [TURN_GRANTED]
        second.ask(end=True)
        assert first.states == [TURN_GRANTED, TURN_GRANTED]
        first.ask(1, end=True)  # it comes late, and is of the turn before
        second.ask(2)
        assert second.states == [TURN_GRANTED, TURN_GRANTED]

    on_virtual_time(play)


def test_a_turn_that_is_not_ended_is_over_after_its_lease() -> None:
    async def play() -> None:
        first, second = askers(2, TurnKeeper())
        first.ask()
        second.ask()
        await asyncio.sleep(turns.LEASE_S - turns.POLL_S / 2)
        second.ask()
        await asyncio.sleep(turns.POLL_S / 2 + 0.01)
        assert second.states == [TURN_QUEUED, TURN_GRANTED]

    on_virtual_time(play)


def test_a_node_whose_turns_run_out_gets_none_for_a_while() -> None:
    async def play() -> None:
        keeper = TurnKeeper()
        hostile, honest = Asker(keeper, b"hostile0", "g1"), Asker(keeper, b"honest00", "g2")
        for number in range(1, turns.RUN_OUT_MAX + 1):
            hostile.ask(number, name=NAME)
            await asyncio.sleep(turns.LEASE_S + 0.01)
        hostile.ask(99)
        assert hostile.states[-1] == TURN_REFUSED
        honest.ask()
        assert honest.states == [TURN_GRANTED]
        await asyncio.sleep(turns.REFUSED_S)
        hostile.ask(100, name=OTHER)
        assert hostile.states[-1] == TURN_GRANTED

    on_virtual_time(play)


def test_a_turn_is_renewed_while_its_process_asks_for_it_and_not_for_ever() -> None:
    async def play() -> None:
        first, second = askers(2, TurnKeeper())
        first.ask()
        for _ in range(3):
            second.ask()
            await asyncio.sleep(turns.LEASE_S / 2)
            first.ask()
        assert first.states == [TURN_GRANTED] * 4
        assert TURN_GRANTED not in second.states
        began = asyncio.get_running_loop().time()
        while TURN_GRANTED not in second.states:
            second.ask()
            await asyncio.sleep(0.1)
            if second.states[-1] != TURN_GRANTED:
                first.ask()
        assert asyncio.get_running_loop().time() - began < turns.RENEWED_MAX_S

    on_virtual_time(play)


def test_a_slow_node_that_ends_its_turns_late_is_not_refused() -> None:
    async def play() -> None:
        slow = Asker(TurnKeeper(), b"slow0000")
        for number in range(1, 2 * turns.RUN_OUT_MAX):
            slow.ask(number)
            await asyncio.sleep(turns.LEASE_S + 0.01)
            slow.ask(number, end=True)
        assert set(slow.states) == {TURN_GRANTED}

    on_virtual_time(play)


def test_when_a_turn_took_long_the_node_s_other_processes_wait_for_the_others() -> None:
    async def play() -> None:
        keeper = TurnKeeper()
        (slow, sibling), other = askers(2, keeper, "g1"), Asker(keeper, b"other000", "g2")
        for asker in (slow, sibling, other):
            asker.ask()
        await asyncio.sleep(turns.LEASE_S - turns.POLL_S / 2)
        sibling.ask()
        other.ask()
        slow.ask(end=True)
        assert (sibling.states, other.states) == ([TURN_QUEUED], [TURN_QUEUED, TURN_GRANTED])

    on_virtual_time(play)


def test_what_waits_is_bounded() -> None:
    async def play() -> None:
        keeper = TurnKeeper()
        for number in range(turns.REGISTERS_MAX + 1):
            last = Asker(keeper, b"process0")
            last.ask(name=NAME._replace(key=b"%d" % number))
        assert (len(keeper), last.states) == (turns.REGISTERS_MAX, [TURN_REFUSED])
        keeper = TurnKeeper()
        ones = [Asker(keeper, b"%8d" % number) for number in range(turns.WAITING_A_NODE_MAX + 2)]
        for one in ones:
            one.ask()
        assert ones[-1].states == [TURN_REFUSED]
        several = [Asker(keeper, b"%8d" % number, f"n{number}") for number in range(turns.WAITING_MAX)]
        for one in several:
            one.ask()
        assert several[-1].states == [TURN_REFUSED]

    on_virtual_time(play)


@pytest.mark.parametrize(
    "request_",
    [
        Turn("d0", NAME, b"short", 1),
        Turn("d0", NAME, b"process0", 0),
        Turn("d0", NAME, b"process0", 1 << 62),
        Turn("d0", NAME._replace(key=b""), b"process0", 1),
        Turn("d0", NAME._replace(scope=b"x"), b"process0", 1),
        Turn("d0", NAME._replace(key=bytes(5000)), b"process0", 1),
    ],
)
def test_what_is_no_request_for_a_turn_is_refused(request_: Turn) -> None:
    keeper = TurnKeeper()
    with pytest.raises(InvalidRequest):
        keeper.ask("g1", request_, lambda reply: None)
    assert len(keeper) == 0


# --- a process --------------------------------------------------------------------------------------------------------


@dataclass
class Replica:
    """``answer(request)`` returns a reply, or raises. None: it hangs."""

    answer: Callable[[Turn], TurnReply | None]
    asked: list[Turn] = field(default_factory=list)

    async def turn(self, request: Turn, *, timeout_s: float = 10.0) -> TurnReply:
        self.asked.append(request)
        reply = self.answer(request)
        if reply is None:
            await asyncio.sleep(3600)
            raise AssertionError("nobody waits so long")
        return reply


def granting(hold_ms: int = 250, *, shared: bool = True) -> Replica:
    return Replica(lambda request: TurnReply(TURN_GRANTED, hold_ms, shared))


def _away(request: Turn) -> TurnReply:
    raise PeerUnreachable("away")


class Process:
    """A process, and the replicas that it asks."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = dict(zip(("d0", "d1", "d2"), [*replicas, granting(), granting(), granting()], strict=False))
        clock = VirtualClock(asyncio.get_running_loop())  # type: ignore[arg-type]
        view = View.of(1, ("d0", "d1", "d2"))
        self.lost = False
        """A layout came, and where registers are now is still to be learnt."""

        def view_of(_name: RegisterName) -> View:
            if self.lost:
                raise ServiceUnavailable("This node has not read yet which partitions have moved.")
            return view

        self.contention = Contention(self, view_of, TaskPool(), clock, lambda count: bytes(count))

    def replica(self, disk: str) -> Replica:
        return self.replicas[disk]

    def asked(self, disk: str) -> int:
        return sum(not request.end for request in self.replicas[disk].asked)

    async def ended(self, disk: str) -> bool:
        await asyncio.sleep(0)
        return any(request.end for request in self.replicas[disk].asked)


def test_a_register_is_contended_until_a_while_after_the_last_sign_of_others() -> None:
    async def play() -> None:
        contended = Process().contention
        assert not contended.expected(NAME)
        contended.met(NAME)
        assert contended.expected(NAME)
        assert not contended.expected(OTHER)
        await asyncio.sleep(contention.HOT_S + 0.1)
        assert not contended.expected(NAME)

    on_virtual_time(play)


def test_a_turn_is_for_the_changes_that_waited_when_it_came() -> None:
    async def play() -> None:
        process = Process()
        for _ in range(3):
            assert await process.contention.take(NAME, 3, 5.0)
        assert process.asked("d0") == 1
        assert await process.contention.take(NAME, 1, 5.0)
        assert process.asked("d0") == 2

    on_virtual_time(play)


def test_a_turn_is_not_used_for_longer_than_it_lasts() -> None:
    async def play() -> None:
        process = Process(granting(hold_ms=50))
        assert await process.contention.take(NAME, 9, 5.0)
        await asyncio.sleep(0.06)
        assert await process.contention.take(NAME, 9, 5.0)
        assert process.asked("d0") == 2

    on_virtual_time(play)


def test_no_turn_is_taken_where_it_is_not_known_who_gives_it() -> None:
    """The task of a change that asks for a turn would end with an error that nobody handles."""

    async def play() -> None:
        process = Process(granting(hold_ms=50))
        process.lost = True
        assert not await process.contention.take(NAME, 1, 5.0)
        process.lost = False
        assert await process.contention.take(NAME, 1, 5.0)
        process.lost = True
        await asyncio.sleep(0.06)
        assert not await process.contention.take(NAME, 1, 5.0)
        assert await process.ended("d0")

    on_virtual_time(play)


def test_a_turn_is_ended_when_no_change_waits() -> None:
    async def play() -> None:
        process = Process()
        await process.contention.take(NAME, 1, 5.0)
        process.contention.end(NAME)
        assert await process.ended("d0")
        process.contention.end(NAME)  # no-op

    on_virtual_time(play)


@pytest.mark.parametrize(
    "answer",
    [_away, lambda request: None, lambda request: TurnReply(TURN_REFUSED), lambda request: TurnReply(77)],
    ids=["away", "hangs", "refuses", "answers something else"],
)
def test_another_replica_is_asked_when_the_first_gives_no_turn(answer: Callable[[Turn], TurnReply | None]) -> None:
    async def play() -> None:
        process = Process(Replica(answer))
        began = asyncio.get_running_loop().time()
        assert await process.contention.take(NAME, 1, 5.0)
        assert process.asked("d1") == 1
        assert await process.ended("d0"), "it may have given the turn"
        assert asyncio.get_running_loop().time() - began <= contention.ASKS * contention.SILENT_S + 0.01

    on_virtual_time(play)


def test_a_replica_that_dies_while_processes_wait_is_noticed_within_a_second() -> None:
    async def play() -> None:
        answers = [TurnReply(TURN_QUEUED)] * 2
        process = Process(Replica(lambda request: answers.pop() if answers else None))
        began = asyncio.get_running_loop().time()
        assert await process.contention.take(NAME, 1, 5.0)
        assert process.asked("d1") == 1
        assert asyncio.get_running_loop().time() - began < 1.0

    on_virtual_time(play)


def test_a_message_that_is_lost_divides_no_processes() -> None:
    async def play() -> None:
        keeper, silent = TurnKeeper(), [True]
        process, other = Process(), Asker(keeper, b"process9")
        other.ask()

        class Lossy(Replica):
            async def turn(self, request: Turn, *, timeout_s: float = 10.0) -> TurnReply:
                self.asked.append(request)
                if silent and silent.pop():
                    await asyncio.sleep(3600)
                return await keeper.turn(request)

        process.replicas["d0"] = Lossy(lambda request: None)
        asyncio.get_running_loop().call_later(0.4, lambda: other.ask(end=True))
        assert await process.contention.take(NAME, 1, 5.0)
        assert process.asked("d1") == 0

    on_virtual_time(play)


def test_a_replica_that_gives_no_turn_costs_a_bounded_wait_and_is_not_asked_again_soon() -> None:
    async def play() -> None:
        process = Process(Replica(lambda request: TurnReply(TURN_QUEUED)))
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await process.contention.take(NAME, 1, 10.0)
        assert loop.time() - began <= contention.WAIT_S + contention.PAUSE_S
        asked = process.asked("d0")
        assert asked <= contention.WAIT_S / contention.PAUSE_S + 1, "it is not asked as often as it answers"
        process.contention.end(NAME)
        assert await process.contention.take(NAME, 1, 10.0)
        assert process.asked("d0") == asked

    on_virtual_time(play)


def test_without_any_replica_a_change_goes_on_without_a_turn() -> None:
    async def play() -> None:
        process = Process(Replica(_away), Replica(_away), Replica(_away))
        assert not await process.contention.take(NAME, 1, 5.0)

    on_virtual_time(play)


def test_after_a_useless_turn_the_turns_of_a_quorum_are_taken_for_a_while() -> None:
    async def play() -> None:
        process = Process()
        await process.contention.take(NAME, 1, 5.0)
        for _ in range(contention.PREEMPTED_MAX + 1):
            assert process.contention.preempted(NAME)
        process.contention.end(NAME)
        await process.contention.take(NAME, 1, 5.0)
        assert [process.asked(disk) for disk in ("d0", "d1", "d2")] == [2, 1, 0]
        process.contention.end(NAME)
        assert await process.ended("d0")
        assert await process.ended("d1")
        await asyncio.sleep(contention.CAREFUL_S + 0.1)
        await process.contention.take(NAME, 1, 5.0)
        assert [process.asked(disk) for disk in ("d0", "d1", "d2")] == [3, 1, 0]

    on_virtual_time(play)


def test_a_single_pre_emption_in_a_turn_shows_a_slow_clock_at_most() -> None:
    async def play() -> None:
        process = Process()
        for _ in range(5):
            await process.contention.take(NAME, 1, 5.0)
            process.contention.preempted(NAME)
            process.contention.end(NAME)
        assert process.asked("d1") == 0

    on_virtual_time(play)


def test_a_turn_is_renewed_while_a_change_takes_long() -> None:
    async def play() -> None:
        process = Process()
        await process.contention.take(NAME, 1, 5.0)
        await asyncio.sleep(contention.RENEW_S * 2.5)
        assert [request.number for request in process.replicas["d0"].asked] == [1, 1, 1]
        process.contention.end(NAME)
        await asyncio.sleep(contention.RENEW_S * 2)
        assert process.asked("d0") == 3

    on_virtual_time(play)


def test_a_slow_replica_is_not_asked_for_a_while() -> None:
    async def play() -> None:
        process = Process()
        fast = process.replicas["d0"].turn

        async def slow(request: Turn, *, timeout_s: float = 10.0) -> TurnReply:
            await asyncio.sleep(contention.SLOW_S * 1.5)
            return await fast(request)

        process.replicas["d0"].turn = slow  # type: ignore[method-assign]
        for _ in range(contention.SLOW_ANSWERS):
            await process.contention.take(NAME, 1, 5.0)
        assert process.asked("d1") == 0
        await process.contention.take(NAME, 1, 5.0)
        assert process.asked("d1") == 1
        process.contention.end(NAME)
        await asyncio.sleep(contention.AVOID_S + 0.1)
        await process.contention.take(NAME, 1, 5.0)
        assert process.asked("d1") == 1

    on_virtual_time(play)


def test_a_change_that_is_given_up_while_it_waits_leaves_the_queue() -> None:
    async def play() -> None:
        process = Process(Replica(lambda request: None))
        waiting = asyncio.ensure_future(process.contention.take(NAME, 1, 5.0))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert await process.ended("d0")

    on_virtual_time(play)


def test_a_process_that_stops_ends_its_turns_and_takes_none() -> None:
    async def play() -> None:
        process = Process()
        await process.contention.take(NAME, 1, 5.0)
        process.contention.close()
        assert await process.ended("d0")
        assert not await process.contention.take(NAME, 1, 5.0)
        await asyncio.sleep(contention.RENEW_S * 2)
        assert process.asked("d0") == 1

    on_virtual_time(play)


def test_a_node_that_is_no_gateway_asks_for_no_turn() -> None:
    async def play() -> None:
        process = Process()
        process.contention.enabled = False
        process.contention.met(NAME)
        assert not process.contention.expected(NAME)
        assert not await process.contention.take(NAME, 1, 5.0)
        assert process.asked("d0") == 0

    on_virtual_time(play)
