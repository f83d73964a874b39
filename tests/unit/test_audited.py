"""Buckets made and deleted over S3, and requests refused there, are in the audit log: who, what, how it ended, and
never so often that they fill the disk.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storaged.cluster.audit.format import Entry, parse_line
from storaged.cluster.audit.log import AuditLog
from storaged.config import LogSection
from storaged.errors import (
    BucketAlreadyOwnedByYou,
    BucketNotEmpty,
    InvalidArgument,
    KeyringUnavailable,
    NoSuchBucket,
    ServiceUnavailable,
)
from storaged.node.audited import AuditedBuckets
from storaged.node.gateway import Gateway
from storaged.node.requestlog import RequestLog
from storaged.objects.api import Principal
from storaged.objects.configuration.document import Kind
from storaged.objects.configuration.kinds import TAGGING, Tags
from storaged.objects.records import BucketRecord
from storaged.observe import Metrics
from tests.unit.test_audit import Clock

ALICE = Principal("1" * 64, "alice", "AKALICE")


class Buckets:
    """As much of ``api.Buckets`` as is audited."""

    def __init__(self) -> None:
        self.known: dict[str, BucketRecord] = {}
        self.full = False

    def __getattr__(self, name: str) -> Any:
        """What is not audited is passed through, whatever it is."""
        return lambda *_: None

    async def get(self, name: str) -> BucketRecord:
        if name not in self.known:
            raise NoSuchBucket(BucketName=name)
        return self.known[name]

    async def create(
        self, who: Principal, name: str, *, region: str, countries: tuple[str, ...] = (), **_: Any
    ) -> BucketRecord:
        if name in self.known:
            raise BucketAlreadyOwnedByYou
        self.known[name] = BucketRecord(name, b"\x07" * 16, who.user_id, 0, "active", 16, region, countries)
        return self.known[name]

    async def configure(
        self, bucket: BucketRecord, kind: Kind[Any], change: Any, *, who: Principal | None = None
    ) -> None:
        if self.full:
            raise InvalidArgument

    async def delete(self, bucket: BucketRecord, *, who: Principal | None = None) -> None:
        if self.full:
            raise BucketNotEmpty
        del self.known[bucket.name]


class Rig:
    def __init__(self, directory: Path) -> None:
        self.clock = Clock()
        self.directory = directory
        self.log = AuditLog(directory, "gw", b"\x01" * 8, clock=self.clock)
        self.behind = Buckets()
        self.buckets = AuditedBuckets(self.behind, self.log, self.clock)  # type: ignore[arg-type]

    async def entries(self) -> list[Entry]:
        await self.log.close()
        return [
            parse_line(line) for path in sorted(self.directory.iterdir()) for line in path.read_bytes().splitlines()
        ][1:]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    found = Rig(tmp_path)
    await found.log.start()
    yield found
    await found.log.close()


async def test_a_bucket_made_and_deleted_over_s3_is_in_the_log_with_who_did_it_and_how_it_ended(rig: Rig) -> None:
    made = await rig.buckets.create(ALICE, "photos", region="eu", countries=("DE", "FR"))
    await rig.buckets.delete(made, who=ALICE)
    entries = await rig.entries()
    assert {(entry.actor, entry.target) for entry in entries} == {("s3:AKALICE", "bucket:photos")}
    assert [(entry.kind, entry.outcome) for entry in entries] == [
        ("bucket.create", "intent"),
        ("bucket.create", "done"),
        ("bucket.delete", "intent"),
        ("bucket.delete", "done"),
    ]
    assert [entry.fields.get("bucket") for entry in entries] == [None, "07" * 16, "07" * 16, None]
    assert entries[0].fields["countries"] == "DE,FR"


async def test_what_a_user_is_refused_again_and_again_is_counted_and_what_succeeds_then_is_not_hidden(rig: Rig) -> None:
    made = await rig.buckets.create(ALICE, "photos", region="eu")
    rig.behind.full = True
    for _ in range(500):
        with pytest.raises(BucketNotEmpty):
            await rig.buckets.delete(made, who=ALICE)
        with pytest.raises(BucketAlreadyOwnedByYou):
            await rig.buckets.create(ALICE, "photos", region="eu")
    rig.behind.full = False
    await rig.buckets.delete(made, who=ALICE)
    entries = (await rig.entries())[2:]
    assert [(entry.kind, entry.outcome, entry.fields.get("repeated")) for entry in entries] == [
        ("bucket.delete", "intent", None),
        ("bucket.delete", "refused BucketNotEmpty", None),
        ("bucket.create", "refused BucketAlreadyOwnedByYou", None),
        ("bucket.delete", "refused BucketNotEmpty", None),
        ("bucket.delete", "done", None),
        ("bucket.create", "refused BucketAlreadyOwnedByYou", 499),
        ("bucket.delete", "refused BucketNotEmpty", 498),
    ]


async def test_a_minute_after_a_refusal_the_intent_is_written_again(rig: Rig) -> None:
    made = await rig.buckets.create(ALICE, "photos", region="eu")
    rig.behind.full = True
    for _ in range(2):
        with pytest.raises(BucketNotEmpty):
            await rig.buckets.delete(made, who=ALICE)
        rig.clock.now_ms += 61_000
    assert [entry.outcome for entry in await rig.entries()][2:] == ["intent", "refused BucketNotEmpty"] * 2


async def test_without_an_audit_log_a_bucket_is_neither_made_nor_deleted_and_a_client_hears_503(rig: Rig) -> None:
    made = await rig.buckets.create(ALICE, "photos", region="eu")
    await rig.log.close()
    for attempt in (rig.buckets.create(ALICE, "more", region="eu"), rig.buckets.delete(made, who=ALICE)):
        with pytest.raises(ServiceUnavailable, match="AUDIT_UNWRITABLE") as refused:
            await attempt
        assert str(rig.directory) not in refused.value.message
    assert list(rig.behind.known) == ["photos"]


@pytest.mark.parametrize(
    ("status", "code", "user", "actor"),
    [
        (403, "SignatureDoesNotMatch", "", "address:10.0.0.7"),
        (403, "AccessDenied", "AKBOB", "s3:AKBOB"),
        (404, "NoSuchKey", "AKBOB", None),
        (200, "", "AKBOB", None),
    ],
)
async def test_who_is_refused_access_over_s3_is_counted_without_signatures(
    rig: Rig, status: int, code: str, user: str, actor: str | None
) -> None:
    done = SimpleNamespace(
        status=status,
        code=code,
        access_key=user,
        remote="10.0.0.7",
        operation="GetObject",
        method="GET",
        target="/photos/cat.jpg?X-Amz-Signature=-&x=1",
        request_id="r",
        duration_s=0.1,
        bytes_in=0,
        bytes_out=0,
        complete=True,
        bucket="photos",
        trace=None,
        reply=SimpleNamespace(status=status),
        request=SimpleNamespace(operation="GetObject"),
    )
    observe = RequestLog(Metrics(), LogSection(), rig.log)
    for _ in range(100):
        observe(done)  # type: ignore[arg-type]
    entries = await rig.entries()
    assert len(entries) == (2 if actor else 0)
    for entry in entries:
        assert (entry.kind, entry.actor, entry.target, entry.outcome) == (
            "s3.refused",
            actor,
            "/photos/cat.jpg",
            f"refused {code}",
        )


async def test_a_key_whose_release_cannot_be_audited_is_answered_with_503_and_refusals_wait_for_nothing(
    rig: Rig,
) -> None:
    gateway: Any = SimpleNamespace(_node=SimpleNamespace(audit=rig.log, own=SimpleNamespace(name="gw")))
    facts = {"target": "bucket-id:00", "keyring": "05"}
    await Gateway._audit(gateway, "key.release", {**facts, "outcome": "done"})
    for _ in range(50):
        await Gateway._audit(
            gateway, "key.refused", {**facts, "outcome": "refused KEY_RELEASE_REFUSED", "rule": "bucket countries"}
        )
    await rig.log.close()
    with pytest.raises(KeyringUnavailable, match="AUDIT_UNWRITABLE"):
        await Gateway._audit(gateway, "key.release", {**facts, "outcome": "done"})
    await Gateway._audit(gateway, "key.refused", {**facts, "outcome": "refused KEY_RELEASE_REFUSED"})
    assert [
        (entry.kind, entry.actor, entry.target, entry.outcome, entry.fields.get("repeated"))
        for entry in await rig.entries()
    ] == [
        ("key.release", "node:gw", "bucket-id:00", "done", None),
        ("key.refused", "node:gw", "bucket-id:00", "refused KEY_RELEASE_REFUSED", None),
        ("key.refused", "node:gw", "bucket-id:00", "refused KEY_RELEASE_REFUSED", 49),
    ]


async def test_a_change_of_configuration_is_in_the_log_with_its_kind_and_a_change_of_tags_is_not(rig: Rig) -> None:
    bucket = await rig.buckets.create(ALICE, "b", region="eu")
    await rig.buckets.configure(bucket, TAGGING, lambda _: None, who=ALICE)
    await rig.buckets.configure(bucket, Kind("policy", Tags), lambda _: None, who=ALICE)
    rig.behind.full = True
    with pytest.raises(InvalidArgument):
        await rig.buckets.configure(bucket, Kind("policy", Tags), lambda _: None, who=ALICE)
    told = [entry for entry in await rig.entries() if entry.kind == "bucket.configure"]
    assert [entry.outcome for entry in told] == ["intent", "done", "intent", "refused InvalidArgument"]
    assert told[0].fields["configuration"] == "policy"
