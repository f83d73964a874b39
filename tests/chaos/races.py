"""Clients race on a few keys through three gateways, which are killed and paused; the checker of the simulation judges
the answers. ``tests.sim.racing`` has what the clients do.

A run has rounds. Each has new keys in three buckets: without versioning, with versioning and Object Lock and a
lifecycle, in which a day lasts seconds, and with versioning that was suspended. At the end of a round all keys are
listed, and the history of each is judged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import re
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, EndpointConnectionError

from tests.patience import SLOWNESS
from tests.servers import Servers
from tests.sim.racing import PLAIN, SUSPENDED, VERSIONED, Race, Refused, Unknown, expiries
from tests.sim.version_histories import DENIED, MISSING, REFUSED, Adds, Conditional, Lock, judge

GATEWAYS = ("gateway", "gateway2", "gateway3")
CLIENTS = 9
KEYS = {VERSIONED: 3, PLAIN: 2, SUSPENDED: 2}
ROUND_S = 6.0
DAY_S = 2
TIMEOUT_S = 20
BEGUN_ENOUGH = 40
"""Operations of a round, at least: on a busy machine it lasts longer."""
ANSWERS = {
    "PreconditionFailed": REFUSED,
    "NoSuchKey": MISSING,
    "NoSuchVersion": MISSING,
    "404": MISSING,
    "AccessDenied": DENIED,
    "ConditionalRequestConflict": "",
    "InvalidArgument": "",  # a retention that was over when the request came
}
RULE = {
    "ID": "old",
    "Status": "Enabled",
    "Filter": {"Prefix": ""},
    "NoncurrentVersionExpiration": {"NoncurrentDays": 1, "NewerNoncurrentVersions": 2},
}


class Gateway(NamedTuple):
    name: str
    client: Any


@contextlib.contextmanager
def answered() -> Iterator[None]:
    try:
        yield
    except (EndpointConnectionError, ConnectTimeoutError):
        raise Refused from None  # nothing was sent
    except ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status >= 500 or code == "NoSuchUpload":  # it was completed, perhaps
            raise Unknown from None
        if code not in ANSWERS:
            raise
        raise Refused(ANSWERS[code]) from None
    except (BotoCoreError, OSError):
        raise Unknown from None


class S3Port:
    """``racing.Port``: each request goes to one of the gateways that run."""

    def __init__(self, gateways: list[Gateway], down: set[str], chance: random.Random) -> None:
        self._gateways = gateways
        self._down = down
        self._chance = chance

    def _any(self) -> Any:
        up = [one for one in self._gateways if one.name not in self._down] or self._gateways
        return self._chance.choice(up).client

    async def _call(self, what: str, bucket: str, key: str, **named: Any) -> dict[str, Any]:
        with answered():
            found: dict[str, Any] = await asyncio.to_thread(getattr(self._any(), what), Bucket=bucket, Key=key, **named)
        return found

    async def put(self, bucket: str, key: str, body: bytes, how: Adds, lock: Lock) -> tuple[str, str]:
        named: dict[str, Any] = {"ObjectLockLegalHoldStatus": "ON"} if lock.hold else {}
        if lock.mode:
            named |= {"ObjectLockMode": lock.mode, "ObjectLockRetainUntilDate": _time(lock)}
        return _made(await self._call("put_object", bucket, key, Body=body, **_conditions(how), **named))

    async def copy(self, bucket: str, key: str, body: bytes) -> tuple[str, str]:
        source = f"source {hashlib.sha256(body).hexdigest()[:16]}"
        try:
            await self._call("put_object", PLAIN, source, Body=body)
        except Unknown:
            raise Refused from None
        found = await self._call("copy_object", bucket, key, CopySource={"Bucket": PLAIN, "Key": source})
        return _made({"ETag": found["CopyObjectResult"]["ETag"], "VersionId": found.get("VersionId", "")})

    async def begin_upload(self, bucket: str, key: str, body: bytes) -> tuple[Any, str]:
        upload = (await self._call("create_multipart_upload", bucket, key))["UploadId"]
        part = await self._call("upload_part", bucket, key, UploadId=upload, PartNumber=1, Body=body)
        named = {"UploadId": upload, "MultipartUpload": {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}}
        return named, hashlib.md5(hashlib.md5(body).digest()).hexdigest() + "-1"

    async def complete(self, bucket: str, key: str, upload: Any, how: Conditional) -> tuple[str, str]:
        return _made(await self._call("complete_multipart_upload", bucket, key, **upload, **_conditions(how)))

    async def delete(self, bucket: str, key: str, version: str, how: Conditional, *, bypass: bool) -> str:
        named = _conditions(how) | ({"VersionId": version} if version else {})
        if bypass:
            named["BypassGovernanceRetention"] = True
        found = await self._call("delete_object", bucket, key, **named)
        return str(found.get("VersionId", "")) if found.get("DeleteMarker") and not version else ""

    async def retain(self, bucket: str, key: str, version: str, lock: Lock, *, bypass: bool) -> None:
        retention = {"Mode": lock.mode, "RetainUntilDate": _time(lock)}
        named = {"BypassGovernanceRetention": True} if bypass else {}
        await self._call("put_object_retention", bucket, key, VersionId=version, Retention=retention, **named)

    async def hold(self, bucket: str, key: str, version: str, *, on: bool) -> None:
        status = {"Status": "ON" if on else "OFF"}
        await self._call("put_object_legal_hold", bucket, key, VersionId=version, LegalHold=status)

    async def lock_of(self, bucket: str, key: str, version: str) -> Lock:
        found = await self._call("head_object", bucket, key, VersionId=version)
        until = found.get("ObjectLockRetainUntilDate")
        until_ms = round(until.timestamp() * 1000) if until is not None else 0
        return Lock(found.get("ObjectLockMode", ""), until_ms, found.get("ObjectLockLegalHoldStatus") == "ON")

    async def current(self, bucket: str, key: str) -> str:
        return _made(await self._call("head_object", bucket, key))[1]

    async def versions(self, bucket: str, key: str) -> list[tuple[str, str]]:
        """From the document: boto3 sorts versions and markers apart, and loses their order."""
        url = self._any().generate_presigned_url(
            "list_object_versions", Params={"Bucket": bucket, "Prefix": key, "MaxKeys": 1000}
        )
        try:
            document = await asyncio.to_thread(_fetched, url)
        except OSError:
            raise Unknown from None
        assert "<IsTruncated>false</IsTruncated>" in document, document[:500]
        return [(found["id"], found["etag"] or "") for found in _LISTED.finditer(document)]


_LISTED = re.compile(
    r"<(?P<what>Version|DeleteMarker)>.*?<VersionId>(?P<id>[^<]*)</VersionId>"
    r"(?:(?!</(?P=what)>).)*?(?:<ETag>&quot;(?P<etag>[^&]*)&quot;</ETag>.*?)?</(?P=what)>",
    re.DOTALL,
)


def _fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        found: bytes = answer.read()
    return found.decode()


def _time(lock: Lock) -> datetime:
    return datetime.fromtimestamp(lock.until_ms / 1000, UTC)


def _made(answer: dict[str, Any]) -> tuple[str, str]:
    return str(answer.get("VersionId", "")), str(answer["ETag"]).strip('"')


def _conditions(how: Conditional) -> dict[str, Any]:
    return ({"IfMatch": f'"{how.if_match}"'} if how.if_match else {}) | ({"IfNoneMatch": "*"} if how.if_absent else {})


# --- what happens to gateways


class Nemesis:
    """Pauses or kills gateways, one after the other."""

    def __init__(self, servers: Servers, down: set[str], chance: random.Random) -> None:
        self._servers = servers
        self._down = down
        self._chance = chance
        self.done: Counter[str] = Counter()
        self.killing: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Until it is cancelled; a kill that is under way goes on (``killing``)."""
        while True:
            await asyncio.sleep(self._chance.uniform(0.3, 1.5))
            name = self._chance.choice(GATEWAYS)
            if self._chance.random() < 0.6:
                await self._pause(name)
            else:
                self.killing = asyncio.ensure_future(self._kill(name))
                await asyncio.shield(self.killing)

    async def _pause(self, name: str) -> None:
        pid = self._servers.pid_of(name)
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._chance.uniform(0.1, 1.5))
        finally:
            os.kill(pid, signal.SIGCONT)
        self.done["paused"] += 1

    async def _kill(self, name: str) -> None:
        self._down.add(name)
        await asyncio.to_thread(self._servers.kill_node, name)
        await asyncio.to_thread(self._servers.start_node, name)
        self._down.discard(name)
        self.done["killed"] += 1


# --- a run


class Races:
    """``seconds``: for how long rounds begin; at least ``least`` are played. ``wrong`` is empty when all is well."""

    def __init__(self, servers: Servers, *, seed: int = 1, say: Callable[[str], None] = print) -> None:
        self._servers = servers
        self._chance = random.Random(seed)
        self._say = say
        self._down: set[str] = set()
        self._gateways: list[Gateway] = []
        self._steady: Any = None
        """A client that tries again."""
        self.nemesis = Nemesis(servers, self._down, self._chance)
        self.counts: Counter[str] = Counter()
        self.rounds = self.keys = self.operations = 0
        self.wrong: list[str] = []
        self.histories: dict[str, list[str]] = {}
        """Of the keys about which something is wrong: what clients asked and were answered, in the order of returns."""

    def run(self, seconds: float, *, least: int = 1) -> None:
        asyncio.run(self._run(seconds, least))

    async def _run(self, seconds: float, least: int) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4 * CLIENTS))
        self._begin()
        end = time.monotonic() + seconds
        while time.monotonic() < end or self.rounds < least:
            await self._round()
            self._say(f"round {self.rounds}: {self.operations} operations, {dict(self.nemesis.done)}, {self.wrong}")

    def _begin(self) -> None:
        """A day lasts seconds, and there are the buckets."""
        for name in GATEWAYS:
            config = self._servers.servers[name].config
            config.write_text(config.read_text() + f"\n[limits]\nlifecycle_day_s = {DAY_S}\n")
        self._servers.begin_again(*GATEWAYS)
        self._servers.wait_healthy(120)
        options = {"read_timeout_s": TIMEOUT_S, "connections": 4 * CLIENTS}
        self._gateways = [
            Gateway(name, self._servers.boto3(endpoint_url=self._servers.endpoint_of(name), **options))
            for name in GATEWAYS
        ]
        client = self._steady = self._servers.boto3(attempts=5)
        client.create_bucket(Bucket=PLAIN)
        client.create_bucket(Bucket=SUSPENDED)
        client.create_bucket(Bucket=VERSIONED, ObjectLockEnabledForBucket=True)
        client.put_bucket_lifecycle_configuration(Bucket=VERSIONED, LifecycleConfiguration={"Rules": [RULE]})

    def _port(self) -> S3Port:
        return S3Port(self._gateways, self._down, self._chance)

    async def _round(self) -> None:
        self.rounds += 1
        race = Race(
            self._chance,
            lambda: time.time_ns() // 1_000_000,
            lambda body: hashlib.md5(body).hexdigest(),
            short_locks=True,
        )
        places = [(kind, f"{self.rounds}-{kind}-{number}") for kind, count in KEYS.items() for number in range(count)]
        await self._suspend(race, [key for kind, key in places if kind == SUSPENDED])
        nemesis = asyncio.ensure_future(self.nemesis.run())
        end = time.monotonic() + ROUND_S

        async def client() -> None:
            port = self._port()
            while time.monotonic() < end or len(race.history) < BEGUN_ENOUGH:
                await race.step(port, *self._chance.choice(places))
                await asyncio.sleep(self._chance.uniform(0, 0.05))

        try:
            await asyncio.gather(*(client() for _ in range(CLIENTS)))
        finally:
            nemesis.cancel()
            await asyncio.gather(nemesis, return_exceptions=True)
        await self._until_all_run()
        for kind, key in places:
            await self._listed(race, kind, key)
        race.history += expiries(race, [key for kind, key in places if kind == VERSIONED], after_ms=1000 * DAY_S)
        wrong = race.wrong + await asyncio.to_thread(judge, race.history)
        self.wrong += wrong
        for _, key in places:
            if any(line.startswith(f"{key}:") for line in wrong):
                self.histories[key] = [str(one) for one in race.history if one.key == key]
        self.counts += race.counts
        self.operations += len(race.history)
        self.keys += len(places)

    async def _suspend(self, race: Race, keys: list[str]) -> None:
        """These keys have a version from before versioning was suspended."""
        for status in ("Enabled", "Suspended"):
            await asyncio.to_thread(
                self._steady.put_bucket_versioning, Bucket=SUSPENDED, VersioningConfiguration={"Status": status}
            )
            if status == "Enabled":
                for key in keys:
                    await race.put_named(self._port(), SUSPENDED, key)

    async def _until_all_run(self) -> None:
        """A kill under way ends by itself."""
        if self.nemesis.killing is not None:
            await self.nemesis.killing

    async def _listed(self, race: Race, kind: str, key: str) -> None:
        before, end = len(race.history), time.monotonic() + 60 * SLOWNESS
        while len(race.history) == before:
            assert time.monotonic() < end, f"{key} can't be listed"
            await race.list(self._port(), kind, key)

    def document(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "keys": self.keys,
            "operations": self.operations,
            "answers": dict(sorted(self.counts.items())),
            "gateways": dict(self.nemesis.done),
            "wrong": self.wrong,
            "histories": self.histories,
        }
