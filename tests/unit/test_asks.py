"""What storage nodes ask of gateways: queued, taken by one gateway or the next, answered, bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from storaged.cluster.ports import Call, PeerIdentity
from storaged.cluster.rpc import faults
from storaged.errors import NoSuchBucket, PeerRefused, PeerTimeout, PeerUnreachable, ServiceUnavailable, SlowDown
from storaged.maintain import asks as asks_module
from storaged.maintain.answers import NEVERS_BURST, Answers, settle_handler
from storaged.maintain.asks import (
    ASKS_MAX,
    HINTS_MAX,
    LEASE_S,
    NAMES_A_SETTLE,
    SETTLED,
    UNSETTLED,
    Answered,
    Asked,
    Asks,
    Settle,
    SettledNames,
    TakeAsks,
    TakenAsks,
)
from storaged.meta.names import RegisterName, Table, Value, Visibility, system_name
from storaged.wire import encode
from tests.sim.virtual import VirtualClock, VirtualLoop

NAME = RegisterName(Table.OBJECT, b"b" * 16, 3, b"key")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    loop = VirtualLoop()
    try:
        loop.run_until_complete(scenario)
    finally:
        loop.close()
    assert not loop.troubles, loop.troubles


def new_asks() -> Asks:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return Asks(VirtualClock(loop))


async def take(asks: Asks, node: str = "g1", **fields: Any) -> TakenAsks:
    call = Call(PeerIdentity(node, "FR", "par1", "a", ("gateway",)), memoryview(b""), 0.0)
    found = await asks.methods()["maintain.asks"].handler(TakeAsks(**{"room": 8, **fields}), call)
    assert isinstance(found, TakenAsks)
    return found


def settled(number: int) -> Answered:
    return Answered(number, encode(SettledNames((SETTLED,), ("",))))


def test_an_ask_waits_for_a_gateway_and_its_answer_comes_back() -> None:
    async def scenario() -> None:
        asks = new_asks()
        asked = asyncio.create_task(asks.settle(NAME))
        [one] = (await take(asks, wait_ms=1000)).asks
        assert one.request == encode(Settle((NAME.pack(),), True))
        assert not (await take(asks)).asks, "it is being worked on"
        await take(asks, answers=(settled(one.id),), room=0)
        await asked
        assert len(asks) == 0

    run(scenario())


def test_a_waiting_call_is_answered_at_once_when_something_is_asked() -> None:
    async def scenario() -> None:
        asks = new_asks()
        loop = asyncio.get_running_loop()
        waiting = asyncio.create_task(take(asks, wait_ms=60_000))
        await asyncio.sleep(0.5)
        asked = asyncio.create_task(asks.settle(NAME))
        began = loop.time()
        assert len((await waiting).asks) == 1
        assert loop.time() == began
        asked.cancel()
        began = loop.time()
        assert not (await take(asks, wait_ms=60_000)).asks
        assert loop.time() - began <= asks_module.WAIT_S_MAX + 0.1, "no call waits longer, whatever it says"

    run(scenario())


def test_an_ask_goes_to_the_next_gateway_when_the_first_is_gone_and_not_while_it_works() -> None:
    async def scenario() -> None:
        asks = new_asks()
        asked = asyncio.create_task(asks.settle(NAME))
        await asyncio.sleep(0)
        [one] = (await take(asks, "g1")).asks
        for _ in range(3):
            await asyncio.sleep(LEASE_S - 1)
            await take(asks, "g1", working=(one.id,), room=0)
            assert not (await take(asks, "g2", working=(one.id,))).asks, "another's name for it counts for nothing"
        await asyncio.sleep(LEASE_S + 1)
        assert (await take(asks, "g2")).asks == (one,)
        await take(asks, "g1", answers=(Answered(one.id + 77), settled(one.id)), room=0)
        await asked

    run(scenario())


def test_what_nobody_takes_or_answers_ends_with_what_is_known_of_it() -> None:
    async def scenario() -> None:
        asks = new_asks()
        with pytest.raises(PeerUnreachable, match="No gateway took"):
            await asks.ask("settle", Settle(()), SettledNames, timeout_s=5)
        asked = asyncio.create_task(asks.ask("settle", Settle(()), SettledNames, timeout_s=5))
        await asyncio.sleep(0)
        await take(asks, "g1")
        with pytest.raises(PeerTimeout, match="g1 took too long"):
            await asked
        with pytest.raises(ServiceUnavailable, match="none does now"):
            await asks.settle(NAME, timeout_s=1)
        assert len(asks) == 0

    run(scenario())


def test_errors_of_gateways_and_answers_that_can_not_be_are_refusals() -> None:
    async def scenario() -> None:
        asks = new_asks()
        for answer, code in (
            (Answered(0, error=faults.to_head(SlowDown("not now"))), "SlowDown"),
            (Answered(0, b"\xc1"), faults.BAD_REPLY),
        ):
            asked = asyncio.create_task(asks.ask("settle", Settle(()), SettledNames))
            await asyncio.sleep(0)
            [one] = (await take(asks)).asks
            await take(asks, answers=(Answered(one.id, answer.answer, answer.error),), room=0)
            with pytest.raises(PeerRefused) as refused:
                await asked
            assert refused.value.remote_code == code
        asked_one = asyncio.create_task(asks.settle(NAME))
        await asyncio.sleep(0)
        [one] = (await take(asks)).asks
        await take(asks, answers=(Answered(one.id, encode(SettledNames((), ()))),), room=0)
        with pytest.raises(ServiceUnavailable, match="other keys"):
            await asked_one

    run(scenario())


def test_asks_and_hints_are_bounded_and_a_hint_is_asked_for_once() -> None:
    async def scenario() -> None:
        asks = new_asks()
        tasks = [asyncio.create_task(asks.settle(NAME)) for _ in range(ASKS_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(SlowDown):
            await asks.settle(NAME)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for number in range(HINTS_MAX + 5):
            asks.hint(NAME._replace(key=b"%d" % (number // 2)))
        assert len(asks) == HINTS_MAX // 2 + 3
        for number in range(HINTS_MAX):
            asks.hint(NAME._replace(key=b"more %d" % number))
        assert len(asks) == HINTS_MAX
        assert asks.hints_dropped > 0

    run(scenario())


class Registers:
    """Of a gateway: keys say how settling goes."""

    def __init__(self) -> None:
        self.settled: list[bytes] = []

    async def settle(self, name: RegisterName) -> Value | None:
        await asyncio.sleep(0.01)
        if name.key == b"fenced":
            raise NoSuchBucket
        if name.key == b"final":
            raise NoSuchBucket(final="true")
        if name.key == b"away":
            raise ServiceUnavailable("no majority")
        self.settled.append(name.key)
        return self.written(name)

    @staticmethod
    def written(name: RegisterName) -> Value:
        return Value(1, b"o" * 16, Visibility.LIVE, name.key)


class Network:
    """The gateway's calls of one storage node, which may be away."""

    def __init__(self, asks: Asks) -> None:
        self.asks = asks
        self.away = False

    async def call(self, node: str, method: str, request: TakeAsks, reply: type, *, timeout_s: float) -> Any:
        await asyncio.sleep(0.001)
        if self.away:
            raise PeerUnreachable("away")
        call = Call(PeerIdentity("g1", "FR", "par1", "a", ("gateway",)), memoryview(b""), 0.0)
        return await self.asks.methods()[method].handler(request, call), memoryview(b"")


class OneNode:
    class current:
        class disk:
            node = "n1"

        disks = (disk,)


def test_a_gateway_settles_what_it_is_asked_and_says_what_came_of_each() -> None:
    async def scenario() -> None:
        asks, registers = new_asks(), Registers()
        log: list[str] = []
        network = Network(asks)
        gateway = asyncio.create_task(
            Answers(network, OneNode, {"settle": settle_handler(registers)}, log.append).run()  # type: ignore[arg-type]
        )
        value = await asks.settle(NAME)
        assert value is not None
        assert value.body == b"key"
        for key, final in ((b"fenced", None), (b"final", "true")):
            with pytest.raises(NoSuchBucket) as gone:
                await asks.settle(NAME._replace(key=key))
            assert gone.value.details.get("final") == final
        with pytest.raises(ServiceUnavailable, match="no majority"):
            await asks.settle(NAME._replace(key=b"away"))
        with pytest.raises(ServiceUnavailable, match="looked after by gateways"):
            await asks.settle(system_name("user/ann"))
        many = tuple(NAME._replace(key=b"%d" % number).pack() for number in range(NAMES_A_SETTLE))
        found = await asks.ask("settle", Settle((*many[1:], NAME._replace(key=b"away").pack())), SettledNames)
        assert found.results == (SETTLED,) * (NAMES_A_SETTLE - 1) + (UNSETTLED,)
        for wrong in ((*many, b"one more" * 4), (b"short",)):
            with pytest.raises(PeerRefused) as refused:
                await asks.ask("settle", Settle(wrong), SettledNames)
            assert refused.value.remote_code == faults.BAD_MESSAGE
        assert registers.settled[0] == b"key"
        assert not log
        network.away = True
        with pytest.raises(ServiceUnavailable):
            await asks.settle(NAME, timeout_s=5)
        network.away = False
        await asks.settle(NAME)
        gateway.cancel()
        await asyncio.gather(gateway, return_exceptions=True)

    run(scenario())


def test_a_node_has_so_many_registers_settled_that_were_never_written_and_no_more() -> None:
    class Empty:
        settled = 0

        async def settle(self, name: RegisterName) -> Value | None:
            self.settled += 1
            return Registers.written(name) if name.key == b"there" else None

    async def scenario() -> None:
        registers = Empty()
        settle = settle_handler(registers)  # type: ignore[arg-type]

        async def ask(node: str, *keys: bytes) -> SettledNames:
            found = await settle(node, Settle(tuple(NAME._replace(key=key).pack() for key in keys)))
            assert isinstance(found, SettledNames)
            return found

        hundred = [b"%d" % number for number in range(NAMES_A_SETTLE)]
        for _ in range(50):
            assert (await ask("honest", *[b"there"] * NAMES_A_SETTLE)).results == (SETTLED,) * NAMES_A_SETTLE
        calls = NEVERS_BURST // NAMES_A_SETTLE
        for _ in range(calls):
            assert set((await ask("n1", *hundred)).results) == {SETTLED}
        await ask("n1", b"one more")
        before = registers.settled
        refused = await ask("n1", *hundred)
        assert set(refused.results) == {UNSETTLED}
        assert "has to wait" in refused.reasons[0]
        assert registers.settled == before
        assert (await ask("honest", b"there")).results == (SETTLED,)
        await asyncio.sleep(1)
        assert (await ask("n1", b"there")).results == (SETTLED,)

    run(scenario())


def test_many_asks_at_once_are_each_answered_soon() -> None:
    """More than a gateway works on at the same time; answers that are ready while others are handed in are not lost."""

    async def scenario() -> None:
        asks, loop = new_asks(), asyncio.get_running_loop()
        registers = Registers()
        gateway = asyncio.create_task(
            Answers(Network(asks), OneNode, {"settle": settle_handler(registers)}, print).run()  # type: ignore[arg-type]
        )
        began = loop.time()
        await asyncio.gather(*(asks.settle(NAME._replace(key=b"%d" % number)) for number in range(100)))
        assert loop.time() - began < 1
        assert len(registers.settled) == 100
        gateway.cancel()
        await asyncio.gather(gateway, return_exceptions=True)

    run(scenario())


def test_hints_are_settled_by_the_hundred_and_those_that_fail_are_dropped() -> None:
    async def scenario() -> None:
        asks, registers = new_asks(), Registers()
        for number in range(250):
            asks.hint(NAME._replace(key=b"%d" % number))
        asks.hint(NAME._replace(key=b"away"))
        tasks = [
            asyncio.create_task(
                Answers(Network(asks), OneNode, {"settle": settle_handler(registers)}, print).run()  # type: ignore[arg-type]
            ),
            asyncio.create_task(asks.run()),
        ]
        await asyncio.sleep(5)
        assert sorted(registers.settled) == sorted(b"%d" % number for number in range(250))
        assert len(asks) == 0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario())


@pytest.mark.parametrize("reply", ["nothing", "the same again", "what can't be"])
def test_a_node_that_lets_no_call_wait_does_not_keep_a_gateway_busy(reply: str) -> None:
    class Hasty:
        calls = 0

        async def call(
            self, _node: str, _method: str, request: TakeAsks, *_: Any, **__: Any
        ) -> tuple[TakenAsks, bytes]:
            self.calls += 1
            await asyncio.sleep(0.001)
            number = {"nothing": 0, "the same again": 7}.get(reply, self.calls)
            return TakenAsks((Asked(number, "no kind", b""),) if number and request.room else ()), b""

    async def scenario() -> None:
        node = Hasty()
        gateway = asyncio.create_task(Answers(node, OneNode, {}, print).run())  # type: ignore[arg-type]
        await asyncio.sleep(10)
        assert node.calls < 2_000, "200 a second"
        gateway.cancel()
        await asyncio.gather(gateway, return_exceptions=True)

    run(scenario())
