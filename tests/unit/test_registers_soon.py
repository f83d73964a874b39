"""A change without a task: its callback gets what a change with a task returns or raises, once, whatever its replicas
do; and it gives its turn back.
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.cluster.partitions import PartitionRecord
from storaged.errors import OutcomeUnknown, PreconditionFailed, ServiceUnavailable, SlowDown
from storaged.meta import messages
from storaged.meta.client import RingClient
from storaged.meta.names import Ballot, Change, RegisterName, Value
from storaged.meta.ports import Outcome, SmallCopies, Update
from tests.patience import GUARD_S
from tests.unit.test_registers_client import DISKS, NAME, Refused, Ring, fail_with, later_us, put

pytestmark = pytest.mark.virtual_time

COPIES = SmallCopies(b"D" * 16, [(b"D" * 16, [b"payload"])] * 3, lambda disks: len(disks) >= 2)


@pytest.fixture
async def ring() -> AsyncIterator[Ring]:
    made = Ring()
    yield made
    for client in made.clients:
        await client.close()


def begun(
    client: RingClient,
    update: Update,
    small: SmallCopies | None = None,
    *,
    regardless: bool = False,
    name: RegisterName = NAME,
) -> asyncio.Future[Outcome | Exception]:
    """What ``try_change`` tells. A second telling is an InvalidStateError."""
    told: asyncio.Future[Outcome | Exception] = asyncio.get_running_loop().create_future()
    assert client.try_change(name, update, told.set_result, small=small, regardless=regardless)
    return told


async def test_what_was_changed_is_told_and_read_back_and_counted(ring: Ring) -> None:
    client = ring.client()
    first = await begun(client, put(b"one"))
    second = await begun(client, lambda _: Change(b"two", payload=b"D" * 16), COPIES)
    assert isinstance(first, Outcome)
    assert isinstance(second, Outcome)
    assert (first.before, second.before) == (None, first.after)
    assert (await client.read(NAME)).value == second.after
    assert sum(map(len, ring.copies.values())) >= 2
    assert client.statistics().changes == 2
    assert client.statistics().calls_in_flight <= 1  # the third replica's


async def test_who_comes_while_it_is_somebody_elses_turn_waits_for_its_own(ring: Ring) -> None:
    client = ring.client()
    first, second = begun(client, put(b"one")), begun(client, lambda _: Change(b"two", payload=b"D" * 16), COPIES)
    third = asyncio.create_task(client.change(NAME, put(b"three")))
    await asyncio.sleep(0)
    fourth = begun(client, fail_with(Refused()))
    befores = [outcome.before for outcome in (await first, await second, await third) if isinstance(outcome, Outcome)]
    assert [value and value.body for value in befores] == [None, b"one", b"two"]
    assert isinstance(await fourth, Refused)
    assert client.statistics().preempted == 0
    assert client.statistics().changes == 4


async def test_turns_are_as_many_as_for_tasks(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    client = ring.client()
    monkeypatch.setattr(client._queue._turns, "_waiting_max", 2)
    told = [begun(client, put(b"one")) for _ in range(4)]
    outcomes = [await outcome for outcome in told]
    assert [isinstance(outcome, Outcome) for outcome in outcomes] == [True, True, False, False]
    assert all(isinstance(outcome, SlowDown) for outcome in outcomes[2:])


async def test_while_replicas_are_being_exchanged_it_takes_a_task(ring: Ring) -> None:
    client = ring.client()
    ring.layouts.partitions.learn(PartitionRecord(NAME.partition, 1, DISKS, DISKS, 1))
    assert isinstance(await begun(client, put(b"one")), Outcome)
    assert (await client.read(NAME)).value is not None


async def test_what_waits_for_its_turn_when_its_client_closes_is_told(ring: Ring) -> None:
    client = ring.client()
    for replica in ring.replicas.values():
        replica.stuck.add("prepare")
    told = [begun(client, put(b"one")) for _ in range(2)]
    await asyncio.sleep(0.005)
    await client.close()
    outcomes = [await asyncio.wait_for(outcome, 1) for outcome in told]
    assert all(isinstance(outcome, ServiceUnavailable) for outcome in outcomes)


@pytest.mark.parametrize("stage", ["prepare", "accept"])
async def test_a_change_that_others_are_in_the_way_of_goes_on_and_is_told_once(ring: Ring, stage: str) -> None:
    client, other = ring.client(), Ballot(1, later_us(), "other", b"12345678")

    def between(_: Value | None) -> Change:
        if client.statistics().preempted == 0 and stage == "accept":
            for replica in ring.replicas.values():
                assert replica.inner.try_prepare(messages.Prepare(replica.inner.disk, NAME, other)) is not None
        return Change(b"one", payload=b"D" * 16)

    for replica in ring.replicas.values():
        await replica.inner.prepare(
            messages.Prepare(replica.inner.disk, NAME if stage == "prepare" else NAME._replace(key=b"other"), other)
        )
    outcome = await begun(client, between, COPIES)
    assert isinstance(outcome, Outcome)
    assert client.statistics().preempted > 0
    assert (await client.read(NAME)).value == outcome.after
    assert isinstance(await begun(client, put(b"two")), Outcome)


async def test_a_replica_that_is_away_is_not_noticed(ring: Ring) -> None:
    client = ring.client()
    ring.second.away = True
    assert isinstance(await begun(client, put(b"one")), Outcome)
    assert isinstance(await begun(client, lambda _: Change(b"two", payload=b"D" * 16), COPIES), Outcome)


async def test_what_the_update_raises_is_told_and_changes_nothing(ring: Ring) -> None:
    client = ring.client()
    assert isinstance(await begun(client, fail_with(Refused()), COPIES), Refused)
    assert (await client.read(NAME)).value is None
    await begun(client, put(b"one"))
    ring.second.away = True  # so that what the refusal rests on is not settled by the first round alone
    await ring.accept_at(ring.third, b"half", later_us(), sequence=2)
    assert isinstance(await begun(client, fail_with(Refused())), Refused)
    assert isinstance(await begun(client, put(b"two")), Outcome)


@pytest.mark.parametrize("copied", [False, True])
async def test_a_small_object_that_is_refused_waits_for_no_copy_of_its_own_where_it_settles_what_it_found(
    ring: Ring, copied: bool
) -> None:
    client = ring.client(deadline_s=1.0)
    await ring.accept_at(ring.first, b"half", 1)
    ring.third.away = True
    small = COPIES if copied else None
    assert isinstance(await begun(client, fail_with(Refused()), small), Refused)
    with pytest.raises(Refused):
        await client.change(NAME, fail_with(Refused()), small=small)
    reading = await client.read(NAME)
    assert reading.value is not None
    assert reading.value.body == b"half"


async def test_an_update_that_declines_changes_nothing(ring: Ring) -> None:
    client = ring.client()
    written = await begun(client, put(b"one"))
    assert isinstance(written, Outcome)
    assert await begun(client, lambda _: None) == Outcome(written.after, written.after)


@pytest.mark.parametrize("stuck", ["prepare", "accept"])
async def test_a_change_whose_replicas_never_answer_is_told_at_its_deadline(ring: Ring, stuck: str) -> None:
    client = ring.client(deadline_s=0.2)
    for replica in (ring.first, ring.second):
        replica.stuck.add(stuck)
    async with asyncio.timeout(GUARD_S):
        told = await begun(client, put(b"one"))
        assert isinstance(told, OutcomeUnknown if stuck == "accept" else ServiceUnavailable)
        for replica in (ring.first, ring.second):
            replica.stuck.clear()
        assert isinstance(await begun(client, put(b"two")), Outcome)


@pytest.mark.parametrize("stuck", ["prepare", "accept"])
@pytest.mark.parametrize("later", [False, True], ids=["in the first round", "when it has gone on"])
async def test_a_client_that_closes_tells_what_it_does_not_go_on_with(ring: Ring, stuck: str, later: bool) -> None:
    client = ring.client(deadline_s=0.3)
    for replica in ring.replicas.values():
        replica.stuck.add(stuck)
    told = begun(client, put(b"one"))
    await asyncio.sleep(0.2 if later else 0.005)
    assert not told.done()
    await client.close()
    outcome = await asyncio.wait_for(told, 1)
    assert isinstance(outcome, ServiceUnavailable)
    assert isinstance(outcome, OutcomeUnknown) == (stuck == "accept")
    assert not client.try_change(NAME, put(b"never"), lambda _: pytest.fail("told"))


@pytest.mark.parametrize("turns", range(6))
async def test_a_client_that_closes_at_once_tells_all_the_same(ring: Ring, turns: int) -> None:
    client = ring.client(deadline_s=0.3)
    for replica in ring.replicas.values():
        replica.deaf.add("accept")
    told = begun(client, put(b"one"))
    for _ in range(turns):
        await asyncio.sleep(0)
    await client.close()
    assert isinstance(await asyncio.wait_for(told, 1), ServiceUnavailable)


async def test_a_mistake_in_what_judges_it_is_told_and_gives_its_turn_back(ring: Ring) -> None:
    def mistaken(_disks: frozenset[str]) -> bool:
        raise RuntimeError("a mistake")

    client = ring.client()
    async with asyncio.timeout(2):
        found = await begun(client, lambda _: Change(b"one", payload=b"D" * 16), replace(COPIES, enough=mistaken))
        assert isinstance(found, RuntimeError)
        assert isinstance(await begun(client, put(b"two")), Outcome)


async def test_a_mistake_in_asking_leaves_nothing_that_goes_on(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    client = ring.client()
    fanout = client._ring.fanout
    send = fanout.send

    def mistaken(*asked: Any, **options: Any) -> None:
        send(*asked, **options)
        raise RuntimeError("a mistake")

    monkeypatch.setattr(fanout, "send", mistaken)
    with pytest.raises(RuntimeError):
        client.try_change(NAME, put(b"one"), lambda _: pytest.fail("told"))
    monkeypatch.undo()
    await asyncio.sleep(0.02)
    assert (await client.read(NAME)).value is None
    assert isinstance(await begun(client, put(b"two")), Outcome)


@pytest.mark.parametrize("settled", [True, False], ids=["in the first round", "when it has gone on"])
async def test_a_refusal_leaves_no_garbage(ring: Ring, settled: bool) -> None:
    client, refusals = ring.client(), list[weakref.ref[Exception]]()
    over = asyncio.Event()

    def noted(refusal: Exception) -> Exception:
        refusals.append(weakref.ref(refusal))
        return refusal

    def refuse(_value: Value | None) -> Change:
        raise noted(PreconditionFailed())  # no variable of this frame has it

    def then(outcome: Outcome | Exception) -> None:
        assert isinstance(outcome, PreconditionFailed)
        over.set()

    if not settled:
        await ring.accept_at(ring.first, b"half", 1)
    gc.disable()
    try:
        assert client.try_change(NAME, refuse, then, small=replace(COPIES, enough=lambda _disks: True))
        await asyncio.wait_for(over.wait(), GUARD_S)
        await asyncio.sleep(0)
        assert [refusal() for refusal in refusals] == [None] * len(refusals)
    finally:
        gc.enable()
