"""Audits what clients change over S3: buckets that they make, configure and delete, users, groups, roles, policies and
keys; wrappers around ``objects.api.Buckets`` and ``Users``.

The intent is on disk before something is changed, and the outcome before the client gets its answer. A user
whose request was refused less than a minute ago writes no further intents; its further refusals are counted
(``Trail.refused``), so that a loop over a bucket that is not empty can't fill the disk. Success always has its entry.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, TypeVar

from storaged.clock import Clock
from storaged.cluster.audit.format import DONE
from storaged.cluster.audit.trail import Trail, audited
from storaged.errors import AuditUnwritable, NoSuchBucket, ServiceUnavailable, StoragedError
from storaged.objects.accounts import StoredAccount
from storaged.objects.api import Accounts, Buckets, ConfigurationChange, Principal, Users
from storaged.objects.configuration.document import NOTHING, Configuration, Kind
from storaged.objects.records import BucketRecord
from storaged.objects.user_types import NO_FACTS, AccountChange
from storaged.wire import Message

T = TypeVar("T", bound=Message)

Audited = Callable[[str, "Principal | None", str, bool, Mapping[str, Any]], AbstractAsyncContextManager[dict[str, Any]]]
"""(kind, who, target, whether it is surely refused, facts): see ``Recorder.audited``."""

NOT_AUDITED: Final = "the gateway's audit log cannot be written (AUDIT_UNWRITABLE)."
"""The message to a client; the log of the gateway says more."""

QUIET_S: Final = 60.0
REFUSED_LATELY_MAX: Final = 4096


class Recorder:
    """Writes the entries of what a client changes."""

    def __init__(self, trail: Trail, clock: Clock) -> None:
        self._trail = trail
        self._clock = clock
        self._refused_lately: dict[tuple[str, str], float] = {}
        """(kind, actor) -> when its last request was refused."""

    @asynccontextmanager
    async def audited(
        self, kind: str, who: Principal | None, target: str, refused_surely: bool, facts: Mapping[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        actor = f"s3:{who.access_key}" if who is not None else ""
        name, now = (kind, actor), self._clock.monotonic()
        since = self._refused_lately.get(name)
        try:
            if refused_surely or (since is not None and now - since < QUIET_S):
                found: dict[str, Any] = {}
                try:
                    yield found
                except StoragedError as error:
                    self._trail.refused(kind, error.code, actor=actor, target=target, **facts)
                    raise
                self._trail.note(kind, actor=actor, target=target, outcome=DONE, **{**facts, **found})
            else:
                async with audited(self._trail, kind, actor=actor, target=target, **facts) as found:
                    yield found
        except AuditUnwritable:
            raise ServiceUnavailable(f"Nothing was done: {NOT_AUDITED}") from None
        except StoragedError:
            self._refused_lately.pop(name, None)
            while len(self._refused_lately) >= REFUSED_LATELY_MAX:
                del self._refused_lately[next(iter(self._refused_lately))]
            self._refused_lately[name] = now
            raise


class AuditedBuckets:
    """A ``Buckets`` with audited ``create``, ``configure`` and ``delete``; it passes all other calls on."""

    def __init__(self, buckets: Buckets, trail: Trail, clock: Clock) -> None:
        self._buckets = buckets
        self._audited = Recorder(trail, clock).audited
        self.try_get = buckets.try_get
        self.get = buckets.get
        self.fences_seen = buckets.fences_seen
        self.gone = buckets.gone
        self.known_everywhere = buckets.known_everywhere
        self.renewed = buckets.renewed
        self.list_buckets = buckets.list_buckets
        self.configuration_of = buckets.configuration_of
        self.configuration = buckets.configuration

    async def create(
        self,
        who: Principal,
        name: str,
        *,
        region: str,
        countries: tuple[str, ...] = (),
        object_lock: bool = False,
        configuration: Configuration = NOTHING,
    ) -> BucketRecord:
        facts = {"countries": ",".join(countries)} if countries else {}
        async with self._audited("bucket.create", who, f"bucket:{name}", await self._exists(name), facts) as found:
            made = await self._buckets.create(
                who,
                name,
                region=region,
                countries=countries,
                object_lock=object_lock,
                configuration=configuration,
            )
            found["bucket"] = made.id.hex()
        return made

    async def delete(self, bucket: BucketRecord, *, who: Principal | None = None) -> None:
        facts = {"bucket": bucket.id.hex()}
        async with self._audited("bucket.delete", who, f"bucket:{bucket.name}", False, facts):
            await self._buckets.delete(bucket, who=who)

    async def configure(
        self, bucket: BucketRecord, kind: Kind[T], change: ConfigurationChange[T], *, who: Principal | None = None
    ) -> None:
        if not kind.audited:
            await self._buckets.configure(bucket, kind, change, who=who)
            return
        facts = {"bucket": bucket.id.hex(), "configuration": kind.name}
        async with self._audited("bucket.configure", who, f"bucket:{bucket.name}", False, facts):
            await self._buckets.configure(bucket, kind, change, who=who)

    async def _exists(self, name: str) -> bool:
        """Whether the bucket exists: ``create`` refuses then, and needs no intent."""
        try:
            return await self._buckets.get(name) is not None
        except NoSuchBucket:
            return False
        except StoragedError:
            return True  # ``create`` decides: it makes no bucket that can't be read


class AuditedUsers:
    """A ``Users`` with audited changes of accounts and of their roots' keys; it passes all other calls on."""

    def __init__(self, users: Users, trail: Trail, clock: Clock) -> None:
        self._users = users
        self._audited = Recorder(trail, clock).audited
        self.accounts: Accounts = AuditedAccounts(users.accounts, self._audited)
        self.lookup = users.lookup
        self.try_get = users.try_get
        self.lookup_session = users.lookup_session
        self.try_session = users.try_session
        self.seal_session = users.seal_session
        self.add = users.add
        self.list_users = users.list_users
        self.directory = users.directory
        self.remove = users.remove
        self.root_keys = users.root_keys

    async def add_key(self, user_id: str, name: str, iam_user: str, *, who: Principal | None = None) -> tuple[str, str]:
        """The key of a user of the account has its entry when the account lists it: before, it grants nothing."""
        if iam_user:
            return await self._users.add_key(user_id, name, iam_user, who=who)
        async with self._audited("iam.key", who, f"user:{name}", False, {"action": "CreateAccessKey"}) as found:
            access_key, secret = await self._users.add_key(user_id, name, iam_user, who=who)
            found["access_key"] = access_key
        return access_key, secret

    async def set_key_active(
        self, user_id: str, access_key: str, active: bool, *, who: Principal | None = None
    ) -> None:
        facts = {"action": "UpdateAccessKey", "status": "Active" if active else "Inactive"}
        async with self._audited("iam.key", who, f"key:{access_key}", False, facts):
            await self._users.set_key_active(user_id, access_key, active, who=who)

    async def remove_key(self, user_id: str, access_key: str, iam_user: str, *, who: Principal | None = None) -> None:
        if iam_user:
            await self._users.remove_key(user_id, access_key, iam_user, who=who)
            return
        async with self._audited("iam.key", who, f"key:{access_key}", False, {"action": "DeleteAccessKey"}):
            await self._users.remove_key(user_id, access_key, iam_user, who=who)


class AuditedAccounts:
    """An ``Accounts`` with audited changes."""

    def __init__(self, accounts: Accounts, audited: Audited) -> None:
        self._accounts = accounts
        self._audited = audited
        self.get = accounts.get
        self.new_id = accounts.new_id

    async def change(
        self,
        user_id: str,
        edit: AccountChange,
        *,
        action: str,
        target: str,
        who: Principal | None = None,
        facts: Mapping[str, str] = NO_FACTS,
    ) -> StoredAccount:
        arn = {"arn": who.identity.arn} if who is not None and who.identity is not None else {}
        async with self._audited("iam.change", who, target, False, {"action": action, **arn, **facts}):
            return await self._accounts.change(user_id, edit, action=action, target=target, who=who, facts=facts)
