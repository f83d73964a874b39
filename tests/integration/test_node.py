"""What a node keeps about its disks and its cluster, and the gateway's keyring: bound once, never made anew."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from storaged import config, keys
from storaged.cli import create
from storaged.clock import SystemClock
from storaged.cluster.identity import load_identity
from storaged.cluster.issuing import Authority, create_authority
from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.layouts import LayoutBook
from storaged.cluster.policy import KeyHolder, Policy
from storaged.cluster.signed_layout import SignedLayout, sign_layout
from storaged.errors import DirectoryInUse, KeyringUnavailable, LayoutRefused, ServiceUnavailable
from storaged.meta.acceptor.high_water import META_HIGH_WATER
from storaged.meta.names import Ballot, RegisterName, Value
from storaged.meta.ports import Outcome, Reading
from storaged.meta.store_ports import StoreBatch
from storaged.node import process
from storaged.node.binding import Binding, ClusterRecord
from storaged.node.disks import Disks
from storaged.node.doctor import Doctor, _private
from storaged.node.keyhome import RingRegisters
from storaged.node.ledger import Ledger
from storaged.node.node import Node
from storaged.node.opener import Opener
from storaged.node.system import SystemPaths, Taken, exchange_layout
from storaged.node.unlock import LateKeys, Unlocker
from storaged.wire import decode, encode
from tests.patience import GUARD_S
from tests.unit.test_keyring import Copies
from tests.unit.test_meta_store import raw


class Registers:
    """Compare-and-set in a dict; ``away`` is how many calls still fail for want of a majority."""

    def __init__(self, away: int = 0) -> None:
        self.values: dict[bytes, Value] = {}
        self.away = away

    def _reach(self) -> None:
        if self.away:
            self.away -= 1
            raise ServiceUnavailable("no majority")

    async def read(self, name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b"") -> Reading:
        self._reach()
        return Reading(self.values.get(name.key))

    async def change(self, name: RegisterName, update: Any, **_more: Any) -> Outcome:
        self._reach()
        before = self.values.get(name.key)
        change = update(before)
        if change is not None:
            self.values[name.key] = Value(before.sequence + 1 if before else 1, b"", change.visibility, change.body)
        return Outcome(before, self.values.get(name.key))


async def no_audit(_kind: str, _fields: Mapping[str, str]) -> None:
    return None


def test_doctor_names_secret_files_that_others_may_read(tmp_path: Path) -> None:
    for name, mode in (("node.key", 0o600), ("credential", 0o440), ("keyring", 0o644)):
        (tmp_path / name).touch(mode)
        (tmp_path / name).chmod(mode)
    found = [_private([tmp_path / name, tmp_path / "missing"]) for name in ("node.key", "credential", "keyring")]
    assert [check["state"] for check in found] == ["ok", "ok", "fail"]
    assert "keyring has mode 0644" in found[2]["detail"]


async def test_doctor_says_that_the_directory_of_the_node_is_full(tmp_path: Path) -> None:
    (tmp_path / "doctor.new").symlink_to("/dev/full")
    node: Any = SimpleNamespace(directory=tmp_path)
    found = await Doctor(node, None)._fsync()
    assert (found["state"], found["detail"]) == (
        "fail",
        "the node's directory can't be written: No space left on device",
    )
    assert str(tmp_path) in found["hint"]


async def test_a_path_is_created_once(tmp_path: Path) -> None:
    paths = SystemPaths(Registers())  # type: ignore[arg-type]  # only read and change are asked for
    assert await paths.read("x") is None
    await paths.create("x", b"first")
    with pytest.raises(Taken):
        await paths.create("x", b"second")
    assert await paths.read("x") == b"first"
    await paths.write("x", b"third")
    assert await paths.read("x") == b"third"


async def test_the_register_of_the_layout_follows_the_newest_and_a_forged_one_is_refused(tmp_path: Path) -> None:
    authority = create_authority(tmp_path / "authority", "c1")
    administration = authority.administration.public_key()
    first, second = (sign_layout(Layout("c1", epoch, (), (), ()), authority.administration) for epoch in (1, 2))
    registers = Registers()
    paths = SystemPaths(registers)  # type: ignore[arg-type]
    behind, ahead = (
        LayoutBook(administration, "c1", known=[first]),
        LayoutBook(administration, "c1", known=[first, second]),
    )
    for book, epoch in ((behind, 1), (ahead, 2), (behind, 2)):
        await exchange_layout(paths, book)
        assert decode(registers.values[b"layout"].body, SignedLayout) == (first, second)[epoch - 1]
    assert behind.epoch == 2
    await paths.write("layout", encode(SignedLayout(encode(Layout("c1", 9, (), (), ())), bytes(64))))
    with pytest.raises(LayoutRefused):
        await exchange_layout(paths, ahead)
    await paths.write("layout", b"noise")
    with pytest.raises(LayoutRefused):
        await exchange_layout(paths, ahead)
    assert ahead.epoch == 2


async def test_a_layout_in_the_register_that_would_move_data_is_refused_and_named(tmp_path: Path) -> None:
    authority = create_authority(tmp_path / "authority", "c1")
    nodes = tuple(NodeEntry(f"n{number}", f"FR/par1/{number}", "h:1", ("storage",)) for number in (1, 2, 3))
    disks = tuple(DiskEntry(f"d{number}", f"n{number}", 1) for number in (1, 2, 3))
    used = sign_layout(Layout("c1", 1, nodes, disks, ("d1", "d2", "d3")), authority.administration)
    moving = sign_layout(Layout("c1", 2, nodes, disks, ("d3", "d2", "d1")), authority.administration)
    layouts = LayoutBook(authority.administration.public_key(), "c1", known=[used])
    paths = SystemPaths(Registers())  # type: ignore[arg-type]
    await paths.write("layout", encode(moving))
    with pytest.raises(LayoutRefused, match="the seed disks change"):
        await exchange_layout(paths, layouts)
    assert layouts.epoch == 1
    assert [(refused.epoch, refused.source) for refused in layouts.refusals()] == [(2, "the register layout")]
    assert await paths.read("layout") == encode(moving), "nothing older goes over it"


def three_nodes(tmp_path: Path) -> tuple[create.ClusterPlan, Authority, Path, config.Config]:
    """The plan of a cluster, its authority, and the folder and configuration of its first node."""
    plan = create.ClusterPlan("c1")
    for number, rack in ((1, "FR/par1/a"), (2, "FR/par2/b"), (3, "FR/lyo1/c")):
        disks = create.new_disks([f"d{disk}" for disk in (1, 2)])
        plan.nodes.append(create.NodePlan(f"n{number}", rack, ("storage",), f"127.0.0.1:{number}", disks=disks))
    authority = create_authority(tmp_path / "authority", "c1")
    place = tmp_path / "n1"
    create.issue_node(authority, plan.nodes[0], place, create.storage_config(plan.nodes[0], ".", "127.0.0.1:1"))
    return plan, authority, place, config.load(place / "config.toml")


async def test_a_node_starts_on_the_layout_that_it_used_when_the_file_beside_it_would_move_data(tmp_path: Path) -> None:
    plan, authority, place, loaded = three_nodes(tmp_path)
    create.sign_layout(authority, create.layout_of(plan), [place])

    async def started() -> Node:
        node = Node(loaded, load_identity(place / "identity"), SystemClock())
        await node._open_layouts()
        return node

    used = (await started()).layouts.current
    plan.epoch, plan.nodes[1].disks[0].weight = 1, 4000
    create.sign_layout(authority, create.layout_of(plan), [place])
    for _ in range(2):
        again = await started()
        assert again.layouts.current == used
        (refused,) = again.layouts.refusals()
        assert refused.epoch == 2
        assert refused.source == str(place / "identity" / "layout.signed")
        assert "weight 1000 to 4000" in refused.reason
    plan.epoch = 0
    create.sign_layout(authority, create.layout_of(plan), [place])
    again = await started()
    assert again.layouts.current == used
    assert "Another layout is known under epoch 1" in again.layouts.refusals()[0].reason
    (place / "identity" / "layout.signed").write_bytes(encode(SignedLayout(b"forged", bytes(64))))
    assert (await started()).layouts.current == used


async def test_a_node_whose_layouts_are_gone_does_not_start_by_one_that_would_move_data(tmp_path: Path) -> None:
    plan, authority, place, loaded = three_nodes(tmp_path)

    async def start() -> None:
        node = Node(loaded, load_identity(place / "identity"), SystemClock())
        await node._open_layouts()
        async with contextlib.AsyncExitStack() as stack:
            await node._build_disks(stack)

    create.sign_layout(authority, create.layout_of(plan), [place])
    await start()
    shutil.rmtree(place / "layouts")
    await start()  # the same, from the file beside the certificate
    shutil.rmtree(place / "layouts")
    plan.nodes[1].disks[0].weight = 4000
    create.sign_layout(authority, create.layout_of(plan), [place])
    with pytest.raises(LayoutRefused, match="lie elsewhere than by the one that this node has used"):
        await start()


def storage_config(place: Path) -> config.Config:
    node = create.NodePlan("n1", "FR/par1/a", ("storage",), "127.0.0.1:7400", disks=create.new_disks(["d1", "d2"]))
    (place / "config.toml").write_text(
        create.storage_config(node, ".", node.address, "[limits]\nmeta_map_bytes = '16 MiB'\nreserve_bytes = 1\n")
    )
    return config.load(place / "config.toml")


async def opened_disks(loaded: config.Config) -> Disks:
    return await Opener(loaded, SystemClock(), lambda *_: None, Ledger(Path(loaded.node.directory))).open()


async def test_a_disk_that_lost_its_store_is_left_out_and_the_other_goes_on(tmp_path: Path) -> None:
    import shutil

    loaded = storage_config(tmp_path)
    first = await opened_disks(loaded)
    assert [status.state for status in await first.statuses()] == ["ok", "ok"]
    with pytest.raises(DirectoryInUse):
        await opened_disks(loaded)
    await first.close()
    shutil.rmtree(tmp_path / "d1")
    second = await opened_disks(loaded)
    states = {status.directory: status.state for status in await second.statuses()}
    assert states == {str(tmp_path / "d1"): "blank", str(tmp_path / "d2"): "ok"}
    assert not (tmp_path / "d1" / "meta").exists(), "nothing is made where something is missing"
    await second.close()


async def test_a_disk_whose_record_of_its_promises_rots_is_damaged_and_the_other_goes_on(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    first = await opened_disks(loaded)
    for disk in first.used.values():
        await disk.meta.commit(StoreBatch(meta={META_HIGH_WATER: encode(Ballot(1, 1, "", b""))}))
    await first.close()
    with raw(tmp_path / "d1" / "meta", b"meta") as transaction:
        row = transaction.get(META_HIGH_WATER.encode())
        transaction.put(META_HIGH_WATER.encode(), row[:-1] + bytes([row[-1] ^ 1]))
    for _ in range(2):
        again = await opened_disks(loaded)
        states = {status.directory: status.state for status in await again.statuses()}
        assert states == {str(tmp_path / "d1"): "damaged", str(tmp_path / "d2"): "ok"}
        await again.close()


def gateway_config(place: Path) -> config.Config:
    place.mkdir(exist_ok=True)
    node = create.NodePlan("gateway", "FR/par1/a", ("gateway",))
    (place / "config.toml").write_text(
        create.gateway_config(
            node, ".", "127.0.0.1:8333", "eu-fr-1", {"keyring": "keyring", "credential": "credential"}
        )
    )
    return config.load(place / "config.toml")


def make_keyring(place: Path) -> bytes:
    return keys.create_keyring(place / "keyring", keys.Credential.create(place / "credential")).keyring_id


HOLDER = KeyHolder("FR", "FR", 0, 2**50)


async def opened(
    loaded: config.Config, registers: Registers, cluster: str = "c1"
) -> tuple[LateKeys, Unlocker, asyncio.Task[None]]:
    async def make_keyring(material: keys.KeyMaterial) -> keys.Keyring:
        ports = keys.KeyringPorts(RingRegisters(registers, registers), Copies(), no_audit, SystemClock())  # type: ignore[arg-type]
        return keys.Keyring(material, ports, policy=Policy(), holder=HOLDER)

    late = LateKeys()
    unlocker = Unlocker(
        loaded,
        Binding(registers, cluster, SystemClock(), Path(loaded.path).parent / "remembered"),
        late,
        make_keyring,
    )
    task = asyncio.create_task(unlocker.run())
    while not task.done() and not unlocker.problem:  # noqa: ASYNC110  # the problem is reported to people, not to tasks
        await asyncio.sleep(0.005)
    return late, unlocker, task


async def test_the_first_start_binds_the_cluster_to_its_keyring_and_waits_for_a_majority(tmp_path: Path) -> None:
    loaded = gateway_config(tmp_path)
    keyring_id, registers = make_keyring(tmp_path), Registers(away=2)
    late, _, task = await opened(loaded, registers)
    await task
    assert late.keyring is not None
    assert keyring_id in decode(registers.values[b"cluster"].body, list[Any])
    again, _, task = await opened(loaded, registers)
    await task
    assert again.keyring is not None


@pytest.mark.parametrize("what", ["missing", "another", "cluster", "credential"])
async def test_a_keyring_that_is_not_the_clusters_opens_nothing_until_it_is_restored(tmp_path: Path, what: str) -> None:
    right, wrong = gateway_config(tmp_path / "right"), gateway_config(tmp_path / "wrong")
    make_keyring(tmp_path / "right")
    registers = Registers()
    await (await opened(right, registers))[2]
    if what != "missing":
        make_keyring(tmp_path / "wrong")
    if what == "credential":
        (tmp_path / "wrong" / "credential").write_bytes(bytes(32))
    loaded, cluster = (right, "c2") if what == "cluster" else (wrong, "c1")
    late, unlocker, task = await opened(loaded, registers, cluster)
    assert late.keyring is None
    assert unlocker.problem
    with pytest.raises(KeyringUnavailable):
        late.seal_secret(b"x", [])
    assert (tmp_path / "wrong" / "keyring").exists() == (what != "missing")
    if what in ("missing", "another"):
        for name in ("keyring", "credential"):
            (tmp_path / "wrong" / name).write_bytes((tmp_path / "right" / name).read_bytes())
        unlocker.again()
        await asyncio.wait_for(task, GUARD_S)
        assert late.keyring is not None
        assert late.open_secret(late.seal_secret(b"x", []), []) == b"x"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_process_takes_the_processor_from_nobody_who_wakes_it_unless_it_was_given_a_policy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = (
        "import os, sys\n"
        "from storaged.node import process\n"
        "os.sched_setscheduler(0, int(sys.argv[1]), os.sched_param(0))\n"
        "process.wake_gently()\n"
        "print(os.sched_getscheduler(0))\n"
    )

    def policy_after(policy: int) -> int:
        return int(
            subprocess.run(
                [sys.executable, "-c", script, str(policy)], check=True, capture_output=True, text=True
            ).stdout
        )

    assert policy_after(os.SCHED_OTHER) == os.SCHED_BATCH
    assert policy_after(os.SCHED_IDLE) == os.SCHED_IDLE

    def forbidden(*_arguments: object) -> None:
        raise PermissionError("a system call filter")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    process.wake_gently()


# --- the record of the cluster


async def opened_record(tmp_path: Path, forge: Any) -> tuple[LateKeys, Unlocker, ClusterRecord]:
    """A cluster that was opened once, whose record ``forge`` then changed, is opened again."""
    loaded, registers = gateway_config(tmp_path), Registers()
    make_keyring(tmp_path)
    await (await opened(loaded, registers))[2]
    value = registers.values[b"cluster"]
    record = forge(decode(value.body, ClusterRecord))
    registers.values[b"cluster"] = msgspec.structs.replace(value, body=encode(record))
    late, unlocker, task = await opened(loaded, registers)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return late, unlocker, decode(registers.values[b"cluster"].body, ClusterRecord)


async def test_a_record_of_the_cluster_from_before_that_is_put_back_over_one_with_an_authenticator_opens_nothing(
    tmp_path: Path,
) -> None:
    late, unlocker, _ = await opened_record(
        tmp_path, lambda record: ClusterRecord(record.cluster, record.keyring, record.created_ms)
    )
    assert late.keyring is None
    assert "it had an authenticator, and has none now" in unlocker.problem


@pytest.mark.parametrize(
    "changes", [{"created_ms": 7}, {"authenticator": b""}, {"authenticator": bytes(32)}, {"authenticated": 0}]
)
async def test_a_record_of_the_cluster_that_no_gateway_wrote_opens_nothing(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    late, unlocker, _ = await opened_record(tmp_path, lambda record: msgspec.structs.replace(record, **changes))
    assert late.keyring is None
    assert "not authentic" in unlocker.problem


async def test_a_record_of_the_cluster_that_can_not_be_read_opens_nothing(tmp_path: Path) -> None:
    late, unlocker, _ = await opened_record(tmp_path, lambda _record: ClusterRecord("c1", b"", 0))
    assert late.keyring is None
    assert unlocker.problem


async def test_a_record_of_the_cluster_from_before_is_read_and_gets_its_authenticator_when_all_names_have_theirs(
    tmp_path: Path,
) -> None:
    loaded, registers = gateway_config(tmp_path), Registers()
    keyring_id = make_keyring(tmp_path)
    registers.values[b"cluster"] = Value(1, b"", 2, encode(["c1", keyring_id, 5]))
    late, unlocker, task = await opened(loaded, registers)
    await task
    assert late.keyring is not None
    binding = unlocker._binding
    assert not binding.authenticated
    tries = 0

    async def authenticate_all() -> int:
        nonlocal tries
        tries += 1
        assert decode(registers.values[b"cluster"].body, ClusterRecord).authenticated == 0, "the names first"
        return 3

    await binding.finish(late, authenticate_all)
    assert (tries, binding.authenticated) == (1, True)
    record = decode(registers.values[b"cluster"].body, ClusterRecord)
    assert (record.keyring, record.created_ms, record.authenticated, len(record.authenticator)) == (
        keyring_id,
        5,
        1,
        32,
    )
    again, unlocker, task = await opened(loaded, registers)
    await task
    assert again.keyring is not None
    assert unlocker._binding.authenticated
