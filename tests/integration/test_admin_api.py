"""The admin API over its Unix socket: who may ask, what it answers, how it refuses."""

from __future__ import annotations

import asyncio
import base64
import os
import pwd
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from storaged.admin.api import AdminServer
from storaged.admin.listener import owner_or_root
from storaged.admin.place import bind_private
from storaged.admin.ports import Services
from storaged.cli.client import RemoteRefusal, request
from storaged.cluster.move_settings import MoveSettings, changed
from storaged.cluster.unlock import UnlockOrder
from storaged.errors import (
    AuditUnwritable,
    BucketNotEmpty,
    InvalidArgument,
    NoSuchBucket,
    NoSuchKey,
    NotRunning,
    OperatorError,
    PortInUse,
    UnlockRefused,
)
from storaged.objects.api import Principal
from storaged.objects.records import BucketRecord
from storaged.objects.usage import Usage
from storaged.observe import Metrics
from tests.patience import GUARD_S


class Users:
    """``api.Users`` in a dict."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[Principal, str]] = {}

    def try_get(self, access_key: str) -> tuple[Principal, str] | None:
        return self.known.get(access_key)

    async def lookup(self, access_key: str) -> tuple[Principal, str]:
        return self.known[access_key]

    async def add(
        self, name: str, *, access_key: str = "", secret_key: str = "", email: str = "", user_id: str = ""
    ) -> tuple[Principal, str]:
        if any(who.display_name == name for who, _ in self.known.values()):
            raise InvalidArgument(f"the name {name!r} is taken")
        who = Principal(user_id or "0" * 64, name, access_key or "AK" + name)
        self.known[who.access_key] = (who, secret_key or "made")
        return self.known[who.access_key]

    async def list_users(self) -> list[Principal]:
        return [who for who, _ in self.known.values()]

    async def remove(self, name_or_access_key: str) -> Principal:
        found = next(who for who, _ in self.known.values() if who.display_name == name_or_access_key)
        self.known = {key: entry for key, entry in self.known.items() if entry[0].display_name != name_or_access_key}
        return found


class Buckets:
    def __init__(self) -> None:
        self.made: list[tuple[str, str, str]] = []
        self.known: dict[str, BucketRecord] = {}

    async def create(
        self, who: Principal, name: str, *, region: str, countries: tuple[str, ...] = (), **_: Any
    ) -> BucketRecord:
        self.made.append((who.display_name, name, region))
        self.known[name] = BucketRecord(name, bytes(16), who.user_id, 0, "active", 16, region, countries)
        return self.known[name]

    def try_get(self, name: str) -> BucketRecord | None:
        return None

    async def get(self, name: str) -> BucketRecord:
        if name not in self.known:
            raise NoSuchBucket(BucketName=name)
        return self.known[name]

    async def every_bucket(self) -> list[BucketRecord]:
        return list(self.known.values())

    async def set_owner(self, bucket: BucketRecord, owner: str) -> None:
        self.known[bucket.name] = msgspec.structs.replace(bucket, owner=owner)

    async def usage(self, bucket: BucketRecord, after: str) -> Usage:
        return Usage(2, 3, 100, "6b") if not after else Usage(1, 1, 7)

    async def list_buckets(
        self, who: Principal, *, prefix: str = "", after: str = "", limit: int = 1000
    ) -> tuple[list[BucketRecord], str | None]:
        raise NotImplementedError

    async def delete(self, bucket: BucketRecord, *, who: Principal | None = None) -> None:
        if bucket.name == "full":
            raise BucketNotEmpty
        del self.known[bucket.name]

    def configuration_of(self, record: BucketRecord) -> Any:
        raise NotImplementedError

    async def configuration(self, bucket: BucketRecord) -> Any:
        raise NotImplementedError

    async def configure(self, bucket: BucketRecord, kind: Any, change: Any, *, who: Principal | None = None) -> None:
        raise NotImplementedError


class Node:
    """A node's answers, and what a gateway adds."""

    def __init__(self) -> None:
        self.reason = ""
        self.buckets = Buckets()
        self.moves = MoveSettings()
        self.audited: list[tuple[str, str, str, str, dict[str, Any]]] = []
        self.audit_full = False
        self.versions_changed: list[tuple[Any, ...]] = []
        self.copies_set: list[tuple[str, int | None]] = []

    async def status(self) -> dict[str, Any]:
        return {"verdict": "HEALTHY"}

    def ready(self) -> tuple[bool, str]:
        return not self.reason, self.reason

    async def doctor(self) -> list[dict[str, str]]:
        raise ZeroDivisionError("secret detail")

    async def where(self, bucket: str, key: bytes) -> dict[str, Any]:
        if key != b"a/\xc3\xa9 ":
            raise NoSuchKey
        return {"bucket": bucket}

    async def append(
        self, kind: str, /, *, actor: str = "", target: str = "", outcome: str = "", **fields: Any
    ) -> None:
        if self.audit_full:
            raise AuditUnwritable("no space")
        del fields["operation"]
        self.audited.append((kind, actor, target, outcome, fields))

    def note(self, kind: str, /, *, actor: str = "", target: str = "", outcome: str = "", **fields: Any) -> None:
        del fields["operation"]
        self.audited.append((kind, actor, target, outcome, fields))

    def refused(self, kind: str, code: str, /, *, actor: str, target: str = "", **fields: Any) -> None:
        self.audited.append((kind, actor, target, f"refused {code}", fields))

    async def key_backup(self, passphrase: str) -> tuple[str, bytes]:
        return "id", passphrase.encode()

    async def set_moves(self, job: str, *, paused: bool | None, pace: int | None) -> MoveSettings:
        self.moves = changed(self.moves, job, 1, paused=paused, pace=pace)
        return self.moves

    def verify_unlock(self, document: str) -> UnlockOrder:
        if document != "signed":
            raise UnlockRefused
        return UnlockOrder("c1", "demo", "a/b", "v1", "court", 5)

    async def unlock(self, bucket: BucketRecord, key: bytes, version: str) -> None:
        self.versions_changed.append((bucket.name, key, version))

    async def set_bucket_copies(self, bucket: BucketRecord, bytes_max: int | None) -> None:
        self.copies_set.append((bucket.name, bytes_max))

    async def lost_versions(self, _bucket: BucketRecord, key: bytes) -> int:
        return 3 if key == b"a/b" else 0

    async def forget_lost(self, bucket: BucketRecord, key: bytes, count: int) -> None:
        self.versions_changed.append((bucket.name, key, count))

    def services(self, *, gateway: bool) -> Services:
        found = Services(self.status, self.ready, self.doctor, region="eu-fr-1", trail=self)
        if gateway:
            found.users, found.buckets = Users(), self.buckets
            found.verify_unlock, found.unlock = self.verify_unlock, self.unlock
            found.lost_versions, found.forget_lost = self.lost_versions, self.forget_lost
            found.racks = lambda countries: [f"rack of {country}" for country in countries]
            found.every_bucket, found.set_owner, found.usage = (
                self.buckets.every_bucket,
                self.buckets.set_owner,
                self.buckets.usage,
            )
            found.where, found.key_backup = self.where, self.key_backup
            found.set_moves = self.set_moves
            found.set_bucket_copies = self.set_bucket_copies
        return found


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    found = Node()
    server = AdminServer(found.services(gateway=True), Metrics())
    await server.start(tmp_path, "")
    yield found
    await server.close()


async def ask(place: Path, method: str, path: str, **options: Any) -> Any:
    return await asyncio.to_thread(lambda: request(place, method, path, **options))


async def test_only_the_owner_may_ask(node: Node, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "admin.sock").stat().st_mode) == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused_whatever_the_modes_are(node: Node, tmp_path: Path) -> None:
    """By the kernel's word on who connects: before a byte is read, and with an entry."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    (tmp_path / "admin.sock").chmod(0o666)
    program = """
import os, socket, sys
os.setuid(12345)
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
try:
    s.sendall(b"GET /v1/users HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
    print(s.recv(1000))
except (BrokenPipeError, ConnectionResetError):
    print(b"")
"""
    for _ in range(2):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, str(tmp_path / "admin.sock"), stdout=-1
        )
        answer, _ = await asyncio.wait_for(child.communicate(), GUARD_S)
        assert answer == b"b''\n"
    assert node.audited == 2 * [("admin.refused", "unix:12345:", "admin.sock", "refused NOT_ALLOWED", {})]
    assert (await ask(tmp_path, "GET", "/v1/users"))["users"] == []


@pytest.mark.parametrize(("uid", "may"), [(0, True), (os.geteuid(), True), (12345, False), (65534, False), (-1, False)])
def test_root_and_the_nodes_own_user_may_ask(uid: int, may: bool) -> None:
    assert owner_or_root(uid) == may


@pytest.mark.parametrize("passphrase", ["", "x", "eleven char", "a\u0308" * 11])
async def test_a_backup_under_a_short_passphrase_is_refused(node: Node, tmp_path: Path, passphrase: str) -> None:
    with pytest.raises(RemoteRefusal, match="12 characters") as caught:
        await ask(tmp_path, "POST", "/v1/keys/backup", body={"passphrase": passphrase})
    assert caught.value.code == "PASSPHRASE_TOO_SHORT"
    assert not node.audited


def test_a_socket_is_its_owners_alone_from_the_moment_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the most generous umask, and without the chmod that comes after: in between somebody else could have
    connected.
    """
    monkeypatch.setattr(Path, "chmod", lambda _path, _mode: None)
    before = os.umask(0)
    try:
        bind_private(tmp_path / "s").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


async def test_what_is_administered_is_in_the_audit_log_before_it_is_done(node: Node, tmp_path: Path) -> None:
    """Above all that the keyring was handed out. No secret is in an entry, and without an entry nothing is done."""
    asked: list[tuple[str, str, dict[str, str] | None]] = [
        ("POST", "/v1/users", {"name": "alice", "access_key": "AK1", "secret_key": "given"}),
        ("POST", "/v1/buckets", {"name": "bbb", "user": "AK1"}),
        ("POST", "/v1/keys/backup", {"passphrase": "correct horse battery"}),
        ("DELETE", "/v1/users/alice", None),
    ]
    for method, path, body in asked:
        await ask(tmp_path, method, path, body=body)
    me = f"unix:{os.getuid()}:{pwd.getpwuid(os.getuid()).pw_name}"
    assert {actor for _, actor, *_ in node.audited} == {me}
    key = {"access_key": "AK1", "user_id": "0" * 64}
    assert [(kind, target, outcome, fields) for kind, _, target, outcome, fields in node.audited] == [
        ("user.add", "user:alice", "intent", {"access_key": "AK1"}),
        ("user.add", "user:alice", "done", key),
        ("bucket.create", "bucket:bbb", "intent", {"owner": "AK1", "countries": ""}),
        ("bucket.create", "bucket:bbb", "done", {"bucket": "00" * 16}),
        ("key.backup", "keyring", "intent", {}),
        ("key.backup", "keyring", "done", {"keyring": "id"}),
        ("user.remove", "user:alice", "intent", {}),
        ("user.remove", "user:alice", "done", {"name": "alice", **key}),
    ]
    await ask(tmp_path, "POST", "/v1/users", body={"name": "alice", "access_key": "AK1"})
    node.audit_full = True
    made = len(node.buckets.made)
    for method, path, body in asked:
        with pytest.raises(RemoteRefusal) as refused:
            await ask(tmp_path, method, path, body=body)
        assert refused.value.code == "AUDIT_UNWRITABLE"
    assert len(node.buckets.made) == made
    assert len((await ask(tmp_path, "GET", "/v1/users"))["users"]) == 1


async def test_how_small_objects_are_kept_is_changed_by_a_number_or_by_an_empty_text_alone(
    node: Node, tmp_path: Path
) -> None:
    await ask(tmp_path, "POST", "/v1/users", body={"name": "alice", "access_key": "AK1", "secret_key": "given"})
    await ask(tmp_path, "POST", "/v1/buckets", body={"name": "demo", "user": "AK1"})
    node.audited.clear()
    path, most = "/v1/buckets/demo/copies", 256 * 1024
    wrong = ({}, {"size": "1"}, {"bytes": "-1"}, {"bytes": " "}, {"bytes": "9" * 19}, {"bytes": str(most + 1)})
    for body in wrong:
        with pytest.raises(RemoteRefusal):
            await ask(tmp_path, "POST", path, body=body)
    assert (node.copies_set, node.audited) == ([], [])
    assert (await ask(tmp_path, "POST", path, body={"bytes": "0"}))["bytes"] == 0
    assert (await ask(tmp_path, "POST", path, body={"bytes": ""}))["bytes"] is None
    assert (await ask(tmp_path, "POST", path, body={"bytes": str(most)}))["bytes"] == most
    assert node.copies_set == [("demo", 0), ("demo", None), ("demo", most)]
    assert [(kind, target, outcome) for kind, _, target, outcome, _ in node.audited] == [
        ("copies.set", "bucket:demo", outcome) for outcome in 3 * ("intent", "done")
    ]


async def test_a_bucket_is_for_whose_access_key_is_given_not_for_who_took_that_for_a_name(
    node: Node, tmp_path: Path
) -> None:
    await ask(tmp_path, "POST", "/v1/users", body={"name": "AK1", "access_key": "AK0", "secret_key": "given"})
    await ask(tmp_path, "POST", "/v1/users", body={"name": "alice", "access_key": "AK1", "secret_key": "given"})
    assert (await ask(tmp_path, "POST", "/v1/buckets", body={"name": "demo", "user": "AK1"}))["owner"] == "alice"


async def test_users_are_added_listed_and_removed_and_secrets_are_shown_once(node: Node, tmp_path: Path) -> None:
    made = await ask(tmp_path, "POST", "/v1/users", body={"name": "alice", "access_key": "AK1", "secret_key": "given"})
    names = {"user_id": "0" * 64, "account": "778162544561", "arn": "arn:aws:iam::778162544561:user/alice"}
    assert made == names | {"access_key": "AK1", "secret_key": "given"}
    listed = (await ask(tmp_path, "GET", "/v1/users"))["users"]
    assert listed == [names | {"name": "alice", "access_key": "AK1", "email": ""}]
    await ask(tmp_path, "POST", "/v1/buckets", body={"name": "demo", "user": "AK1"})
    assert node.buckets.made == [("alice", "demo", "eu-fr-1")]
    narrow = await ask(tmp_path, "POST", "/v1/buckets", body={"name": "narrow", "user": "alice", "countries": "FR,DE"})
    assert narrow == {
        "bucket": "narrow",
        "owner": "alice",
        "countries": ["DE", "FR"],
        "racks": ["rack of DE", "rack of FR"],
    }
    for body, code in (
        ({"name": "Bad_Name", "user": "alice"}, "InvalidBucketName"),
        ({"name": "good", "user": "bob"}, "InvalidArgument"),
    ):
        with pytest.raises(RemoteRefusal) as refused:
            await ask(tmp_path, "POST", "/v1/buckets", body=body)
        assert refused.value.code == code
    with pytest.raises(RemoteRefusal, match="taken") as caught:
        await ask(tmp_path, "POST", "/v1/users", body={"name": "alice"})
    assert caught.value.code == "InvalidArgument"
    assert await ask(tmp_path, "DELETE", "/v1/users/alice") == {
        "removed": "alice",
        "user_id": "0" * 64,
        "access_key": "AK1",
    }
    assert (await ask(tmp_path, "GET", "/v1/users"))["users"] == []
    heir = await ask(tmp_path, "POST", "/v1/users", body={"name": "alice", "user_id": "1" * 64})
    assert heir["user_id"] == "1" * 64


async def test_an_operator_lists_counts_hands_over_and_deletes_buckets_of_any_user(node: Node, tmp_path: Path) -> None:
    for name, user_id in (("alice", "1" * 64), ("bob", "2" * 64)):
        await ask(tmp_path, "POST", "/v1/users", body={"name": name, "access_key": f"AK{name}", "user_id": user_id})
    await ask(tmp_path, "POST", "/v1/buckets", body={"name": "one", "user": "alice"})
    await ask(tmp_path, "POST", "/v1/buckets", body={"name": "full", "user": "bob", "countries": "FR"})
    listed = (await ask(tmp_path, "GET", "/v1/buckets"))["buckets"]
    assert [(one["bucket"], one["owners"], one["countries"]) for one in listed] == [
        ("full", ["bob"], ["FR"]),
        ("one", ["alice"], []),
    ]
    first = await ask(tmp_path, "GET", "/v1/buckets/one/usage")
    assert first == {"objects": 2, "versions": 3, "bytes": 100, "next_after": b"k".hex()}
    assert (await ask(tmp_path, "GET", "/v1/buckets/one/usage", query={"after": first["next_after"]}))[
        "next_after"
    ] is None
    await ask(tmp_path, "POST", "/v1/buckets/one/owner", body={"user": "bob"})
    assert node.buckets.known["one"].owner == "2" * 64
    assert "bucket.owner" in [entry[0] for entry in node.audited]
    await ask(tmp_path, "DELETE", "/v1/buckets/one")
    assert list(node.buckets.known) == ["full"]
    for method, path, body, code in (
        ("DELETE", "/v1/buckets/full", None, "BucketNotEmpty"),
        ("DELETE", "/v1/buckets/none", None, "NoSuchBucket"),
        ("GET", "/v1/buckets/none/usage", None, "NoSuchBucket"),
        ("POST", "/v1/buckets/full/owner", {"user": "carol"}, "InvalidArgument"),
    ):
        with pytest.raises(RemoteRefusal) as refused:
            await ask(tmp_path, method, path, body=body)
        assert refused.value.code == code


async def test_moves_are_paused_and_paced_and_that_is_audited(node: Node, tmp_path: Path) -> None:
    found = await ask(tmp_path, "POST", "/v1/moves", body={"job": "partitions", "paused": "true"})
    assert found["settings"]["partitions"] == {"paused": True, "per_min": 0}
    found = await ask(tmp_path, "POST", "/v1/moves", body={"job": "fragments", "pace": "1000"})
    assert found["settings"]["fragments"] == {"paused": False, "bytes_per_s": 1000}
    assert [(kind, target, outcome, fields) for kind, _, target, outcome, fields in node.audited] == [
        ("moves.set", "job:partitions", "intent", {"paused": "true"}),
        ("moves.set", "job:partitions", "done", {"revision": "1"}),
        ("moves.set", "job:fragments", "intent", {"pace": "1000"}),
        ("moves.set", "job:fragments", "done", {"revision": "2"}),
    ]
    for body in ({"job": "repair", "paused": "true"}, {"job": "partitions"}, {"job": "partitions", "paused": "yes"}):
        with pytest.raises(RemoteRefusal) as refused:
            await ask(tmp_path, "POST", "/v1/moves", body=body)
        assert refused.value.code == "InvalidArgument"
    assert node.moves.revision == 2


async def test_a_key_goes_over_in_hex_and_what_is_missing_is_refused_with_its_code(node: Node, tmp_path: Path) -> None:
    found = await ask(tmp_path, "GET", "/v1/where", query={"bucket": "b", "key": b"a/\xc3\xa9 ".hex()})
    assert found == {"bucket": "b"}
    with pytest.raises(RemoteRefusal) as caught:
        await ask(tmp_path, "GET", "/v1/where", query={"bucket": "b", "key": "00"})
    assert caught.value.code == "NoSuchKey"
    with pytest.raises(RemoteRefusal, match="hex"):
        await ask(tmp_path, "GET", "/v1/where", query={"bucket": "b", "key": "xyz"})


@pytest.mark.parametrize("body", [["name"], {"name": 1}, {"nam": "x"}])
async def test_a_body_that_makes_no_sense_is_refused(node: Node, tmp_path: Path, body: Any) -> None:
    with pytest.raises(RemoteRefusal) as caught:
        await ask(tmp_path, "POST", "/v1/users", body=body)
    assert caught.value.code == "InvalidArgument"


async def test_the_backup_comes_over_the_socket_whole(node: Node, tmp_path: Path) -> None:
    found = await ask(tmp_path, "POST", "/v1/keys/backup", body={"passphrase": "a dozen chars"})
    assert (found["keyring"], base64.b64decode(found["backup"])) == ("id", b"a dozen chars")


async def test_a_defect_is_told_without_its_inside(node: Node, tmp_path: Path) -> None:
    with pytest.raises(RemoteRefusal) as caught:
        await ask(tmp_path, "GET", "/v1/doctor")
    assert caught.value.code == "InternalError"
    assert "secret detail" not in caught.value.message


async def test_an_unknown_path_is_refused(node: Node, tmp_path: Path) -> None:
    with pytest.raises(RemoteRefusal):
        await ask(tmp_path, "GET", "/v1/nothing")


async def test_readiness_says_why_not(node: Node, tmp_path: Path) -> None:
    assert await ask(tmp_path, "GET", "/readyz") == {"ready": True, "reason": ""}
    node.reason = "no majority"
    assert await ask(tmp_path, "GET", "/readyz") == {"ready": False, "reason": "no majority"}


async def test_a_storage_node_refuses_what_is_a_gateways_work(tmp_path: Path) -> None:
    server = AdminServer(Node().services(gateway=False), Metrics())
    await server.start(tmp_path, "")
    try:
        for method, path in (
            ("GET", "/v1/users"),
            ("GET", "/v1/where"),
            ("POST", "/v1/keys/backup"),
            ("POST", "/v1/scrub"),
        ):
            with pytest.raises(RemoteRefusal, match=r".+") as caught:
                await ask(tmp_path, method, path, body={} if method == "POST" else None)
            assert caught.value.code == "NOT_HERE"
    finally:
        await server.close()


async def test_the_loopback_port_has_health_and_metrics_and_nothing_else(tmp_path: Path) -> None:
    import socket

    import aiohttp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = AdminServer(Node().services(gateway=True), Metrics())
    await server.start(tmp_path, f"127.0.0.1:{port}")
    second = AdminServer(Node().services(gateway=True), Metrics())
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            for path, status in (
                ("/healthz", 200),
                ("/readyz", 200),
                ("/metrics", 200),
                ("/v1/status", 404),
                ("/v1/users", 404),
            ):
                async with client.get(path) as answer:
                    assert answer.status == status, path
        (tmp_path / "other").mkdir()
        with pytest.raises(PortInUse):
            await second.start(tmp_path / "other", f"127.0.0.1:{port}")
    finally:
        await second.close()
        await server.close()


async def test_a_node_that_does_not_run_is_said_to(tmp_path: Path) -> None:
    with pytest.raises(NotRunning):
        await ask(tmp_path, "GET", "/healthz")
    (tmp_path / "admin.sock").touch()
    with pytest.raises((NotRunning, OperatorError)):
        await ask(tmp_path, "GET", "/healthz")


async def test_versions_are_unlocked_by_order_and_let_go_of_by_count(tmp_path: Path, node: Node) -> None:
    await ask(tmp_path, "POST", "/v1/users", body={"name": "alice", "access_key": "AK1", "secret_key": "given"})
    for name in ("demo", "other"):
        await ask(tmp_path, "POST", "/v1/buckets", body={"name": name, "user": "AK1"})
    node.audited.clear()
    assert (await ask(tmp_path, "POST", "/v1/buckets/demo/unlock", body={"order": "signed"}))["version"] == "v1"
    assert [(kind, target, outcome) for kind, _, target, outcome, _ in node.audited] == [
        ("object.unlock", "object:demo/a/b", "intent"),
        ("object.unlock", "object:demo/a/b", "done"),
    ]
    assert node.audited[0][4]["reason"] == "court"
    for name, document in (("demo", "other"), ("other", "signed")):
        with pytest.raises(RemoteRefusal):
            await ask(tmp_path, "POST", f"/v1/buckets/{name}/unlock", body={"order": document})
    key = b"a/b".hex()
    assert (await ask(tmp_path, "GET", "/v1/buckets/demo/lost", query={"key": key}))["versions"] == 3
    await ask(tmp_path, "POST", "/v1/buckets/demo/lost", body={"key": key, "count": "3"})
    for body in ({"key": "x", "count": "3"}, {"key": key, "count": "-1"}, {"key": key}):
        with pytest.raises(RemoteRefusal):
            await ask(tmp_path, "POST", "/v1/buckets/demo/lost", body=body)
    assert node.versions_changed == [("demo", b"a/b", "v1"), ("demo", b"a/b", 3)]
