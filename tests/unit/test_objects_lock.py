"""Object lock in the object plane: a locked version stays, whatever asks for its removal."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from storaged.errors import AccessDenied, InvalidArgument, InvalidRequest, SlowDown
from storaged.meta.names import RegisterName, Table
from storaged.objects.api import BodyChecks, NewMeta
from storaged.objects.code.history import Bounds
from storaged.objects.code.lock import COMPLIANCE, GOVERNANCE
from storaged.objects.code.versions import access_of
from storaged.objects.configuration.document import NOTHING
from storaged.objects.configuration.kinds import ENABLED, LOCK, SUSPENDED, VERSIONING, ObjectLock, Versioning
from storaged.objects.encryption import KMS, Encryption
from storaged.objects.records import Lock
from storaged.objects.write import versioned
from tests.doubles.clock import LoopClock
from tests.unit.test_objects_multipart import uploaded
from tests.unit.test_objects_versions import Made
from tests.worlds.objects import OWNER, pieces

pytestmark = pytest.mark.virtual_time

DAY_MS = 86_400_000
FEW = Bounds(versions_max=3, versions_bytes_max=20_000, leaf_versions=2, refs_max=3, branch_refs=2)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versioned, "BOUNDS", FEW)


class Locked(Made):
    def __init__(self, default: ObjectLock | None = None, status: str = ENABLED) -> None:
        super().__init__()
        configuration = NOTHING.having(VERSIONING, Versioning(status)).having(LOCK, default or ObjectLock())
        self.bucket = self.plane.configurations.put(self.bare, configuration)

    @property
    def now_ms(self) -> int:
        return self.world.clock.wall_ms()

    def passes(self, ms: int) -> None:
        assert isinstance(self.world.clock, LoopClock)
        self.world.clock.wall += ms

    async def kept(self, lock: Lock | None, data: bytes = b"data") -> str:
        meta = NewMeta(lock=lock)
        result = await self.objects.put(
            self.bucket, b"key", pieces(data), meta, BodyChecks(size=len(data)), owner=OWNER
        )
        return result.version_id

    async def lock(self, version_id: str) -> Lock | None:
        return (await self.objects.head(self.bucket, b"key", version_id=version_id)).lock

    async def stays(self, version_id: str, *, bypass: bool = False) -> None:
        with pytest.raises(AccessDenied):
            await self.objects.delete(self.bucket, b"key", version_id=version_id, bypass_governance=bypass)
        assert await self.got(version_id) == b"data"

    async def goes(self, version_id: str, *, bypass: bool = False) -> None:
        gone = await self.objects.delete(self.bucket, b"key", version_id=version_id, bypass_governance=bypass)
        assert gone.existed


def about(lock: Lock | None, mode: str, until_ms: int) -> bool:
    """The clock goes on meanwhile."""
    return lock is not None and lock.mode == mode and abs(lock.until_ms - until_ms) < 10_000


@pytest.mark.parametrize("lock", [Lock(GOVERNANCE, 1 << 50), Lock(COMPLIANCE, 1 << 50), Lock(hold=True)])
async def test_the_encryption_of_a_locked_version_stays(lock: Lock) -> None:
    """botocore 1.44.8, UpdateObjectEncryption: AccessDenied."""
    made, asked = Locked(), Encryption(KMS, "arn:of:key")
    kept, free = await made.kept(lock), await made.kept(None)
    with pytest.raises(AccessDenied):
        await made.objects.set_encryption(made.bucket, b"key", asked, version_id=kept)
    assert (await made.objects.head(made.bucket, b"key", version_id=kept)).encryption is None
    await made.objects.set_encryption(made.bucket, b"key", asked, version_id=free)
    assert (await made.objects.head(made.bucket, b"key", version_id=free)).encryption == asked
    await made.objects.close()


async def test_governance_keeps_a_version_until_it_is_bypassed_or_over() -> None:
    made = Locked()
    first = await made.kept(Lock(GOVERNANCE, made.now_ms + DAY_MS))
    second = await made.kept(Lock(GOVERNANCE, made.now_ms + DAY_MS))
    await made.stays(first)
    await made.goes(first, bypass=True)
    await made.stays(second)
    made.passes(DAY_MS + 1000)
    await made.goes(second)
    await made.objects.close()


async def test_nothing_but_time_ends_compliance() -> None:
    made = Locked()
    kept = await made.kept(Lock(COMPLIANCE, made.now_ms + DAY_MS))
    await made.stays(kept)
    await made.stays(kept, bypass=True)
    for mode, until_ms in ((COMPLIANCE, made.now_ms + 1000), (GOVERNANCE, made.now_ms + 2 * DAY_MS), ("", 0)):
        with pytest.raises(AccessDenied):
            await made.objects.set_retention(
                made.bucket, b"key", mode, until_ms, version_id=kept, bypass_governance=True
            )
    await made.objects.set_retention(made.bucket, b"key", COMPLIANCE, made.now_ms + 2 * DAY_MS, version_id=kept)
    made.passes(DAY_MS + 1000)
    await made.stays(kept, bypass=True)
    made.passes(DAY_MS + 1000)
    await made.goes(kept)
    await made.objects.close()


async def test_governance_is_made_longer_by_all_and_shorter_by_those_who_may_bypass_it() -> None:
    made = Locked()
    kept = await made.kept(Lock(GOVERNANCE, made.now_ms + DAY_MS))

    async def retain(mode: str, until_ms: int, *, bypass: bool = False) -> None:
        await made.objects.set_retention(made.bucket, b"key", mode, until_ms, version_id=kept, bypass_governance=bypass)

    await retain(GOVERNANCE, made.now_ms + 2 * DAY_MS)
    for mode, until_ms in ((GOVERNANCE, made.now_ms + DAY_MS), (COMPLIANCE, made.now_ms + 9 * DAY_MS), ("", 0)):
        with pytest.raises(AccessDenied):
            await retain(mode, until_ms)
    await retain(GOVERNANCE, made.now_ms + DAY_MS, bypass=True)
    await made.stays(kept)
    await retain("", 0, bypass=True)
    assert await made.lock(kept) is None
    await made.goes(kept)
    await made.objects.close()


async def test_a_legal_hold_keeps_a_version_whoever_asks_and_whatever_its_retention_is() -> None:
    made = Locked()
    kept = await made.kept(Lock(hold=True))
    await made.stays(kept, bypass=True)
    await made.objects.set_retention(made.bucket, b"key", GOVERNANCE, made.now_ms + DAY_MS, version_id=kept)
    await made.objects.set_hold(made.bucket, b"key", False, version_id=kept)
    await made.stays(kept)
    await made.objects.set_hold(made.bucket, b"key", True, version_id=kept)
    await made.stays(kept, bypass=True)
    await made.objects.set_hold(made.bucket, b"key", False, version_id=kept)
    await made.goes(kept, bypass=True)
    await made.objects.close()


async def test_a_lock_is_for_the_object_that_the_decision_saw() -> None:
    made = Locked()
    await made.kept(None)
    seen = access_of(await made.objects.head(made.bucket, b"key"))
    until_ms = made.now_ms + DAY_MS
    await made.objects.set_hold(made.bucket, b"key", False, allowed=seen)
    other = await made.kept(None, b"another object")
    with pytest.raises(SlowDown):
        await made.objects.set_hold(made.bucket, b"key", True, allowed=seen)
    with pytest.raises(SlowDown):
        await made.objects.set_retention(made.bucket, b"key", GOVERNANCE, until_ms, allowed=seen)
    assert await made.lock(other) is None


async def test_new_versions_get_the_default_of_the_bucket_and_uploads_too() -> None:
    made = Locked(ObjectLock(GOVERNANCE, days=2))
    kept = await made.kept(None)
    assert about(await made.lock(kept), GOVERNANCE, made.now_ms + 2 * DAY_MS)
    asked = Lock(COMPLIANCE, made.now_ms + DAY_MS)
    assert await made.lock(await made.kept(asked)) == asked
    held = await made.lock(await made.kept(Lock(hold=True)))
    assert about(held, GOVERNANCE, made.now_ms + 2 * DAY_MS)
    assert held is not None
    assert held.hold
    for lock in (None, asked):
        upload_id, parts = await uploaded(made.objects, made.bucket, [b"d" * 1000, b"e"], meta=NewMeta(lock=lock))
        done = await made.objects.complete(made.bucket, b"key", upload_id, parts, owner=OWNER)
        found = await made.lock(done.version_id)
        assert found == asked if lock else about(found, GOVERNANCE, made.now_ms + 2 * DAY_MS)
        with pytest.raises(AccessDenied):
            await made.objects.delete(made.bucket, b"key", version_id=done.version_id)
    await made.objects.close()


async def test_a_delete_without_a_version_and_overwrites_remove_no_locked_version() -> None:
    made = Locked()
    lock = Lock(COMPLIANCE, made.now_ms + DAY_MS)
    kept = await made.kept(lock)
    await made.kept(None, b"other")
    assert (await made.objects.delete(made.bucket, b"key")).delete_marker
    for number in range(9):  # until it lies on a page
        await made.kept(None, b"%d" % number)
    await made.stays(kept, bypass=True)
    await made.objects.set_tags(made.bucket, b"key", {"a": "b"}, version_id=kept)
    assert await made.lock(kept) == lock
    await made.objects.close()


async def test_a_locked_null_version_is_not_replaced_by_another() -> None:
    """Versioning of such a bucket can't be suspended. A gateway that does not know yet must not be the way out."""
    made = Locked()
    checks = BodyChecks(size=4)
    await made.objects.put(made.bare, b"key", pieces(b"data"), NewMeta(), checks, owner=OWNER)
    await made.objects.set_retention(made.bucket, b"key", COMPLIANCE, made.now_ms + DAY_MS, version_id="null")
    suspended = made.plane.configurations.put(made.bare, NOTHING.having(VERSIONING, Versioning(SUSPENDED)))
    for bucket in (made.bare, suspended):
        with pytest.raises(AccessDenied):
            await made.objects.put(bucket, b"key", pieces(b"else"), NewMeta(), checks, owner=OWNER)
        with pytest.raises(AccessDenied):
            await made.objects.delete(bucket, b"key")
        assert await made.got("null") == b"data"
    await made.objects.close()


async def test_a_lock_that_comes_between_promise_and_accept_counts() -> None:
    made = Locked()
    kept = await made.kept(None)

    async def lock(name: RegisterName) -> None:
        assert name.table == Table.OBJECT
        until_ms = made.now_ms + DAY_MS
        await made.objects.set_retention(made.bucket, b"key", COMPLIANCE, until_ms, version_id=kept)

    made.world.ring.interfere = lock
    await made.stays(kept, bypass=True)
    await made.objects.close()


async def test_what_no_lock_can_be() -> None:
    made = Locked()
    with pytest.raises(InvalidArgument):
        await made.kept(Lock(GOVERNANCE, made.now_ms - 1))
    kept = await made.kept(None)
    with pytest.raises(InvalidArgument):
        await made.objects.set_retention(made.bucket, b"key", GOVERNANCE, made.now_ms - 1, version_id=kept)
    plain = Made(ENABLED)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: plain.objects.set_retention(plain.bucket, b"key", GOVERNANCE, made.now_ms + DAY_MS),
        lambda: plain.objects.set_hold(plain.bucket, b"key", True),
        lambda: plain.objects.put(
            plain.bare, b"k", pieces(b""), NewMeta(lock=Lock(hold=True)), BodyChecks(size=0), owner=OWNER
        ),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest):
            await call()
    await made.objects.close()
    await plain.objects.close()
