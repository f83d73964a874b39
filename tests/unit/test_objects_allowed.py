"""A change is for the object that the decision about access saw: when the record is another one by the time of the
compare-and-set, nothing is changed."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import pytest

from storaged.errors import AccessDenied, SlowDown
from storaged.objects.api import ABSENT, AMEND, DELETE, READ, WRITE, BodyChecks, CopySource, Grant, NewMeta, Principal
from storaged.objects.code.lock import GOVERNANCE
from storaged.objects.configuration.kinds import ENABLED
from storaged.objects.granted import GrantedObjects
from storaged.objects.records import Lock
from tests.unit.test_objects_lock import DAY_MS, Locked
from tests.unit.test_objects_multipart import uploaded
from tests.unit.test_objects_versions import Made
from tests.worlds.objects import OWNER, pieces

pytestmark = pytest.mark.virtual_time

ALICE = Principal(OWNER, "alice", "AKALICE")


class Seen(Made):
    def __init__(self, status: str = "") -> None:
        super().__init__(status)
        self.granted = GrantedObjects(self.objects)

    async def seen(self, access: int) -> Grant:
        """Permission for the key as it is now."""
        found = await self.granted.look(self.bucket, b"key", "")
        return Grant(self.bucket, b"key", access, ABSENT if found is None else found)

    async def replace(self, grant: Grant, data: bytes) -> None:
        await self.granted.put(grant, b"key", pieces(data), NewMeta(), BodyChecks(size=len(data)), owner=OWNER)


@pytest.mark.parametrize("status", ["", ENABLED])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("size", [3, 50_000])
async def test_a_put_and_a_delete_are_for_the_object_that_was_seen(status: str, there: bool, size: int) -> None:
    made = Seen(status)
    if there:
        await made.put(b"first")
    grant = await made.seen(WRITE | DELETE)
    await made.put(b"other")
    with pytest.raises(SlowDown):
        await made.replace(grant, b"x" * size)
    with pytest.raises(SlowDown):
        await made.granted.delete(grant, b"key", who=ALICE)
    assert await made.got() == b"other"
    await made.replace(await made.seen(WRITE), b"x" * size)
    assert len(await made.got()) == size
    await made.granted.delete(await made.seen(DELETE), b"key", who=ALICE)
    await made.replace(await made.seen(WRITE), b"again")
    await made.objects.close()


async def test_a_change_of_tags_or_of_the_list_makes_another_object() -> None:
    made = Seen()
    await made.put(b"data")
    grant = await made.seen(READ | WRITE | DELETE)
    await made.objects.set_tags(made.bucket, b"key", {"class": "kept"})
    with pytest.raises(SlowDown):
        await made.granted.delete(grant, b"key", who=ALICE)
    with pytest.raises(SlowDown):
        await made.replace(grant, b"x")
    source = CopySource(made.bucket, b"key")
    into = Grant(made.bucket, b"copy", WRITE)
    with pytest.raises(SlowDown):
        await made.granted.copy(grant, source, into, b"copy", owner=OWNER, meta=None)
    await made.granted.copy(await made.seen(READ), source, into, b"copy", owner=OWNER, meta=None)
    await made.objects.close()


async def test_a_complete_is_for_the_object_that_was_seen_and_may_come_again() -> None:
    made = Seen()
    upload_id, parts = await uploaded(made.objects, made.bucket, [b"d" * 1000, b"e"])
    grant = await made.seen(WRITE)
    await made.put(b"other")
    with pytest.raises(SlowDown):
        await made.granted.complete(grant, b"key", upload_id, parts, owner=OWNER)
    assert await made.got() == b"other"
    found = await made.granted.look_upload(made.bucket, b"key", upload_id)
    assert found is not None
    assert found.owner == OWNER
    await made.granted.complete(await made.seen(WRITE), b"key", upload_id, parts, owner=OWNER)
    assert await made.got() == b"d" * 1000 + b"e"
    assert await made.granted.look_upload(made.bucket, b"key", upload_id) is None
    await made.objects.close()


async def test_a_complete_whose_object_changes_at_the_last_moment_leaves_the_upload_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Seen()
    upload_id, parts = await uploaded(made.objects, made.bucket, [b"d" * 1000, b"e"])
    grant = await made.seen(WRITE)

    async def no_early_check(*_: Any) -> None:
        await made.put(b"other")

    monkeypatch.setattr("storaged.objects.write.complete.check_early", no_early_check)
    with pytest.raises(SlowDown):
        await made.granted.complete(grant, b"key", upload_id, parts, owner=OWNER)
    monkeypatch.undo()
    assert await made.got() == b"other"
    await made.granted.complete(await made.seen(WRITE), b"key", upload_id, parts, owner=OWNER)
    assert await made.got() == b"d" * 1000 + b"e"
    await made.objects.close()


class Recorded:
    """A ``LockAudit``."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, dict[str, Any]]] = []

    def __call__(
        self, kind: str, who: Principal, target: str, _refused: bool, facts: Any
    ) -> AbstractAsyncContextManager[Any]:
        assert who is ALICE
        self.entries.append((kind, target, {name: facts[name] for name in facts if name not in ("bucket", "version")}))
        return nullcontext()


async def test_what_changes_a_lock_is_audited_and_a_bypass_only_when_there_is_one() -> None:
    made, audit = Locked(), Recorded()
    granted = GrantedObjects(made.objects, audit=audit)
    grant = Grant(made.bucket, b"key", READ | AMEND | DELETE)
    plain = await made.kept(None)
    kept = await made.kept(Lock(GOVERNANCE, made.now_ms + DAY_MS))
    await granted.delete(grant, b"key", who=ALICE, version_id=plain, bypass_governance=True)
    assert audit.entries == []
    with pytest.raises(AccessDenied):
        await granted.delete(grant, b"key", who=ALICE, version_id=kept)
    assert audit.entries == []
    until_ms = made.now_ms + 2 * DAY_MS
    await granted.set_retention(grant, b"key", GOVERNANCE, until_ms, who=ALICE, version_id=kept)
    for hold in (True, False):
        await granted.set_hold(grant, b"key", hold, who=ALICE, version_id=kept)
    await granted.set_retention(grant, b"key", "", 0, who=ALICE, version_id=kept, bypass_governance=True)
    await granted.set_retention(grant, b"key", GOVERNANCE, until_ms, who=ALICE, version_id=kept)
    await granted.delete(grant, b"key", who=ALICE, version_id=kept, bypass_governance=True)
    target = f"object:{made.bucket.name}/key"
    kept_again = ("object.retention", target, {"mode": GOVERNANCE, "until_ms": until_ms})
    assert audit.entries == [
        kept_again,
        ("object.hold", target, {"hold": True}),
        ("object.hold", target, {"hold": False}),
        ("object.retention", target, {"mode": "", "until_ms": 0, "bypass": True}),
        kept_again,
        ("object.bypass", target, {}),
    ]
    await made.objects.close()
