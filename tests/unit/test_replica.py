"""One acceptor over a disk that is slow on command, loses power, fails or rots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog.testing
import xxhash

from storaged.cluster.layout import SYSTEM_PARTITION
from storaged.cluster.partitions import epoch_of
from storaged.cluster.ports import Call, PeerIdentity, Reply
from storaged.errors import DiskForeign, DiskUnusable, InvalidRequest, SlowDown
from storaged.meta import messages
from storaged.meta.acceptor import disk_writes
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.consensus.acceptor import HIGH_WATER_BLOCK_US, AcceptorState
from storaged.meta.consensus.register import COUNTER_AHEAD_MAX_US, COUNTER_MAX, Verdict
from storaged.meta.messages import ScanRequest, ShardAsk
from storaged.meta.names import ZERO_BALLOT, Ballot, RegisterName, Table, Value, Visibility, system_name
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.scan import Want
from storaged.meta.storage.small_copies import PlainCopies
from storaged.meta.store_ports import Copy, Done, Fence, NotInMemory, Slot, StoreBatch, StoreFull
from storaged.meta.transport.replicas import ReplicaHost
from storaged.wire import Buffer
from tests.doubles.meta_store import MemoryMetaStore
from tests.patience import GUARD_S

SCOPE = b"s" * 16
NAME = RegisterName(Table.OBJECT, SCOPE, 3, b"key")
OTHER = RegisterName(Table.OBJECT, SCOPE, 3, b"other")


class SlowDisk:
    """A sync that waits until it is let through."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.syncs = 0

    async def sync(self) -> None:
        self.syncs += 1
        await self.open.wait()


class FixedClock:
    def __init__(self, now_ms: int) -> None:
        self.now_ms = now_ms

    def monotonic(self) -> float:
        return self.now_ms / 1000

    def wall_ms(self) -> int:
        return self.now_ms


def ballot(counter: int, epoch: int = 1, node: str = "gw") -> Ballot:
    return Ballot(epoch, counter, node, b"incarnat")


def value(body: bytes = b"v", sequence: int = 1, payload: bytes = b"") -> Value:
    return Value(sequence, b"o" * 16, Visibility.LIVE, body, payload)


def prepare(at: Ballot, name: RegisterName = NAME, **more: bytes) -> messages.Prepare:
    return messages.Prepare("d", name, at, **more)


def accept(
    at: Ballot, what: Value, name: RegisterName = NAME, *, nonce: bytes = b"", identity: bool = False
) -> messages.Accept:
    return messages.Accept("d", name, at, what, nonce, identity)


async def read(replica: LocalReplica, **more: object) -> messages.ReadReply:
    reply, _ = await replica.read(messages.Read("d", NAME, 1, **more))  # type: ignore[arg-type]
    return reply


async def settle_tasks() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_an_accepted_value_is_told_by_prepares_and_reads() -> None:
    replica = LocalReplica("d", MemoryMetaStore())
    assert (await replica.prepare(prepare(ballot(10)))).accepted == ZERO_BALLOT
    assert (await replica.accept(accept(ballot(10), value()))).verdict == Verdict.OK
    reply = await replica.prepare(prepare(ballot(11)))
    assert (reply.verdict, reply.accepted, reply.value) == (Verdict.OK, ballot(10), value())
    full, digest = await read(replica), await read(replica, full=False)
    assert full.value == value()
    assert digest.value is None
    assert digest.digest == full.digest != b""


async def test_a_promise_refuses_lower_ballots_and_says_how_high_to_go() -> None:
    replica = LocalReplica("d", MemoryMetaStore())
    await replica.prepare(prepare(ballot(10)))
    for refused in (await replica.prepare(prepare(ballot(9))), await replica.accept(accept(ballot(9), value()))):
        assert refused.verdict == Verdict.PREEMPTED
        assert refused.promised == ballot(10)


async def test_a_refused_accept_says_whether_its_value_was_never_taken_here() -> None:
    replica = LocalReplica("d", MemoryMetaStore())
    await replica.prepare(prepare(ballot(10)))
    assert (await replica.accept(accept(ballot(10), value()))).verdict == Verdict.OK
    await replica.prepare(prepare(ballot(12)))
    never = await replica.accept(accept(ballot(11), value()))
    assert (never.verdict, never.final) == (Verdict.PREEMPTED, True)
    taken = await replica.accept(accept(ballot(10), value()))  # it comes again
    assert (taken.verdict, taken.final) == (Verdict.PREEMPTED, False)
    await replica.accept(accept(ballot(12), value()))
    unsure = await replica.accept(accept(ballot(11), value()))
    assert (unsure.verdict, unsure.final) == (Verdict.PREEMPTED, False)


async def test_a_promise_says_which_other_one_it_overrides() -> None:
    replica = LocalReplica("d", MemoryMetaStore())
    assert (await replica.prepare(prepare(ballot(10)))).promised == ZERO_BALLOT
    overriding = await replica.prepare(prepare(ballot(11)))
    assert (overriding.promised, overriding.accepted) == (ballot(10), ZERO_BALLOT)
    await replica.accept(accept(ballot(11), value()))
    after = await replica.prepare(prepare(ballot(12)))
    assert after.promised == after.accepted == ballot(11)


async def test_an_accept_is_neither_answered_nor_revealed_before_it_is_synced() -> None:
    disk = SlowDisk()
    replica = LocalReplica("d", MemoryMetaStore(sync=disk.sync))
    await replica.prepare(prepare(ballot(10)))
    disk.open.clear()
    accepting = asyncio.create_task(replica.accept(accept(ballot(10), value())))
    await settle_tasks()
    reading = asyncio.create_task(read(replica))
    preparing = asyncio.create_task(replica.prepare(prepare(ballot(11))))
    elsewhere = asyncio.create_task(replica.prepare(prepare(ballot(11), OTHER)))
    await settle_tasks()
    assert [task.done() for task in (accepting, reading, preparing, elsewhere)] == [False, False, False, True]
    disk.open.set()
    assert (await accepting).verdict == Verdict.OK
    assert (await reading).accepted == ballot(10)
    assert (await preparing).value == value()


async def test_an_accept_whose_asker_went_away_still_arrives_and_keeps_others_waiting() -> None:
    disk = SlowDisk()
    replica = LocalReplica("d", MemoryMetaStore(sync=disk.sync))
    await replica.prepare(prepare(ballot(10)))
    disk.open.clear()
    accepting = asyncio.create_task(replica.accept(accept(ballot(10), value())))
    await settle_tasks()
    accepting.cancel()
    reading = asyncio.create_task(read(replica))
    await settle_tasks()
    assert not reading.done()
    disk.open.set()
    assert (await reading).accepted == ballot(10)


async def test_promises_cost_no_sync_within_a_block_and_hold_after_a_restart() -> None:
    disk = SlowDisk()
    store = MemoryMetaStore(sync=disk.sync)
    replica = LocalReplica("d", store)
    for counter in range(1000, 1100):
        await replica.prepare(prepare(ballot(counter)))
    assert disk.syncs == 1
    store.crash()
    restarted = LocalReplica("d", store)
    for name in (NAME, OTHER):
        refused = await restarted.accept(accept(ballot(1099), value(), name))
        assert refused.verdict == Verdict.PREEMPTED
        assert refused.promised.counter >= 1099
    beyond = refused.promised.counter + 1
    assert (await restarted.prepare(prepare(ballot(beyond)))).verdict == Verdict.OK


async def test_a_promise_beyond_the_high_water_ballot_waits_for_the_disk() -> None:
    disk = SlowDisk()
    store = MemoryMetaStore(sync=disk.sync)
    replica = LocalReplica("d", store)
    await replica.prepare(prepare(ballot(1)))
    disk.open.clear()
    far = ballot(1 + 2 * HIGH_WATER_BLOCK_US)
    promising = asyncio.create_task(replica.prepare(prepare(far)))
    await settle_tasks()
    assert not promising.done()
    disk.open.set()
    assert (await promising).verdict == Verdict.OK
    assert (await LocalReplica("d", store).accept(accept(far, value()))).verdict == Verdict.PREEMPTED


async def test_the_promise_evicted_from_a_full_table_binds_every_register() -> None:
    replica = LocalReplica("d", MemoryMetaStore(), promises_max=2)
    for counter, key in ((30, b"a"), (10, b"b"), (11, b"c")):
        await replica.prepare(prepare(ballot(counter), RegisterName(Table.OBJECT, SCOPE, 3, key)))
    assert replica.statistics().promises == 2
    assert replica.statistics().promises_evicted == 1
    assert (await replica.prepare(prepare(ballot(29)))).verdict == Verdict.PREEMPTED
    assert (
        await replica.accept(accept(ballot(29), value(), RegisterName(Table.OBJECT, SCOPE, 3, b"a")))
    ).verdict == Verdict.PREEMPTED
    assert (await replica.prepare(prepare(ballot(31)))).verdict == Verdict.OK


async def test_one_ballot_with_two_values_is_refused_and_counted() -> None:
    replica = LocalReplica("d", MemoryMetaStore())
    await replica.accept(accept(ballot(10), value(b"one")))
    assert (await replica.accept(accept(ballot(10), value(b"one")))).verdict == Verdict.OK
    assert (await replica.accept(accept(ballot(10), value(b"two")))).verdict == Verdict.CONFLICT
    assert replica.statistics().ballot_conflicts == 1
    assert (await read(replica)).value == value(b"one")


async def test_the_epoch_fence_refuses_older_layouts_for_good() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    await replica.accept(accept(ballot(10), value()))
    assert (await replica.fence_epoch(messages.EpochFence("d", 2))).epoch == 2
    assert (await replica.fence_epoch(messages.EpochFence("d", 1))).epoch == 2
    for fenced in (replica, LocalReplica("d", store)):
        assert (await fenced.prepare(prepare(ballot(10**15)))).verdict == Verdict.EPOCH
        assert (await fenced.accept(accept(ballot(10**15), value()))).verdict == Verdict.EPOCH
        assert (await read(fenced)).verdict == Verdict.EPOCH
        ask = (ShardAsk(3, b"", 10, Want.ALL, 100, 10_000),)
        assert (await fenced.scan(ScanRequest("d", 1, Table.OBJECT, SCOPE, ask))).verdict == Verdict.EPOCH
        assert (await fenced.scan(ScanRequest("d", 2, Table.OBJECT, SCOPE, ask))).verdict == Verdict.OK
    assert (await replica.prepare(prepare(ballot(1, epoch=2)))).verdict == Verdict.OK


# --- steps of partitions


PARTITION = NAME.partition
STEP_1, STEP_2 = epoch_of(1, 1), epoch_of(2, 1)


async def is_refused(replica: LocalReplica, epoch: int, name: RegisterName = NAME) -> bool:
    """Whether every request of this epoch is told EPOCH; else none is."""
    counter = 10**15
    ask = (ShardAsk(name.shard, b"", 10, Want.ALL, 100, 10_000, epoch=epoch),)
    told = [
        (await replica.read(messages.Read("d", name, epoch)))[0].verdict,
        (await replica.scan(ScanRequest("d", 1, Table.OBJECT, name.scope, ask))).verdict,
        (await replica.prepare(prepare(ballot(counter, epoch=epoch), name))).verdict,
        (await replica.accept(accept(ballot(counter, epoch=epoch), value(), name))).verdict,
    ]
    assert len({verdict == Verdict.EPOCH for verdict in told}) == 1, told
    rows = replica.try_rows(epoch, [name.pack()])
    assert (rows == [None]) == (replica.try_row(epoch, name.pack()) is None) == (told[0] == Verdict.EPOCH)
    return told[0] == Verdict.EPOCH


def elsewhere() -> RegisterName:
    """A register of another partition."""
    return next(name for shard in range(256) if (name := NAME._replace(shard=shard)).partition != PARTITION)


def test_a_packed_name_has_the_epoch_of_its_partition() -> None:
    state = AcceptorState(ZERO_BALLOT, 1, epochs={PARTITION: STEP_2, SYSTEM_PARTITION: STEP_1})
    for name in (NAME, NAME._replace(key=b"another"), elsewhere(), system_name("bucket/b"), NAME, elsewhere()):
        assert state.epoch_at_packed(name.pack()) == state.epoch_at(name)
    assert state.epoch_at_packed(NAME.pack()) == epoch_of(2, 0)
    assert state.epoch_at_packed(elsewhere().pack()) == 1


async def test_a_partition_that_moves_refuses_its_earlier_steps_for_good_and_others_go_on() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    assert (await replica.fence_epoch(messages.EpochFence("d", STEP_1, PARTITION))).epoch == STEP_1
    assert (await replica.fence_epoch(messages.EpochFence("d", 1, PARTITION))).epoch >= 1 << 32
    for life in (replica, LocalReplica("d", store)):
        assert await is_refused(life, 7)
        assert not await is_refused(life, 7, elsewhere())
        assert not await is_refused(life, STEP_1)
        assert not await is_refused(life, epoch_of(1, 2))
    assert not await is_refused(replica, STEP_2)
    assert await is_refused(replica, STEP_1)


@pytest.mark.parametrize("kind", ["prepare", "accept", "create"])
async def test_the_first_ballot_of_a_later_step_is_answered_when_the_step_is_on_disk(kind: str) -> None:
    disk = SlowDisk()
    store = MemoryMetaStore(sync=disk.sync)
    replica = LocalReplica("d", store)
    for epoch, name in ((1, NAME), (STEP_1, elsewhere())):  # high-water ballots are on disk
        await replica.prepare(prepare(ballot(9, epoch=epoch), name))
    disk.open.clear()
    later = ballot(10, epoch=STEP_1)
    requests = {
        "prepare": lambda: replica.prepare(prepare(later)),
        "accept": lambda: replica.accept(accept(later, value())),
        "create": lambda: replica.accept(messages.Create("d", NAME, later, value())),
    }
    asked = asyncio.ensure_future(requests[kind]())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not asked.done()
    assert (await replica.prepare(prepare(ballot(11)))).verdict == Verdict.EPOCH
    disk.open.set()
    assert (await asked).verdict == Verdict.OK
    assert await is_refused(LocalReplica("d", store), 1)


async def test_what_one_partition_promised_in_a_later_step_stops_no_other_after_a_restart() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store, promises_max=1)
    for number in range(5):
        await replica.prepare(prepare(ballot(1000 + number, epoch=STEP_2), NAME._replace(key=b"%d" % number)))
    life = LocalReplica("d", store)
    assert (await life.prepare(prepare(ballot(900, epoch=STEP_2)))).verdict == Verdict.PREEMPTED
    assert (await life.prepare(prepare(ballot(900), elsewhere()))).verdict == Verdict.OK
    assert (await replica.prepare(prepare(ballot(900), elsewhere()))).verdict == Verdict.OK
    assert (await replica.prepare(prepare(ballot(900, epoch=STEP_2), NAME._replace(key=b"0")))).verdict == (
        Verdict.PREEMPTED
    )


async def test_a_restart_refuses_what_lies_below_the_promises_of_the_same_step() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    await replica.prepare(prepare(ballot(1_000, epoch=STEP_1)))
    await replica.prepare(prepare(ballot(2_000), elsewhere()))
    life = LocalReplica("d", store)
    assert (await life.accept(accept(ballot(999, epoch=STEP_1), value()))).verdict == Verdict.PREEMPTED
    assert (await life.accept(accept(ballot(1_999), value(), elsewhere()))).verdict == Verdict.PREEMPTED


async def test_a_fence_of_a_step_is_answered_when_what_was_accepted_before_can_be_read() -> None:
    disk = SlowDisk()
    store = MemoryMetaStore(sync=disk.sync)
    replica = LocalReplica("d", store)
    disk.open.clear()
    accepted = asyncio.ensure_future(replica.accept(accept(ballot(10), value())))
    await asyncio.sleep(0)
    fenced = asyncio.ensure_future(replica.fence_epoch(messages.EpochFence("d", STEP_1, PARTITION)))
    await asyncio.sleep(0)
    assert not fenced.done()
    disk.open.set()
    await fenced
    assert store.get(NAME) is not None
    assert (await accepted).verdict == Verdict.OK


async def test_a_bucket_is_not_fenced_for_a_caller_that_does_not_know_a_step() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    old, new = {PARTITION: 1, elsewhere().partition: 1}, {PARTITION: STEP_1}
    assert (await replica.fence(messages.FenceSet("d", SCOPE, b"1", epochs=old))).done
    await replica.fence_epoch(messages.EpochFence("d", STEP_1, PARTITION))
    refused = messages.FenceReply(False, Verdict.EPOCH)
    assert await replica.unfence(messages.FenceLift("d", SCOPE, b"1", old)) == refused
    assert await replica.fence(messages.FenceSet("d", SCOPE, b"2", epochs=old)) == refused
    assert store.get_fence(SCOPE) == Fence(SCOPE, b"1", final=False)
    assert (await replica.unfence(messages.FenceLift("d", SCOPE, b"1", new))).done
    assert (await replica.fence(messages.FenceSet("d", SCOPE, b"2", epochs=new))).done


async def test_a_fence_of_a_step_is_answered_when_a_bucket_fence_from_before_is_on_disk() -> None:
    disk = SlowDisk()
    store = MemoryMetaStore(sync=disk.sync)
    replica = LocalReplica("d", store)
    disk.open.clear()
    before = asyncio.ensure_future(replica.fence(messages.FenceSet("d", SCOPE, b"1", epochs={PARTITION: 1})))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    fenced = asyncio.ensure_future(replica.fence_epoch(messages.EpochFence("d", STEP_1, PARTITION)))
    await asyncio.sleep(0)
    assert not fenced.done()
    disk.open.set()
    await fenced
    assert store.get_fence(SCOPE) is not None
    assert (await before).done


# --- bucket fences


async def test_a_bucket_fence_survives_restart_and_passes_only_settling_rounds_with_its_nonce() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    await replica.accept(accept(ballot(10), value()))
    assert (await replica.fence(messages.FenceSet("d", SCOPE, b"nonce"))).done
    now = 10**15
    for fenced in (replica, LocalReplica("d", store)):
        now += 10
        assert (await fenced.prepare(prepare(ballot(now)))).verdict == Verdict.FENCED
        assert (await fenced.accept(accept(ballot(now), value(b"w")))).verdict == Verdict.FENCED
        assert (await fenced.accept(accept(ballot(now), value(b"w"), nonce=b"nonce"))).verdict == Verdict.FENCED
        assert (
            await fenced.accept(accept(ballot(now), value(), nonce=b"wrong", identity=True))
        ).verdict == Verdict.FENCED
        assert (await fenced.prepare(prepare(ballot(now), nonce=b"nonce"))).verdict == Verdict.OK
        assert (await fenced.accept(accept(ballot(now), value(), nonce=b"nonce", identity=True))).verdict == Verdict.OK
    assert (await read(replica)).value == value()


async def test_a_fence_binds_objects_uploads_and_parts_of_its_bucket_and_no_other_bucket() -> None:
    replica = LocalReplica("d", MemoryMetaStore())
    await replica.fence(messages.FenceSet("d", SCOPE, b"nonce"))
    for table in (Table.OBJECT, Table.UPLOAD, Table.PART):
        assert (
            await replica.prepare(prepare(ballot(10), RegisterName(table, SCOPE, 0, b"k")))
        ).verdict == Verdict.FENCED
    elsewhere = RegisterName(Table.OBJECT, b"t" * 16, 0, b"k")
    assert (await replica.prepare(prepare(ballot(10), elsewhere))).verdict == Verdict.OK


async def test_a_fence_is_lifted_by_its_nonce_unless_it_is_final() -> None:
    replica = LocalReplica("d", MemoryMetaStore())
    await replica.fence(messages.FenceSet("d", SCOPE, b"nonce"))
    assert not (await replica.unfence(messages.FenceLift("d", SCOPE, b"earlier"))).done
    assert (await replica.unfence(messages.FenceLift("d", SCOPE, b"nonce"))).done
    assert (await replica.unfence(messages.FenceLift("d", SCOPE, b"nonce"))).done
    assert (await replica.accept(accept(ballot(10), value()))).verdict == Verdict.OK
    await replica.fence(messages.FenceSet("d", SCOPE, b"nonce", final=True))
    assert not (await replica.unfence(messages.FenceLift("d", SCOPE, b"nonce"))).done
    assert not (await replica.fence(messages.FenceSet("d", SCOPE, b"late"))).done
    assert (await replica.fence(messages.FenceSet("d", SCOPE, b"nonce"))).done
    refused = await replica.prepare(prepare(ballot(11)))
    assert refused.verdict == Verdict.FENCED
    assert refused.final


async def test_a_fence_that_comes_late_neither_binds_nor_takes_the_place_of_another() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    await replica.fence(messages.FenceSet("d", SCOPE, b"1"))
    await replica.unfence(messages.FenceLift("d", SCOPE, b"1"))
    for again in (replica, LocalReplica("d", store)):
        assert not (await again.fence(messages.FenceSet("d", SCOPE, b"1"))).done
    assert (await replica.prepare(prepare(ballot(10)))).verdict == Verdict.OK
    assert (await replica.fence(messages.FenceSet("d", SCOPE, b"3"))).done
    assert not (await replica.fence(messages.FenceSet("d", SCOPE, b"2"))).done
    assert not (await replica.unfence(messages.FenceLift("d", SCOPE, b"2"))).done
    assert (await replica.prepare(prepare(ballot(11), nonce=b"3"))).verdict == Verdict.OK
    assert (await replica.unfence(messages.FenceLift("d", SCOPE, b"4"))).done, (
        "a replica that was away keeps no fence of an attempt that is over"
    )
    assert (await replica.prepare(prepare(ballot(12)))).verdict == Verdict.OK


async def test_a_fence_that_is_asked_for_while_it_is_being_lifted_stays_lifted() -> None:
    disk = SlowDisk()
    replica = LocalReplica("d", MemoryMetaStore(sync=disk.sync))
    await replica.fence(messages.FenceSet("d", SCOPE, b"1"))
    disk.open.clear()
    lifting = asyncio.create_task(replica.unfence(messages.FenceLift("d", SCOPE, b"1")))
    await settle_tasks()
    late = asyncio.create_task(replica.fence(messages.FenceSet("d", SCOPE, b"1")))
    await settle_tasks()
    disk.open.set()
    assert (await lifting).done
    assert not (await late).done
    assert (await replica.prepare(prepare(ballot(10)))).verdict == Verdict.OK


async def test_a_fence_binds_from_the_moment_it_is_asked_and_is_answered_after_what_was_accepted_before() -> None:
    disk = SlowDisk()
    replica = LocalReplica("d", MemoryMetaStore(sync=disk.sync))
    await replica.prepare(prepare(ballot(10)))
    disk.open.clear()
    before = asyncio.create_task(replica.accept(accept(ballot(10), value())))
    await settle_tasks()
    fencing = asyncio.create_task(replica.fence(messages.FenceSet("d", SCOPE, b"nonce")))
    await settle_tasks()
    assert (await replica.accept(accept(ballot(11), value(), OTHER))).verdict == Verdict.FENCED
    assert not fencing.done()
    disk.open.set()
    await fencing
    assert before.done()
    assert (await before).verdict == Verdict.OK


@pytest.mark.parametrize(
    "call",
    [
        lambda replica: replica.fence(messages.FenceSet("d", b"", b"nonce")),
        lambda replica: replica.fence(messages.FenceSet("d", SCOPE * 40, b"nonce")),
        lambda replica: replica.unfence(messages.FenceLift("d", b"", b"nonce")),
        lambda replica: replica.accept(accept(ballot(10, node="n" * 256), value())),
        lambda replica: replica.accept(accept(ballot(10)._replace(incarnation=b"i" * 256), value())),
        lambda replica: replica.accept(accept(ballot(10, epoch=2**64 - 1), value())),
        lambda replica: replica.accept(
            msgspec.structs.replace(accept(ballot(10, epoch=2**62 + 1), value()), header=b"of a copy")
        ),
        lambda replica: replica.accept(accept(ballot(10), msgspec.structs.replace(value(), visibility=256))),
        lambda replica: replica.accept(accept(ballot(10), value(), NAME._replace(shard=256))),
        lambda replica: replica.prepare(prepare(ballot(10), NAME._replace(table=-1))),
        lambda replica: replica.fence_epoch(messages.EpochFence("d", 2**64 - 1)),
    ],
)
async def test_what_no_store_can_hold_is_refused_and_harms_nothing(
    tmp_path: Path, call: Callable[[LocalReplica], Coroutine[Any, Any, object]]
) -> None:
    store = LmdbMetaStore(tmp_path / "meta")
    replica = LocalReplica("d", store)
    with pytest.raises(InvalidRequest):
        await call(replica)
    assert (await replica.accept(accept(ballot(11), value()))).verdict == Verdict.OK
    again = LocalReplica("d", store)
    assert (await again.accept(accept(ballot(11 + 3 * HIGH_WATER_BLOCK_US), value()))).verdict == Verdict.OK
    await store.close()


# --- disks that fail, rot, or are not the ones they were


async def test_a_store_that_refused_a_write_makes_its_replica_silent() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    await replica.prepare(prepare(ballot(10)))
    store.fail("I/O error")
    with pytest.raises(DiskUnusable):
        await replica.accept(accept(ballot(10), value()))
    for call in (replica.prepare(prepare(ballot(11))), read(replica), replica.accept(accept(ballot(11), value()))):
        with pytest.raises(DiskUnusable):
            await call
    assert "I/O error" in replica.statistics().state


async def test_a_blank_store_where_another_was_expected_is_refused() -> None:
    known = MemoryMetaStore()
    LocalReplica.open("d", known, known.store_id)
    with pytest.raises(DiskForeign):
        LocalReplica.open("d", MemoryMetaStore(), known.store_id)


async def test_a_retired_replica_answers_nothing_after_a_restart_either() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    await replica.retire()
    for retired in (replica, LocalReplica("d", store)):
        with pytest.raises(DiskUnusable):
            await read(retired)


async def test_a_damaged_row_counts_for_nothing_until_a_higher_ballot() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    await replica.prepare(prepare(ballot(10)))
    await replica.accept(accept(ballot(10), value()))
    store.damage(NAME)
    assert (await read(replica)).verdict == Verdict.DAMAGED
    reply = await replica.prepare(prepare(ballot(20)))
    assert (reply.verdict, reply.value) == (Verdict.DAMAGED, None)
    assert (await replica.accept(accept(ballot(20), value(b"old")))).verdict == Verdict.PREEMPTED
    above = ballot(reply.promised.counter + 1)
    assert (await replica.accept(accept(above, value(b"new")))).verdict == Verdict.OK
    assert (await read(replica)).value == value(b"new")
    assert replica.statistics().rows_damaged > 0


async def test_names_and_ballots_that_cannot_be_are_refused() -> None:
    replica = LocalReplica("d", MemoryMetaStore())
    for bad in (
        prepare(ballot(0)),
        prepare(ballot(2**62 + 1)),
        prepare(ballot(1), RegisterName(Table.OBJECT, SCOPE, 0, b"")),
        prepare(ballot(1), RegisterName(Table.OBJECT, b"short", 0, b"k")),
        prepare(ballot(1), RegisterName(Table.OBJECT, SCOPE, 0, b"k" * 1042)),
    ):
        with pytest.raises(InvalidRequest):
            await replica.prepare(bad)


async def test_close_waits_for_what_is_on_its_way_to_the_disk() -> None:
    disk = SlowDisk()
    store = MemoryMetaStore(sync=disk.sync)
    replica = LocalReplica("d", store)
    await replica.prepare(prepare(ballot(10)))
    disk.open.clear()
    accepting = asyncio.create_task(replica.accept(accept(ballot(10), value())))
    await settle_tasks()
    closing = asyncio.create_task(replica.close())
    await settle_tasks()
    assert not closing.done()
    disk.open.set()
    await asyncio.gather(closing, accepting)
    assert store.get(NAME) is not None


async def test_a_disk_that_hangs_is_given_so_much_and_no_more_and_goes_on_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(disk_writes, "WRITES_MAX", 3)
    monkeypatch.setattr(disk_writes, "WRITE_BYTES_MAX", 1000)
    disk = SlowDisk()
    replica = LocalReplica("d", MemoryMetaStore(sync=disk.sync))
    await replica.accept(accept(ballot(10), value()))
    disk.open.clear()
    names = [RegisterName(Table.OBJECT, SCOPE, 3, b"%d" % number) for number in range(4)]
    large = asyncio.create_task(replica.accept(accept(ballot(11), value(b"x" * 999), names[0])))
    await settle_tasks()
    with pytest.raises(SlowDown):
        await replica.accept(accept(ballot(11), value(b"xx"), names[1]))
    page = b"page"
    with pytest.raises(SlowDown):
        await replica.page_put(messages.PagePut("d", xxhash.xxh3_128_digest(page), page))
    small = [asyncio.create_task(replica.accept(accept(ballot(11), value(b""), name))) for name in names[1:3]]
    await settle_tasks()
    for _ in range(2):
        with pytest.raises(SlowDown):
            await replica.accept(accept(ballot(11), value(b""), names[3]))
    heard: list[object] = []
    assert replica.try_call(accept(ballot(11), value(b""), names[3]), lambda answer, _bulk: heard.append(answer))
    assert [type(answer) for answer in heard] == [SlowDown]
    disk.open.set()
    assert [reply.verdict for reply in await asyncio.gather(large, *small)] == [Verdict.OK] * 3
    assert (await replica.accept(accept(ballot(12), value(b"y" * 1000), names[3]))).verdict == Verdict.OK
    await replica.page_put(messages.PagePut("d", xxhash.xxh3_128_digest(page), page))
    assert (replica.statistics().state, replica._writes.bytes_in_flight) == ("ok", 0)


class FullStore(MemoryMetaStore):
    """Takes no posts."""

    def post(self, batch: StoreBatch, done: Done) -> None:
        raise SlowDown("4096 batches wait")


async def test_a_store_that_has_no_room_refuses_an_accept_and_its_replica_goes_on() -> None:
    store = FullStore()
    replica = LocalReplica("d", store)
    with pytest.raises(SlowDown):
        await replica.accept(accept(ballot(10), value()))
    assert (await replica.prepare(prepare(ballot(11)))).verdict == Verdict.OK
    assert replica.statistics().state == "ok"
    assert replica.statistics().accepts_in_flight == 0


# --- small copies and pages


class Copies:
    """Small copies of one disk. What a replica does with them is in ``test_small_copies``."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}

    async def store(self, header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
        self.held[header] = b"".join(bytes(piece) for piece in body)

    async def load(self, data_id: bytes) -> Copy | None:
        held = self.held.get(data_id)
        return None if held is None else Copy(data_id, memoryview(held))

    def over(self, store: MemoryMetaStore, **options: Any) -> LocalReplica:
        copies = PlainCopies(store, self.store, self.load, holds=lambda data_id, _: data_id in self.held)
        return LocalReplica("d", store, copies=copies, **options)


def with_copy(at: Ballot, header: bytes) -> messages.Accept:
    return messages.Accept("d", NAME, at, value(payload=header), b"", False, header)


async def test_a_copy_that_fails_in_a_way_that_nobody_foresaw_ends_its_accept_and_the_replica() -> None:
    copies = Copies()

    async def broken(_header: bytes, _body: Sequence[Buffer]) -> None:
        raise RuntimeError("a mistake")

    copies.store = broken  # type: ignore[method-assign]
    replica = copies.over(MemoryMetaStore())
    heard: list[object] = []
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(DiskUnusable):
            await replica.accept(with_copy(ballot(10), b"D"), [b"payload"])
        with pytest.raises(DiskUnusable):
            await replica.prepare(prepare(ballot(11)))
        await replica.close()
    assert replica.try_call(prepare(ballot(12)), lambda answer, _bulk: heard.append(answer))
    assert [type(answer) for answer in heard] == [DiskUnusable]


class MistakenStore(MemoryMetaStore):
    def post(self, batch: StoreBatch, done: Done) -> None:
        raise RuntimeError("a mistake")


async def test_a_proposer_in_the_same_process_hears_of_an_unforeseen_failure_as_of_an_unusable_disk() -> None:
    replica = LocalReplica("d", MistakenStore())
    heard: list[object] = []
    assert replica.try_call(accept(ballot(10), value()), lambda answer, _bulk: heard.append(answer))
    assert [type(answer) for answer in heard] == [DiskUnusable]
    async with asyncio.timeout(GUARD_S):
        await replica.close()


async def test_a_fence_is_answered_after_an_accept_whose_copy_arrives_late() -> None:
    """The fence is on disk before the row."""
    copies, gate = Copies(), asyncio.Event()
    store = copies.store

    async def late(header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
        await gate.wait()
        await store(header, body, b"")

    copies.store = late  # type: ignore[method-assign]
    fenced = MemoryMetaStore()
    replica = copies.over(fenced)
    await replica.prepare(prepare(ballot(10)))
    before = asyncio.create_task(replica.accept(with_copy(ballot(10), b"D"), [b"payload"]))
    await settle_tasks()
    fencing = asyncio.create_task(replica.fence(messages.FenceSet("d", SCOPE, b"nonce")))
    await settle_tasks()
    async with asyncio.timeout(GUARD_S):
        assert fenced.get_fence(SCOPE) is not None
        assert not fencing.done()
        gate.set()
        assert (await fencing).done
    assert before.done()
    assert (await before).verdict == Verdict.OK


async def test_a_scan_that_counts_on_a_fence_is_answered_when_all_that_was_judged_before_it_has_arrived() -> None:
    copies, gate = Copies(), asyncio.Event()
    store = copies.store

    async def late(header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
        await gate.wait()
        await store(header, body, b"")

    copies.store = late  # type: ignore[method-assign]
    fenced = MemoryMetaStore()
    replica = copies.over(fenced)
    ask = (ShardAsk(3, b"", 10, Want.ALL, 100, 10_000),)

    async def rows(of: LocalReplica, nonce: bytes) -> tuple[int, int]:
        found = await of.scan(ScanRequest("d", 1, Table.OBJECT, SCOPE, ask, fence=nonce))
        assert of.try_scan(ScanRequest("d", 1, Table.OBJECT, SCOPE, ask, fence=nonce)) == found
        return found.verdict, found.slices[0].looked_at if found.slices else 0

    await replica.prepare(prepare(ballot(10)))
    assert await rows(replica, b"nonce") == (Verdict.FENCED, 0)
    before = asyncio.create_task(replica.accept(with_copy(ballot(10), b"D"), [b"payload"]))
    await settle_tasks()
    fencing = asyncio.create_task(replica.fence(messages.FenceSet("d", SCOPE, b"nonce")))
    await settle_tasks()
    assert fenced.get_fence(SCOPE) is not None
    assert await rows(replica, b"nonce") == (Verdict.FENCED, 0)
    assert await rows(replica, b"") == (Verdict.OK, 0)
    async with asyncio.timeout(GUARD_S):
        gate.set()
        assert (await fencing).done
        assert (await before).verdict == Verdict.OK
    assert await rows(replica, b"nonce") == (Verdict.OK, 1)
    assert await rows(replica, b"other") == (Verdict.FENCED, 0)
    assert (await replica.fence(messages.FenceSet("d", SCOPE, b"nonce"))).done
    assert await rows(replica, b"nonce") == (Verdict.OK, 1)
    assert await rows(copies.over(fenced), b"nonce") == (Verdict.OK, 1)


async def test_a_fence_whose_caller_went_away_before_all_had_arrived_does_not_answer_scans() -> None:
    copies, gate = Copies(), asyncio.Event()

    async def late(header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
        await gate.wait()

    copies.store = late  # type: ignore[method-assign]
    fenced = MemoryMetaStore()
    replica = copies.over(fenced)
    await replica.prepare(prepare(ballot(10)))
    before = asyncio.create_task(replica.accept(with_copy(ballot(10), b"D"), [b"payload"]))
    await settle_tasks()
    fencing = asyncio.create_task(replica.fence(messages.FenceSet("d", SCOPE, b"nonce")))
    await settle_tasks()
    fencing.cancel()
    await settle_tasks()
    ask = (ShardAsk(3, b"", 10, Want.ALL, 100, 10_000),)
    request = ScanRequest("d", 1, Table.OBJECT, SCOPE, ask, fence=b"nonce")
    assert fenced.get_fence(SCOPE) is not None
    assert (await replica.scan(request)).verdict == Verdict.FENCED
    gate.set()
    async with asyncio.timeout(GUARD_S):
        await before
        assert (await replica.fence(messages.FenceSet("d", SCOPE, b"nonce"))).done
    assert (await replica.scan(request)).verdict == Verdict.OK


async def test_an_older_fence_that_is_answered_does_not_stand_for_a_newer_one() -> None:
    """It was lifted meanwhile, and an accept was judged without a fence."""
    copies = Copies()
    gates = {b"D1": asyncio.Event(), b"D2": asyncio.Event()}

    async def late(header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
        await gates[header].wait()

    copies.store = late  # type: ignore[method-assign]
    replica = copies.over(MemoryMetaStore())
    ask = (ShardAsk(3, b"", 10, Want.ALL, 100, 10_000),)
    request = ScanRequest("d", 1, Table.OBJECT, SCOPE, ask, fence=b"n2")
    work: list[asyncio.Task[Any]] = []

    async def begin(coroutine: Coroutine[Any, Any, Any]) -> None:
        work.append(asyncio.create_task(coroutine))
        await settle_tasks()

    async with asyncio.timeout(GUARD_S):
        for name in (NAME, OTHER):
            await replica.prepare(prepare(ballot(10), name))
        await begin(replica.accept(with_copy(ballot(10), b"D1"), [b"payload"]))
        await begin(replica.fence(messages.FenceSet("d", SCOPE, b"n1")))
        assert (await replica.unfence(messages.FenceLift("d", SCOPE, b"n1"))).done
        unfenced = msgspec.structs.replace(with_copy(ballot(10), b"D2"), name=OTHER)
        await begin(replica.accept(unfenced, [b"payload"]))
        await begin(replica.fence(messages.FenceSet("d", SCOPE, b"n2")))
        gates[b"D1"].set()
        assert (await work[1]).done
        assert (await replica.scan(request)).verdict == Verdict.FENCED
        gates[b"D2"].set()
        assert (await work[3]).done
        assert (await work[2]).verdict == Verdict.OK
        found = await replica.scan(request)
    assert (found.verdict, found.slices[0].looked_at) == (Verdict.OK, 2)


async def test_a_fence_that_comes_with_a_partition_answers_scans_when_all_before_it_has_arrived() -> None:
    copies, gate = Copies(), asyncio.Event()

    async def late(header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
        await gate.wait()

    copies.store = late  # type: ignore[method-assign]
    replica = copies.over(MemoryMetaStore())
    ask = (ShardAsk(3, b"", 10, Want.ALL, 100, 10_000),)
    request = ScanRequest("d", 1, Table.OBJECT, SCOPE, ask, fence=b"nonce")
    taken = messages.FencesTake("d", (messages.ScopeFence(SCOPE, b"nonce", False, b""),))
    async with asyncio.timeout(GUARD_S):
        await replica.prepare(prepare(ballot(10)))
        before = asyncio.create_task(replica.accept(with_copy(ballot(10), b"D"), [b"payload"]))
        await settle_tasks()
        taking = asyncio.create_task(replica.handover.take_fences(taken))
        await settle_tasks()
        assert (await replica.scan(request)).verdict == Verdict.FENCED
        gate.set()
        assert (await taking).done
        assert (await before).verdict == Verdict.OK
        assert (await replica.scan(request)).verdict == Verdict.OK


async def test_pages_are_kept_under_their_own_hash_alone() -> None:
    replica = LocalReplica("d", MemoryMetaStore())
    page_hash = xxhash.xxh3_128_digest(b"page")
    with pytest.raises(InvalidRequest):
        await replica.page_put(messages.PagePut("d", page_hash, b"other"))
    assert (await replica.page_get(messages.PageGet("d", page_hash))).body is None
    await replica.page_put(messages.PagePut("d", page_hash, b"page"))
    assert (await replica.page_get(messages.PageGet("d", page_hash))).body == b"page"


async def test_a_replica_says_which_of_many_pages_it_lacks_or_has_damaged() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    bodies = [b"page %d" % number for number in range(40)]
    hashes = tuple(xxhash.xxh3_128_digest(body) for body in bodies)
    for page_hash, body in list(zip(hashes, bodies, strict=True))[:30]:
        await replica.page_put(messages.PagePut("d", page_hash, body))
    store.damage_page(hashes[3])
    assert (await replica.page_check(messages.PageCheck("d", hashes))).hashes == (hashes[3], *hashes[30:])
    with pytest.raises(InvalidRequest):
        await replica.page_check(messages.PageCheck("d", hashes * 7))


async def test_a_page_that_is_put_again_gets_the_new_age() -> None:
    store = MemoryMetaStore()
    clock = FixedClock(1_000)
    replica = LocalReplica("d", store, clock=clock)
    page_hash = xxhash.xxh3_128_digest(b"page")
    await replica.page_put(messages.PagePut("d", page_hash, b"page"))
    clock.now_ms = 2_000
    await replica.page_put(messages.PagePut("d", page_hash, b"page"))
    assert store.pages(after=b"", limit=9) == [(page_hash, 2_000)]


async def test_when_promises_are_ended_every_ballot_drawn_before_is_refused_and_what_was_accepted_can_be_read() -> None:
    disk = SlowDisk()
    store = MemoryMetaStore(sync=disk.sync)
    replica = LocalReplica("d", store, clock=FixedClock(1_000))
    assert (await replica.prepare(prepare(ballot(900_000)))).verdict == Verdict.OK
    disk.open.clear()
    on_its_way = asyncio.ensure_future(replica.accept(accept(ballot(900_001), value(), OTHER)))
    await asyncio.sleep(0)
    ending = asyncio.ensure_future(replica.end_promises(1))
    await asyncio.sleep(0)
    assert store.get(OTHER) is None
    disk.open.set()
    await ending
    assert store.get(OTHER) is not None
    await on_its_way
    for life in (replica, LocalReplica("d", store)):
        assert (await life.accept(accept(ballot(999_999), value()))).verdict == Verdict.PREEMPTED
    assert (await replica.accept(accept(ballot(1_000_001), value()))).verdict == Verdict.OK


async def test_a_host_answers_for_its_own_disks_only() -> None:
    copies = Copies()
    replica = copies.over(MemoryMetaStore())
    methods = ReplicaHost({"d": replica}, lambda: 1_000).methods()
    call = Call(PeerIdentity("gw", "FR", "s", "r", ("gateway",)), memoryview(b"payload"), 0.0)
    reply = await methods["meta.prepare"].handler(prepare(ballot(10)), call)
    assert isinstance(reply, messages.PrepareReply)
    accepted = await methods["meta.accept"].handler(with_copy(ballot(10), b"D"), call)
    assert isinstance(accepted, messages.AcceptReply)
    assert accepted.copy_synced
    answer = await methods["meta.read"].handler(messages.Read("d", NAME, 1, want_payload=True), call)
    assert isinstance(answer, Reply)
    assert b"".join(bytes(piece) for piece in answer.body) == b"payload"
    with pytest.raises(DiskUnusable):
        await methods["meta.prepare"].handler(messages.Prepare("elsewhere", NAME, ballot(10)), call)


# --- rule 15: counters


NOW_US = 1_800_000_000_000_000


@pytest.mark.parametrize("header", [b"", b"of a copy"])
async def test_a_counter_more_than_an_hour_ahead_is_refused_by_prepare_accept_and_create(header: bytes) -> None:
    replica = LocalReplica("d", MemoryMetaStore(), clock=FixedClock(NOW_US // 1000))
    bound = NOW_US + COUNTER_AHEAD_MAX_US
    for counter in (bound + 1, COUNTER_MAX):
        assert (await replica.prepare(prepare(ballot(counter)))).verdict == Verdict.AHEAD
        request = msgspec.structs.replace(accept(ballot(counter), value()), header=header)
        assert (await replica.accept(request)).verdict == Verdict.AHEAD
        create = messages.Create(request.disk, request.name, request.ballot, request.value, header=header)
        assert (await replica.accept(create)).verdict == Verdict.AHEAD
    assert (await replica.prepare(prepare(ballot(bound)))).verdict == Verdict.OK
    assert (await replica.accept(accept(ballot(bound), value()))).verdict == Verdict.OK


async def test_what_was_refused_as_too_far_ahead_leaves_no_promise_and_no_high_water_ballot() -> None:
    """One prepare with the highest counter would have stopped the disk for ever, over restarts too."""
    store = MemoryMetaStore()
    for _ in range(2):
        replica = LocalReplica("d", store, clock=FixedClock(NOW_US // 1000))
        await replica.prepare(prepare(ballot(COUNTER_MAX)))
        await replica.accept(accept(ballot(COUNTER_MAX), value()))
    assert (await replica.prepare(prepare(ballot(NOW_US)))).verdict == Verdict.OK
    assert (await replica.accept(accept(ballot(NOW_US), value()))).verdict == Verdict.OK


FAR = ballot(NOW_US + 2 * COUNTER_AHEAD_MAX_US)


async def test_a_ballot_too_far_ahead_that_waits_for_another_accept_leaves_no_high_water_ballot() -> None:
    disk = SlowDisk()
    replica = Copies().over(MemoryMetaStore(sync=disk.sync), clock=FixedClock(NOW_US // 1000))
    await replica.prepare(prepare(ballot(NOW_US)))
    disk.open.clear()
    before = asyncio.create_task(replica.accept(accept(ballot(NOW_US), value())))
    await settle_tasks()
    late = asyncio.create_task(replica.accept(with_copy(FAR, b"D"), [b"payload"]))
    await settle_tasks()
    assert not late.done()
    disk.open.set()
    assert (await before).verdict == Verdict.OK
    assert (await late).verdict == Verdict.AHEAD
    assert replica.state.high_water_at(FAR.epoch) < FAR


async def test_a_ballot_too_far_ahead_whose_row_is_not_in_memory_leaves_no_high_water_ballot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store, clock=FixedClock(NOW_US // 1000))
    get, asked = store.get, list[RegisterName]()

    def elsewhere(name: RegisterName) -> Slot | None:
        asked.append(name)
        if len(asked) == 1:
            raise NotInMemory((name.prefix, name.key))
        return get(name)

    monkeypatch.setattr(store, "get", elsewhere)
    assert (await replica.prepare(prepare(FAR))).verdict == Verdict.AHEAD
    assert len(asked) > 1
    assert replica.state.high_water_at(FAR.epoch) < FAR


async def test_a_replica_whose_clock_was_set_back_goes_on_from_its_high_water_ballot() -> None:
    store = MemoryMetaStore()
    await LocalReplica("d", store, clock=FixedClock(NOW_US // 1000)).prepare(prepare(ballot(NOW_US)))
    reset = LocalReplica("d", store, clock=FixedClock(1))
    assert (await reset.prepare(prepare(ballot(NOW_US + COUNTER_AHEAD_MAX_US)))).verdict == Verdict.OK
    assert (
        await LocalReplica("e", MemoryMetaStore(), clock=FixedClock(1)).prepare(prepare(ballot(NOW_US)))
    ).verdict == Verdict.AHEAD


async def test_a_fall_of_the_sequence_is_taken_counted_and_told_promised_or_not() -> None:
    replica = LocalReplica("d", MemoryMetaStore(), clock=FixedClock(NOW_US // 1000))
    held = msgspec.structs.replace(value(), sequence=5)
    await replica.accept(accept(ballot(10), held))
    await replica.accept(accept(ballot(11), msgspec.structs.replace(held, sequence=6)))
    assert replica.statistics().sequence_falls == 0
    assert (await replica.accept(accept(ballot(12), msgspec.structs.replace(held, sequence=4)))).verdict == Verdict.OK
    assert replica.statistics().sequence_falls == 1
    await replica.prepare(prepare(ballot(13)))
    with structlog.testing.capture_logs() as logs:
        assert (
            await replica.accept(accept(ballot(13), msgspec.structs.replace(held, sequence=3)))
        ).verdict == Verdict.OK
    assert replica.statistics().sequence_falls == 2
    assert [(entry["event"], entry["held"], entry["sequence"]) for entry in logs] == [
        ("a register's sequence falls", 4, 3)
    ]
    assert not replica.state.sequences


# --- a disk that is full ----------------------------------------------------------------------------------------------


def without_room(store: MemoryMetaStore, settling_bytes: int) -> None:
    store.health.room.left_bytes, store.health.room.settling_bytes = -1, settling_bytes


@pytest.mark.parametrize("settling_bytes", [0, 1 << 40])
async def test_a_full_disk_refuses_longer_rows_and_goes_on(settling_bytes: int) -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    await replica.accept(accept(ballot(10), value(b"four")))
    without_room(store, settling_bytes)

    async def said(at: int, what: Value, name: RegisterName = NAME, *, identity: bool = False) -> int:
        await replica.prepare(prepare(ballot(at), name))
        return (await replica.accept(accept(ballot(at), what, name, identity=identity))).verdict

    settled = Verdict.OK if settling_bytes else Verdict.FULL
    assert await said(11, value(b"fives", 2)) == Verdict.FULL
    assert await said(12, value(b"new"), OTHER) == Verdict.FULL
    assert await said(13, value(b"as long, elsewhere"), OTHER, identity=True) == settled
    assert await said(14, msgspec.structs.replace(value(b"marker", 2), visibility=Visibility.HIDDEN)) == settled
    assert await said(15, value(b"rows", 3)) == Verdict.OK, "it gets no longer"
    assert await said(16, msgspec.structs.replace(value(b"", 4), visibility=Visibility.TOMBSTONE)) == Verdict.OK
    assert (await read(replica)).value == msgspec.structs.replace(value(b"", 4), visibility=Visibility.TOMBSTONE)
    store.health.room.left_bytes = 1 << 40
    assert await said(17, value(b"longer again", 5)) == Verdict.OK


async def test_a_create_is_refused_by_a_full_disk_and_a_fence_is_not() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    without_room(store, 0)
    create = messages.Create("d", OTHER, ballot(10), value())
    assert (await replica.accept(create)).verdict == Verdict.FULL
    assert (await replica.fence(messages.FenceSet("d", SCOPE, b"n" * 16))).done


async def test_a_store_without_room_refuses_and_its_replica_is_not_silent() -> None:
    class Starved(MemoryMetaStore):
        starved = True

        def post(self, batch: StoreBatch, on_done: Done) -> None:
            if self.starved:
                raise StoreFull("no room", state="full")
            super().post(batch, on_done)

    store = Starved()
    replica = LocalReplica("d", store)
    with pytest.raises(StoreFull):
        await replica.accept(accept(ballot(10), value()))
    assert (await read(replica)).value is None
    store.starved = False
    assert (await replica.accept(accept(ballot(10), value()))).verdict == Verdict.OK
