"""Where a gateway keeps its bucket keys: the ring's registers, the first process's log, and what status says of
damage."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from storaged.admin.status import judge
from storaged.errors import KeyringUnavailable
from storaged.keys import CopyLog, KeyChange, StoredRegister, write_restored
from storaged.meta.names import Value, Visibility, system_name
from storaged.node import keyhome
from storaged.node.keyhome import CopiesDesk, FirstCopies, LeaderCopies, RingRegisters, take_restored
from storaged.wire import encode
from tests.unit.test_admin_status import NOW, codes, facts
from tests.unit.test_key_copies import KEYRING, copy_of
from tests.unit.test_keyring import BUCKET, CREDENTIAL, HandClock, Rig, create_keyring
from tests.worlds.objects import World

DAY_S = 86_400


async def test_registers_have_sequences_and_what_is_gone_is_read_and_not_scanned() -> None:
    ring = World().ring
    registers = RingRegisters(ring, ring)
    assert await registers.read("key/aa") is None
    assert await registers.change("key/aa", lambda before: None) is None
    for number, gone in ((1, False), (2, False), (3, True)):
        before = StoredRegister(number - 1, str(number - 1).encode()) if number > 1 else None
        seen: list[StoredRegister | None] = []

        def update(
            kept: StoredRegister | None,
            seen: list[StoredRegister | None] = seen,
            number: int = number,
            gone: bool = gone,
        ) -> KeyChange:
            seen.append(kept)
            return KeyChange(str(number).encode(), gone)

        assert await registers.change("key/aa", update) == StoredRegister(number, str(number).encode())
        assert seen[0] == before
    await registers.change("key/bb", lambda before: KeyChange(b"b"))
    await registers.change("other", lambda before: KeyChange(b"o"))
    assert await registers.read("key/aa") == StoredRegister(3, b"3")
    assert [row async for row in registers.scan("key/")] == [("key/bb", StoredRegister(1, b"b"))]
    ring.values[system_name("key/bb")] = Value(2, b"", Visibility.LIVE, b"")
    assert await registers.read("key/bb") == StoredRegister(2, b"")


@pytest.fixture
async def first(tmp_path):
    log = CopyLog(tmp_path, KEYRING)
    await log.open()
    clock = HandClock()
    made = FirstCopies(log, clock)
    made.clock = clock
    yield made
    log.close()


async def test_damage_is_shown_until_it_is_mended_and_a_day_longer(first) -> None:
    first.report(b"a" * 16, "", True)
    assert first.damaged() == []
    first.report(b"a" * 16, "it was emptied", False)
    first.clock.now = 5.0
    first.report(b"a" * 16, "it was emptied", False)
    [found] = first.damaged()
    assert (found.bucket, found.detail, found.mended) == ("61" * 16, "it was emptied", False)
    assert found.since_ms == HandClock().wall_ms()
    first.clock.now = 2 * DAY_S
    first.report(b"a" * 16, "", True)
    assert [(damage.detail, damage.mended) for damage in first.damaged()] == [("it was emptied", True)]
    first.clock.now = 3 * DAY_S
    assert len(first.damaged()) == 1
    first.clock.now = 3 * DAY_S + 1
    assert first.damaged() == []


async def test_only_so_much_damage_is_remembered(first, monkeypatch) -> None:
    monkeypatch.setattr(keyhome, "DAMAGE_KEPT_MAX", 3)
    for number in range(10):
        first.report(bytes([number]) * 16, "gone", False)
    assert len(first.damaged()) == 3


async def test_status_names_each_damaged_key_and_is_at_risk_while_one_is_not_mended(first) -> None:
    first.report(b"a" * 16, "it was emptied", True)
    found = judge(facts(key_damage=first.damaged()), NOW)
    assert (found["verdict"], codes(found)) == ("DEGRADED", ["BUCKET_KEY_DAMAGED"])
    assert found["problems"][0]["subject"] == "key/" + "61" * 16
    for number in range(20):
        first.report(bytes([number]) * 16, "it was emptied", False)
    found = judge(facts(key_damage=first.damaged()), NOW)
    assert (found["verdict"], len(found["problems"])) == ("AT_RISK", 10)
    assert "not mended; 21 in all" in found["problems"][0]["detail"]


class OneTalk:
    """A ``Leader`` whose first process answers in this one."""

    def __init__(self, desk: CopiesDesk) -> None:
        self.desk = desk
        self.told: list[dict[str, Any]] = []

    async def ask(self, message: dict[str, Any]) -> tuple[str, str]:
        try:
            return "", await self.desk.serve(message)
        except KeyringUnavailable as error:
            return error.message, ""

    def tell(self, message: dict[str, Any]) -> None:
        self.told.append(message)


async def test_a_further_worker_has_the_copies_of_the_first_process(first) -> None:
    desk = CopiesDesk()
    copies = LeaderCopies(OneTalk(desk))  # type: ignore[arg-type]
    asking = asyncio.ensure_future(copies.get(copy_of(1)[0]))
    await asyncio.sleep(0)
    assert not asking.done()
    desk.open(first)
    assert await asking is None
    await copies.keep(*copy_of(1))
    assert await copies.get(copy_of(1)[0]) == copy_of(1)[1] == await first.get(copy_of(1)[0])
    copies.report(b"a" * 16, "gone", False)
    await desk.serve(copies._leader.told[0])  # type: ignore[attr-defined]
    assert len(first.damaged()) == 1
    await copies.forget([copy_of(1)[0]])
    assert first.log.count == 0
    with pytest.raises(KeyringUnavailable):
        await copies.every()
    first.log.close()
    with pytest.raises(KeyringUnavailable, match="copies of bucket keys cannot be had"):
        await copies.keep(*copy_of(2))


async def test_a_first_process_without_a_keyring_is_not_waited_for_for_ever(monkeypatch) -> None:
    monkeypatch.setattr(keyhome, "FIRST_PROCESS_WAIT_S", 0.01)
    with pytest.raises(KeyringUnavailable, match="has no keyring open"):
        await LeaderCopies(OneTalk(CopiesDesk())).get(b"a" * 16)  # type: ignore[arg-type]


async def test_what_an_operator_restored_mends_the_ring_and_the_file_goes(tmp_path) -> None:
    material = create_keyring(tmp_path / "keyring", CREDENTIAL)
    rig = Rig(material)
    await rig.keyring.create_bucket_key(BUCKET, ())
    copy = rig.copies.held[BUCKET]
    rig.registers.forge("key/" + BUCKET.hex(), b"")
    log = CopyLog(tmp_path, material.keyring_id)
    await log.open()
    fresh = Rig(material, registers=rig.registers, copies=FirstCopies(log, rig.clock))
    with pytest.raises(KeyringUnavailable):
        await fresh.keyring.bucket_key(BUCKET, ())
    await take_restored(fresh.keyring, log)
    write_restored(tmp_path, material.keyring_id, [copy])
    await take_restored(fresh.keyring, log)
    assert not (tmp_path / "bucketkeys.restored").exists()
    assert (await fresh.keyring.bucket_key(BUCKET, ())).version == 1
    assert [damage.mended for damage in fresh.copies.damaged()] == [True]
    write_restored(tmp_path, b"x" * 16, [encode([b"?" * 16, []])])
    await take_restored(fresh.keyring, log)
    assert (tmp_path / "bucketkeys.restored").exists(), "another keyring's stay where they are"
    log.close()
