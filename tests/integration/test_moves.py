"""Moves of blocks that storage nodes ask gateways for: honest ones are made, and no lie changes a record."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
import xxhash

from storaged.cluster.layout import Layout, Profile
from storaged.errors import PeerUnreachable
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.hashes import fragment_hash
from storaged.maintain.context import MaintainLimits
from storaged.maintain.health import BlockPlace
from storaged.maintain.mover import FRAGMENTS_BURST, REFUSED_PAUSE_S
from storaged.maintain.moves import (
    CHANGED,
    LATER,
    MOVED,
    MOVES_A_CALL,
    OK,
    REFUSED,
    DiscardAsk,
    FragmentAsk,
    MoveAsk,
    MovesAnswer,
    MovesAsk,
)
from storaged.meta.names import RegisterName, object_name
from storaged.objects.code import place
from storaged.objects.code.place import Placement
from storaged.objects.records import BucketRecord, ObjectRecord, Run
from tests.integration.memory_cluster import WHO, Cluster, Gateway, run
from tests.second_preimage import second_preimage

LARGE = 2_500_000
DELAY_S = MaintainLimits().recode_delay_s
DROP_S = MaintainLimits().drop_delay_s
KEY = b"key"


class World:
    """A cluster with one object, of which the first disk of every block is lost for good, and a storage node that asks.

    ``bucket``, ``before``: the record as it was; ``data``: the object's bytes.
    """

    bucket: BucketRecord
    before: ObjectRecord
    data: bytes
    lost: str

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.node = cluster.nodes["na"]

    async def begin(self, *, lose: bool = True, size: int = LARGE, countries: tuple[str, ...] = ()) -> None:
        cluster = self.cluster
        self.bucket = await cluster.buckets.create(WHO, "bucket", region="eu-fr-1", countries=countries)
        self.data = os.urandom(size)
        await cluster.put(self.bucket, KEY, self.data)
        self.before = await cluster.record(self.bucket, KEY)
        self.lost = ""
        if lose:
            self.lost = next(
                disk for disk in (await self.places())[0].disks if cluster.layouts.current.node_of(disk) != "na"
            )
            cluster.lose_disk(self.lost)

    async def places(self) -> list[BlockPlace]:
        return await self.cluster.places(self.bucket, KEY)

    @property
    def name(self) -> bytes:
        return object_name(self.bucket.id, self.bucket.shard_numbers, KEY).pack()

    async def placement(self) -> Placement:
        walker = self.node.maintenance.check.walker
        entry = await self.cluster.entry(self.bucket, KEY)
        found = walker.placements.at_target(entry, self.bucket.countries)
        assert found is not None
        return found

    async def write(self, placement: Placement) -> MoveAsk:
        """What an honest node does before it asks: writes all blocks to the new places."""
        walker = self.node.maintenance.check.walker
        await walker.buckets.refresh(self.node.context)
        blocks = await walker.health(await self.places())
        repair = self.node.maintenance.repair
        move = await repair.rebuilder.recode(blocks, placement, self.cluster.layouts.current.epoch)
        return MoveAsk(self.name, move.entry.data_id, move.old, move.new)

    async def honest(self) -> MoveAsk:
        return await self.write(await self.placement())

    async def ask(self, *moves: MoveAsk, gateway: Gateway | None = None, asker: str = "na") -> MovesAnswer:
        return await (gateway or self.cluster.gateway).mover.answer(asker, MovesAsk(moves))

    async def code(self, move: MoveAsk, **named: Any) -> str:
        (answer,) = (await self.ask(move, **named)).answers
        return answer.code

    async def new_fragments(self, move: MoveAsk) -> list[tuple[str, FragmentId]]:
        entry = await self.cluster.entry(self.bucket, KEY)
        disks = place.disks_of(move.new, self.cluster.layouts.current, entry.data_id, self.bucket.countries)
        return [
            (disk, FragmentId(entry.data_id, block, move.new.k, move.new.m, position))
            for block in range(move.new.first, move.new.first + move.new.count)
            for position, disk in enumerate(disks)
        ]

    async def forge(self, disk: str, header: FragmentHeader, payload: bytes) -> None:
        """A storage node writes a fragment, where there is none."""
        await self.cluster.store(disk).delete([FragmentId.unpack(header.id)])
        await self.node.context.stores.store(disk).write(header, [payload], sync=True)

    async def assert_unchanged(self) -> None:
        assert await self.cluster.record(self.bucket, KEY) == self.before
        assert await self.cluster.get(self.bucket, KEY) == self.data

    async def assert_moved(self) -> None:
        for where in await self.places():
            assert self.lost not in where.disks
            assert all(self.cluster.holds(disk, fragment) for fragment, disk in where.fragments)
        assert await self.cluster.get(self.bucket, KEY) == self.data


def play(scenario: Callable[[World], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main(cluster: Cluster) -> None:
        await scenario(World(cluster))

    run(main, **{"disks_per_node": 3, **options})


# --- honest moves


def test_an_honest_move_is_made_once_and_leaves_the_old_fragments_to_the_garbage_lists() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        old = {disk for where in await world.places() for disk in where.disks}
        assert await world.code(move) == MOVED
        await world.assert_moved()
        after = await world.cluster.record(world.bucket, KEY)
        assert await world.code(move) == MOVED, "it says so already"
        assert await world.cluster.record(world.bucket, KEY) == after
        new = {disk for where in await world.places() for disk in where.disks}
        for disk in old - new - {world.lost}:
            assert move.data_id in world.cluster.store(disk).garbage
        assert world.cluster.gateway.mover.statistics().moved == 2

    play(scenario)


@pytest.mark.parametrize("end", ["the asker dies", "no answer in time"])
def test_old_fragments_are_listed_also_when_the_gateway_does_not_learn_that_the_record_changed(end: str) -> None:
    async def scenario(world: World) -> None:
        await world.begin(lose=False)
        await world.cluster.kill("nc")
        entry = await world.cluster.entry(world.bucket, KEY)
        placement = world.node.maintenance.check.walker.placements.choose(entry, Profile.parse(entry.target), ())
        assert placement is not None
        move = await world.write(placement)
        old = {disk for where in await world.places() for disk in where.disks if disk[0] != "c"}
        accepting, delivered = asyncio.Event(), asyncio.Event()

        async def hold(source: str, node: str, method: str, request: object) -> None:
            if source == "g" and method == "meta.accept":
                accepting.set()
                await delivered.wait()

        world.cluster.intercept = hold
        task = asyncio.get_running_loop().create_task(world.code(move))
        await accepting.wait()
        if end == "the asker dies":
            task.cancel()  # as the server does when the connection is gone
        else:
            await world.cluster.pass_s(60)
        delivered.set()
        assert await asyncio.gather(task, return_exceptions=True) != [MOVED]
        await world.cluster.pass_s(1)
        await world.assert_moved()
        assert {str(where.profile) for where in await world.places()} == {str(placement.profile)}
        assert all(entry.data_id in world.cluster.store(disk).garbage for disk in old)

    play(scenario)


def test_fragments_that_moved_away_are_deleted_by_their_own_disks_and_no_others() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        world.cluster.maintain()
        await world.cluster.pass_s(DELAY_S + 60)
        await world.cluster.settled()
        await world.assert_moved()
        await world.cluster.leap(DROP_S)
        await world.cluster.pass_s(60)
        named = {(disk, fragment) for where in await world.places() for fragment, disk in where.fragments}
        entry = await world.cluster.entry(world.bucket, KEY)
        assert {where for where in await world.cluster.fragments(entry.data_id) if where[0] != world.lost} == named
        await world.assert_moved()

    play(scenario)


def test_blocks_of_many_objects_move_in_one_call_and_a_lie_among_them_only_harms_itself() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        lie = msgspec.structs.replace(move, data_id=os.urandom(16))
        answers = (await world.ask(lie, move, lie)).answers
        assert [answer.code for answer in answers] == [CHANGED, MOVED, CHANGED]
        await world.assert_moved()

    play(scenario)


def test_a_block_under_another_profile_is_moved_when_it_is_what_the_survivors_make() -> None:
    async def scenario(world: World) -> None:
        await world.begin(lose=False)
        await world.cluster.kill("nc")
        entry = await world.cluster.entry(world.bucket, KEY)
        placement = world.node.maintenance.check.walker.placements.choose(entry, Profile.parse(entry.target), ())
        assert placement is not None
        assert str(placement.profile) != entry.target
        assert await world.code(await world.write(placement)) == MOVED
        assert {str(where.profile) for where in await world.places()} == {str(placement.profile)}
        await world.assert_moved()

    play(scenario)


def test_what_was_written_while_one_node_alone_took_writes_is_raised_to_its_target_later() -> None:
    async def scenario(world: World) -> None:
        disks = world.cluster.layouts.current.disks
        world.cluster.alive.read_only = {disk.id for disk in disks if disk.node != "nb"}
        await world.begin(lose=False)
        assert {disk.node for disk in disks if disk.id in (await world.places())[0].disks} == {"nb"}
        world.cluster.alive.read_only = set()
        world.cluster.maintain()
        await world.cluster.pass_s(120)
        await world.cluster.settled()
        entry = await world.cluster.entry(world.bucket, KEY)
        assert {str(where.profile) for where in await world.places()} == {entry.target}
        await world.assert_moved()

    play(scenario)


# --- lies about fragments


def test_fragments_that_are_not_there_are_not_named() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        disk, fragment = (await world.new_fragments(move))[-1]
        await world.cluster.store(disk).delete([fragment])
        assert await world.code(move) == LATER
        await world.assert_unchanged()

    play(scenario)


def test_fragments_that_are_only_in_memory_are_durable_before_they_are_named() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        for node in world.cluster.nodes.values():
            for store in node.fragments.values():
                for fragment in store.fragments:
                    if fragment.data_id == move.data_id:
                        kept = store.kept(fragment)
                        store.lose(fragment)
                        await store.write(kept.header, [kept.payload])
        assert await world.code(move) == MOVED
        for node in world.cluster.nodes.values():
            for disk, store in node.fragments.items():
                assert disk == world.lost or not store.unsynced

    play(scenario)


def test_data_of_another_object_is_not_named() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        await world.cluster.put(world.bucket, b"other", os.urandom(LARGE))
        other = await world.cluster.entry(world.bucket, b"other")
        assert await world.code(msgspec.structs.replace(move, data_id=other.data_id)) == CHANGED
        name = object_name(world.bucket.id, world.bucket.shard_numbers, b"other").pack()
        assert await world.code(msgspec.structs.replace(move, name=name)) == CHANGED
        name = object_name(os.urandom(16), range(16), KEY).pack()
        assert await world.code(msgspec.structs.replace(move, name=name)) == LATER
        await world.assert_unchanged()

    play(scenario)


@pytest.mark.parametrize(
    "forge",
    [
        "other hashes",
        "other owner",
        "other part header",
        "other cells",
        "shorter",
    ],
)
def test_fragments_that_are_not_the_blocks_own_are_refused(forge: str) -> None:
    """The headers agree with each other, and the bytes with the headers."""

    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        entry = await world.cluster.entry(world.bucket, KEY)
        fragments = await world.new_fragments(move)
        blocks: dict[int, list[tuple[str, FragmentId]]] = {}
        for disk, fragment in fragments:
            blocks.setdefault(fragment.block, []).append((disk, fragment))
        old = {(disk, fragment) for where in await world.places() for fragment, disk in where.fragments}
        for block in blocks.values():
            for disk, fragment in block:
                kept = world.cluster.store(disk).kept(fragment)
                if (disk, fragment) in old:
                    continue  # what the survivors hold, on disks that don't lie
                header, payload = kept.header, kept.payload
                if forge == "other hashes":
                    payload = bytes(byte ^ 0x55 for byte in payload)
                    hashes = list(header.hashes)

                    hashes[fragment.position] = fragment_hash((payload,))
                    header = msgspec.structs.replace(header, hashes=tuple(hashes))
                elif forge == "other owner":
                    owner = object_name(world.bucket.id, world.bucket.shard_numbers, b"other").pack()
                    header = msgspec.structs.replace(header, owner=owner)
                elif forge == "other part header":
                    header = msgspec.structs.replace(header, part_header=entry.header[:-1] + b"x")
                elif forge == "other cells":
                    header = msgspec.structs.replace(header, cell_bytes=header.cell_bytes // 2)
                else:
                    world.cluster.store(disk).kept(fragment).payload = payload[:-1]
                    header = msgspec.structs.replace(header, length=len(payload) - 1)
                    world.cluster.store(disk).kept(fragment).header = header
                    continue
                await world.forge(disk, header, payload)
        assert await world.code(move) == REFUSED
        await world.assert_unchanged()

    play(scenario)


@pytest.mark.parametrize("spoil", ["parity", "data", "all"])
def test_fragments_of_another_profile_with_wrong_bytes_are_refused(spoil: str) -> None:
    """Their hashes are new, so only who computes them again finds the lie."""

    async def scenario(world: World) -> None:
        await world.begin(lose=False)
        await world.cluster.kill("nc")
        entry = await world.cluster.entry(world.bucket, KEY)
        placement = world.node.maintenance.check.walker.placements.choose(entry, Profile.parse(entry.target), ())
        assert placement is not None
        move = await world.write(placement)
        k = move.new.k

        by_block: dict[int, list[tuple[str, FragmentId]]] = {}
        for disk, fragment in await world.new_fragments(move):
            by_block.setdefault(fragment.block, []).append((disk, fragment))
        for block in by_block.values():
            payloads = []
            for disk, fragment in block:
                payload = world.cluster.store(disk).kept(fragment).payload
                wrong = spoil == "all" or (fragment.position >= k) == (spoil == "parity")
                payloads.append(bytes(byte ^ 0x55 for byte in payload) if wrong else payload)
            hashes = tuple(fragment_hash((payload,)) for payload in payloads)
            for (disk, fragment), payload in zip(block, payloads, strict=True):
                header = msgspec.structs.replace(world.cluster.store(disk).kept(fragment).header, hashes=hashes)
                await world.forge(disk, header, payload)
        assert await world.code(move) == REFUSED
        world.cluster.start("nc", maintain=False)
        await world.assert_unchanged()

    play(scenario)


def test_one_node_that_lies_in_all_its_survivors_outvotes_nobody() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()

        liar = next(node for node in ("nb", "nc") if world.cluster.layouts.current.node_of(world.lost) != node)
        for disk, fragment in await world.cluster.fragments(move.data_id):
            if world.cluster.layouts.current.node_of(disk) == liar:
                kept = world.cluster.store(disk).kept(fragment)
                kept.payload = bytes(byte ^ 0x55 for byte in kept.payload)
                hashes = list(kept.header.hashes)
                hashes[fragment.position] = fragment_hash((kept.payload,))
                kept.header = msgspec.structs.replace(kept.header, hashes=tuple(hashes))
        assert await world.code(move) != MOVED
        assert await world.cluster.record(world.bucket, KEY) == world.before

    play(scenario)


def test_an_old_kind_of_hash_is_not_enough_for_a_gateway() -> None:
    """Other bytes with the xxh3-128 of the truth are found in no time: a gateway compares bytes."""

    async def scenario(world: World) -> None:
        await world.begin()
        for where in await world.places():
            found = [(disk, fragment) for fragment, disk in where.fragments]
            kept = [world.cluster.store(disk).kept(fragment) for disk, fragment in found]
            old = tuple(xxhash.xxh3_128_digest(one.payload) for one in kept)
            for one in kept:
                one.header = msgspec.structs.replace(one.header, hashes=old)
        move = await world.honest()
        stays = {(disk, fragment) for where in await world.places() for fragment, disk in where.fragments}
        disk, fragment = next(where for where in await world.new_fragments(move) if where not in stays)
        kept_new = world.cluster.store(disk).kept(fragment)
        truth, kept_new.payload = kept_new.payload, second_preimage(kept_new.payload, random.Random(3))
        assert xxhash.xxh3_128_digest(kept_new.payload) == xxhash.xxh3_128_digest(truth)
        assert await world.code(move) == REFUSED
        await world.assert_unchanged()
        kept_new.payload = truth
        await world.cluster.pass_s(REFUSED_PAUSE_S + 0.1)
        assert await world.code(move) == MOVED
        await world.assert_moved()

    play(scenario)


# --- lies about places


def elsewhere(move: MoveAsk, **fields: Any) -> MoveAsk:
    return msgspec.structs.replace(move, new=msgspec.structs.replace(move.new, **fields))


def test_places_against_the_rules_are_refused() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        one_rack = dict(enumerate(["a0", "a1", "a2"]))
        for lie, code in (
            (elsewhere(move, moved=one_rack), REFUSED),
            (elsewhere(move, moved={0: "a0", 1: "a0"}), REFUSED),
            (elsewhere(move, moved={0: "none of the layout"}), REFUSED),
            (elsewhere(move, moved={6: "a0"}), REFUSED),
            (elsewhere(move, k=0), REFUSED),
            (elsewhere(move, m=300), REFUSED),
            (elsewhere(move, first=-1), REFUSED),
            (elsewhere(move, count=0), REFUSED),
            (elsewhere(move, count=10**9), REFUSED),
            (elsewhere(move, first=1, count=move.new.count), CHANGED),
            (elsewhere(move, k=2, m=1), LATER),
            (elsewhere(move, k=4, m=0), LATER),
            (elsewhere(move, epoch=2), LATER),
            (elsewhere(move, epoch=0), CHANGED),
        ):
            await world.cluster.pass_s(60.0)
            found = await world.code(lie)
            assert found == code or (code == LATER and found == REFUSED), lie
        await world.assert_unchanged()

    play(scenario)


def test_a_weaker_profile_is_refused_also_while_a_rack_is_away() -> None:
    async def scenario(world: World) -> None:
        await world.begin(lose=False)
        entry = await world.cluster.entry(world.bucket, KEY)
        await world.cluster.kill("nc")
        for k, m in ((1, 1), (2, 1), (4, 1), (1, 0)):
            move = MoveAsk(world.name, entry.data_id, entry.runs[0], Run(0, 1, k, m, 1))
            assert await world.code(move) != MOVED
            await world.cluster.pass_s(60.0)
        world.cluster.start("nc", maintain=False)
        await world.assert_unchanged()

    play(scenario)


def test_blocks_that_are_whole_where_they_are_do_not_move() -> None:
    async def scenario(world: World) -> None:
        await world.begin(lose=False)
        disks = (await world.places())[0].disks
        spare = next(disk.id for disk in world.cluster.layouts.current.disks if disk.id not in disks)
        rack = world.cluster.layouts.current.node_of(spare)
        position = next(
            position for position, disk in enumerate(disks) if world.cluster.layouts.current.node_of(disk) == rack
        )
        moved = (*disks[:position], spare, *disks[position + 1 :])
        move = await world.write(Placement(Profile(4, 2), moved, {position: spare}))
        assert await world.code(move) == CHANGED
        await world.assert_unchanged()

    play(scenario)


def test_no_block_of_a_bucket_leaves_its_countries() -> None:
    async def scenario(world: World) -> None:
        await world.begin(lose=False, countries=("FR",))
        layout = world.cluster.layouts.current
        inside = {disk.id for disk in layout.disks if layout.country_of(disk.id) == "FR"}
        assert {disk for where in await world.places() for disk in where.disks} <= inside
        world.lost = (await world.places())[0].disks[0]
        world.cluster.lose_disk(world.lost)
        entry = await world.cluster.entry(world.bucket, KEY)
        outside = next(disk.id for disk in layout.disks if disk.id not in inside)
        run_before = entry.runs[0]
        moved = {**run_before.moved, 0: outside}
        move = MoveAsk(world.name, entry.data_id, run_before, msgspec.structs.replace(run_before, moved=moved))
        assert await world.code(move) == REFUSED
        await world.assert_unchanged()

    racks = {"a": "FR/par1/a", "b": "FR/par2/b", "c": "FR/lyo1/c", "d": "DE/ber1/d"}
    play(scenario, racks=racks)


# --- time


def test_a_stale_run_and_a_replayed_ask_change_nothing() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        assert await world.code(move) == MOVED
        other = next(disk for disk in (await world.places())[0].disks if disk[0] != world.lost[0])
        world.cluster.alive.read_only.add(other)
        world.cluster.store(other).lose(
            *[fragment for disk, fragment in await world.new_fragments(move) if disk == other]
        )
        world.lost = other
        again = await world.honest()
        assert await world.code(again) == MOVED
        after = await world.cluster.record(world.bucket, KEY)
        assert await world.code(move) == CHANGED
        assert await world.code(msgspec.structs.replace(again, old=move.old)) == MOVED, "it is in these places"
        assert await world.cluster.record(world.bucket, KEY) == after
        assert await world.cluster.get(world.bucket, KEY) == world.data

    play(scenario)


def test_a_record_that_changes_after_it_was_judged_stays_as_it_was_changed() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        other, newer = world.cluster.new_gateway("h"), os.urandom(LARGE)
        done = False

        async def overwrite(source: str, node: str, method: str, request: object) -> None:
            nonlocal done
            if source == "g" and method == "fragment.headers" and not done:
                done = True
                await world.cluster.put(world.bucket, KEY, newer, other)

        world.cluster.intercept = overwrite
        assert await world.code(move) == CHANGED
        assert done
        assert await world.cluster.get(world.bucket, KEY) == newer

    play(scenario)


def test_two_gateways_that_are_asked_the_same_make_one_move() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        other = world.cluster.new_gateway("h")
        codes = await asyncio.gather(world.code(move), world.code(move, gateway=other))
        assert MOVED in codes
        assert set(codes) <= {MOVED, CHANGED, LATER}
        await world.assert_moved()
        assert await world.code(move) == MOVED

    play(scenario)


def test_a_gateway_that_dies_before_its_accept_leaves_the_move_to_another() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        cluster = world.cluster
        gateways = {"g": cluster.gateway, "h": cluster.new_gateway("h")}
        dead: list[str] = []

        async def die(source: str, node: str, method: str, request: object) -> None:
            if not dead and method == "fragment.touch":
                dead.append(source)
                survivor = gateways["h" if source == "g" else "g"]
                cluster.gateway, cluster.objects = survivor, survivor.objects
                assert await cluster.record(world.bucket, KEY) == world.before
            if source in dead:
                raise PeerUnreachable("the gateway is dead")

        cluster.intercept = die
        cluster.maintain()
        await cluster.pass_s(DELAY_S + 300)
        assert dead
        await cluster.settled()
        await world.assert_moved()

    play(scenario)


def test_without_a_gateway_moves_wait_and_rebuilding_in_place_goes_on() -> None:
    async def scenario(world: World) -> None:
        cluster = world.cluster
        await world.begin(lose=False)
        other = await cluster.bucket("other")
        await cluster.put(other, b"o", os.urandom(5_000))
        cluster.maintain()
        await cluster.settled()
        await cluster.gateway.stop_answering()
        world.lost = next(disk for disk in (await world.places())[0].disks if disk[0] == "c")
        cluster.lose_disk(world.lost)
        await cluster.pass_s(DELAY_S + 120)
        assert await cluster.record(world.bucket, KEY) == world.before
        statuses = await cluster.statuses()
        assert any("No gateway" in status.waits.gateway for status in statuses)
        assert not any(status.busy for status in statuses)
        fragment, disk = next(
            (fragment, disk)
            for fragment, disk in (await cluster.places(other, b"o"))[0].fragments
            if disk != world.lost
        )
        await cluster.store(disk).delete([fragment])
        cluster.gateway.maintain.hint(object_name(other.id, other.shard_numbers, b"o"))
        await cluster.pass_s(60)
        assert cluster.holds(disk, fragment), "no record changes for this"
        before = sum(status.blocks_recoded for status in await cluster.statuses())
        await cluster.pass_s(600)
        assert sum(status.blocks_recoded for status in await cluster.statuses()) == before, "it does not write again"
        cluster.new_gateway("h")
        await cluster.pass_s(120)
        await world.assert_moved()
        assert not any(status.waits.gateway for status in await cluster.statuses())

    play(scenario)


def test_a_gateway_of_an_older_layout_leaves_moves_to_others() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        layouts = world.cluster.layouts
        layout = layouts.current
        newer = Layout(layout.cluster, 2, layout.nodes, layout.disks, layout.seeds)
        layouts._known[2] = newer
        placement = place.choose(
            newer,
            (await world.cluster.entry(world.bucket, KEY)).data_id,
            Profile(4, 2),
            world.cluster.alive.disk_writable,
        )
        move = await world.write(placement)
        move = elsewhere(move, epoch=2)
        assert await world.code(move) == LATER
        layouts.current = newer
        assert await world.code(move) == MOVED
        await world.assert_moved()

    play(scenario)


# --- floods


def test_huge_calls_are_refused_and_their_asker_waits_longer_each_time() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        calls = 0

        async def count(source: str, node: str, method: str, request: object) -> None:
            nonlocal calls
            calls += source == "g"

        world.cluster.intercept = count
        refusals: list[tuple[str, str]] = []
        context = world.cluster.gateway.mover.context
        context.on_refusal = lambda peer, error: refusals.append((peer, getattr(error, "remote_code", "")))
        for number in range(5):
            calls = 0
            for moves in ((move,) * (MOVES_A_CALL + 1), (elsewhere(move, count=100_000),), ()):
                answers = (await world.ask(*moves, asker="evil")).answers
                assert len(answers) <= 1
                assert not calls, "nothing is read for it"
            assert refusals == [("evil", "MOVE_REFUSED")] * 3
            refusals.clear()
            assert (await world.code(move, asker="evil")) == LATER, number
            assert not refusals
            assert not calls
            await world.cluster.pass_s(REFUSED_PAUSE_S * 2**number)
        assert await world.code(move) == MOVED, "others are answered as before"

    play(scenario)


def test_an_asker_has_one_call_at_a_time_and_its_rate_is_bounded() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        codes = await asyncio.gather(*(world.code(move) for _ in range(20)))
        assert sorted(set(codes)) == [LATER, MOVED]
        assert codes.count(MOVED) == 1
        began = world.cluster.loop.time()
        for _ in range(40):
            await world.ask(*[elsewhere(move, moved={0: f"a{n}"}) for n in range(200)], asker="nb")
            await world.cluster.pass_s(0.01)
        assert world.cluster.loop.time() - began < 200
        assert await world.code(move, asker="nc") == MOVED

    play(scenario)


@pytest.mark.parametrize("long", [True, False])
def test_a_node_that_had_long_records_read_waits_before_its_next_call(
    monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    """Records of very many parts, and of one."""

    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        unknown = msgspec.structs.replace(move, data_id=bytes(16))
        assert await world.code(unknown, asker="evil") == CHANGED
        began = world.cluster.loop.time()
        assert await world.code(unknown, asker="evil") == CHANGED
        waited_s = world.cluster.loop.time() - began
        assert (waited_s > 5) == long, waited_s
        began = world.cluster.loop.time()
        assert await world.code(move) == MOVED
        assert world.cluster.loop.time() - began < 5, "others are answered at once"

    if long:  # the one part of the test's record counts as very many
        monkeypatch.setattr("storaged.maintain.mover.PARTS_A_FRAGMENT", 1 / (FRAGMENTS_BURST * 5))
    play(scenario)


def test_what_no_register_has_is_read_from_the_directory_seldom() -> None:
    async def scenario(world: World) -> None:
        await world.begin()
        move = await world.honest()
        assert await world.code(move) == MOVED
        scans = 0

        async def count(source: str, node: str, method: str, request: object) -> None:
            nonlocal scans
            scans += source == "g" and method == "meta.scan"

        world.cluster.intercept = count
        for number in range(20):
            name = object_name(bytes([number]) * 16, range(16), KEY).pack()
            assert await world.code(msgspec.structs.replace(move, name=name), asker=f"n{number}") == LATER
        assert scans <= 3

    play(scenario)


# --- fragments in the way


async def squat(world: World, where: BlockPlace, position: int) -> tuple[str, FragmentId, bytes]:
    """A storage node writes a fragment of its own, sound by itself, where another one is missing. Returns the truth
    too.
    """
    disk, fragment = where.disks[position], where.fragment(position)
    kept = world.cluster.store(disk).kept(fragment)
    payload = bytes(byte ^ 0x55 for byte in kept.payload)
    hashes = list(kept.header.hashes)
    hashes[position] = fragment_hash((payload,))
    await world.forge(disk, msgspec.structs.replace(kept.header, hashes=tuple(hashes)), payload)
    return disk, fragment, kept.payload


def test_a_false_fragment_where_one_was_missing_is_removed_and_rebuilt() -> None:
    """By the disk's own node, which compares the block, or by a gateway, whichever comes first."""

    async def scenario(world: World) -> None:
        await world.begin(lose=False)
        world.cluster.maintain()
        await world.cluster.settled()
        layout, where = world.cluster.layouts.current, (await world.places())[1]
        leader = layout.node_of(layout.replicas_of(RegisterName.unpack(world.name).partition)[0])
        # a node is the master of its own disks
        position = next(position for position in range(4) if layout.node_of(where.disks[position]) != leader)
        disk, fragment, truth = await squat(world, where, position)
        assert await world.cluster.get(world.bucket, KEY) == world.data, "the reader finds out, and says so"
        await world.cluster.pass_s(60)
        assert world.cluster.store(disk).kept(fragment).payload == truth
        assert await world.cluster.record(world.bucket, KEY) == world.before

    play(scenario)


def test_a_false_fragment_where_a_block_will_be_recoded_delays_its_move_a_little() -> None:
    async def scenario(world: World) -> None:
        await world.begin(lose=False)
        cluster = world.cluster
        cluster.maintain()
        await cluster.settled()
        place_ = (await world.places())[0]
        for disk in cluster.layouts.current.disks:
            for position in range(4):
                header = cluster.store(place_.disks[0]).kept(place_.fragment(0)).header
                fragment = FragmentId(place_.entry.data_id, 0, 2, 2, position)
                payload = os.urandom(100)
                hashes = tuple(fragment_hash((payload,)) for _ in range(4))
                lie = msgspec.structs.replace(header, id=fragment.pack(), hashes=hashes, length=100)
                await world.node.context.stores.store(disk.id).write(lie, [payload], sync=True)
        await cluster.kill("nc")
        await cluster.pass_s(DELAY_S + 300)
        for where in await world.places():
            assert str(where.profile) == "2+2"
            assert all(cluster.holds(disk, fragment) for fragment, disk in where.fragments)
        assert await cluster.get(world.bucket, KEY) == world.data

    play(scenario, disks_per_node=2)


def test_a_gateway_deletes_nothing_that_the_survivors_confirm() -> None:
    async def scenario(world: World) -> None:
        await world.begin(lose=False)
        cluster = world.cluster
        where = (await world.places())[0]
        await cluster.put(world.bucket, b"other", os.urandom(LARGE))
        other = (await cluster.places(world.bucket, b"other"))[0]
        before = await cluster.fragments()
        asks = [FragmentAsk(world.name, fragment.pack(), disk) for fragment, disk in where.fragments]
        asks += [FragmentAsk(world.name, fragment.pack(), disk) for fragment, disk in other.fragments]
        asks.append(FragmentAsk(b"x" * 30, where.fragment(0).pack(), where.disks[0]))
        asks.append(FragmentAsk(world.name, b"short", where.disks[0]))
        asks.append(FragmentAsk(world.name, where.fragment(0).pack(), "no disk"))
        found = await cluster.gateway.discarder.answer("evil", DiscardAsk(tuple(asks)))
        codes = [answer.code for answer in found.answers]
        assert codes == [REFUSED] * 6 + [CHANGED] * 6 + [REFUSED, REFUSED, LATER]
        found = await cluster.gateway.discarder.answer("evil", DiscardAsk(tuple(asks)))
        assert {answer.code for answer in found.answers} == {LATER}, "it has to wait"
        assert len((await cluster.gateway.discarder.answer("n", DiscardAsk(tuple(asks) * 30))).answers) == 1
        await cluster.kill("nb", "nc")
        assert {
            answer.code for answer in (await cluster.gateway.discarder.answer("o", DiscardAsk(tuple(asks[:6])))).answers
        } == {LATER}
        cluster.start("nb", "nc", maintain=False)
        assert await cluster.fragments() == before

    play(scenario)


# --- each rule is needed


async def false_bytes(world: World) -> str:
    await world.begin()
    move = await world.honest()
    old = {(disk, fragment) for where in await world.places() for fragment, disk in where.fragments}
    for disk, fragment in await world.new_fragments(move):
        if (disk, fragment) not in old:
            kept = world.cluster.store(disk).kept(fragment)
            payload = bytes(byte ^ 0x55 for byte in kept.payload)
            hashes = list(kept.header.hashes)
            hashes[fragment.position] = fragment_hash((payload,))
            await world.forge(disk, msgspec.structs.replace(kept.header, hashes=tuple(hashes)), payload)
    return await world.code(move)


async def false_bytes_of_another_profile(world: World) -> str:
    await world.begin(lose=False)
    await world.cluster.kill("nc")
    entry = await world.cluster.entry(world.bucket, KEY)
    placement = world.node.maintenance.check.walker.placements.choose(entry, Profile.parse(entry.target), ())
    assert placement is not None
    move = await world.write(placement)
    by_block: dict[int, list[tuple[str, FragmentId]]] = {}
    for disk, fragment in await world.new_fragments(move):
        by_block.setdefault(fragment.block, []).append((disk, fragment))
    for block in by_block.values():
        kept = [world.cluster.store(disk).kept(fragment) for disk, fragment in block]
        payloads = [bytes(byte ^ 0x55 for byte in one.payload) for one in kept]
        hashes = tuple(fragment_hash((payload,)) for payload in payloads)
        for (disk, _), one, payload in zip(block, kept, payloads, strict=True):
            await world.forge(disk, msgspec.structs.replace(one.header, hashes=hashes), payload)
    return await world.code(move)


async def one_rack(world: World) -> str:
    await world.begin()
    disks = (await world.places())[0].disks
    racks = [disk for disk in ("a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2") if disk != world.lost]
    kept = [disk for disk in disks if disk != world.lost]
    heaviest = next(rack for rack in "abc" if rack != world.lost[0])
    more = next(disk for disk in racks if disk[0] == heaviest and disk not in kept)
    moved = tuple(more if disk == world.lost else disk for disk in disks)
    return await world.code(await world.write(Placement(Profile(4, 2), moved, {disks.index(world.lost): more})))


async def deleted_before_the_accept(world: World) -> str:
    await world.begin()
    move = await world.honest()
    old = {(disk, fragment) for where in await world.places() for fragment, disk in where.fragments}

    async def steal(source: str, node: str, method: str, request: object) -> None:
        if source == "g" and method == "meta.prepare":
            for disk, fragment in await world.new_fragments(move):
                if (disk, fragment) not in old:
                    await world.cluster.store(disk).delete([fragment])

    world.cluster.intercept = steal
    return await world.code(move)


async def whole_already(world: World) -> str:
    await world.begin(lose=False)
    disks = (await world.places())[0].disks
    spare = next(disk.id for disk in world.cluster.layouts.current.disks if disk.id not in disks)
    position = next(position for position, disk in enumerate(disks) if disk[0] == spare[0])
    moved = (*disks[:position], spare, *disks[position + 1 :])
    return await world.code(await world.write(Placement(Profile(4, 2), moved, {position: spare})))


@pytest.mark.parametrize(
    ("rule", "broken", "attack"),
    [
        ("judge_block", lambda *_: OK, false_bytes),
        ("must_read", lambda *_: False, false_bytes_of_another_profile),
        ("judge_ask", lambda *_: OK, one_rack),
        ("Mover._touch_new", lambda _mover, _moves, promised: promised.wait(), deleted_before_the_accept),
        ("is_whole", lambda *_: False, whole_already),
    ],
)
@pytest.mark.parametrize("planted", [False, True])
def test_an_attack_succeeds_only_where_its_rule_is_broken(
    monkeypatch: pytest.MonkeyPatch, rule: str, broken: Any, attack: Callable[[World], Any], planted: bool
) -> None:
    if planted:
        monkeypatch.setattr(f"storaged.maintain.mover.{rule}", broken)

    async def scenario(world: World) -> None:
        assert (await attack(world) == MOVED) == planted

    play(scenario)
