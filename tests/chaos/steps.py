"""The steps of administrators that the chaos of changes plays, with the commands of deploy/README.md.

Each step says what must be true afterwards. ``STEPS`` has them all, with when each is possible.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storaged.cluster.sparing import target
from tests.chaos.changing import NODES_MAX, NODES_MIN, Change, Left, Step, replicas
from tests.servers import DISKS

PROFILES = ("4+2", "2+2", "3+2")
"""Three racks of two disks hold each of them."""


def add(run: Change) -> None:
    name, rack = run.new_server()
    run.remember_folder()
    with run.moving("add a server") as move:
        move.update(run.servers.add(name, rack))
        run.members[name] = rack
    run.wait_whole(name)


def abort(run: Change) -> None:
    """A server is added, and at some moment of its coming that is taken back. It is removed when it is empty."""
    name, rack = run.new_server()
    with run.moving("add a server and take it back") as move:
        move.update(run.servers.add(name, rack))
        run.away.begin_move(replicas(run.layout()))
        time.sleep(run.source.uniform(0, 15))
        run.servers.abort()
    run.remember_folder()
    run.servers.remove(name)
    run.change("remove a server that was taken back")
    run.servers.stop_node(name)
    run.left.append(Left(name, "was taken back and removed"))


def bad_input(run: Change) -> None:
    """Commands that would do harm are refused by name, and change nothing."""
    servers, authority = run.servers, str(run.servers.authority)
    name, rack = run.new_server()
    server = servers.server(name)
    servers.invite(name, rack)
    again = servers.root / "request-again"
    servers.run("node", "join", server.ticket, str(server.config.parent))
    shutil.copy(server.config.parent / "request", again)
    refused = [("TICKET_USED", servers.run("node", "sign", authority, str(again), check=False))]
    servers.run("node", "remove", authority, name)
    if len(run.members) == NODES_MIN:
        refused.append(("LAYOUT_UNSAFE", servers.run("node", "drain", authority, next(iter(run.members)), check=False)))
    for code, done in refused:
        if done.returncode == 0 or code not in done.stderr:
            run.wrong.append(f"not refused with {code}: {done.returncode} {done.stdout} {done.stderr}")
    shutil.rmtree(servers.servers.pop(name).folder)


def drain(run: Change) -> None:
    """Its disks give up what they have; then it is removed and stopped."""
    name = run.source.choice(list(run.members))
    run.remember_folder()
    run.servers.drain(name)
    run.change("drain a server")
    run.servers.remove(name)
    del run.members[name]
    run.change("remove a drained server")
    run.servers.stop_node(name)
    run.left.append(Left(name, "was drained and removed"))


def undrain(run: Change) -> None:
    """An administrator thinks again, in the middle of a drain."""
    name = run.source.choice(list(run.members))
    run.remember_folder()
    with run.moving("drain a server and undrain it") as move:
        run.servers.drain(name)
        move.update(run.servers.change())
        run.away.begin_move(replicas(run.layout()))
        time.sleep(run.source.uniform(0, 8))
        run.servers.undrain(name)
        run.servers.change()


def revoke(run: Change) -> None:
    """The old certificate of a node has leaked: it is renewed, and the old one is revoked, which ends what uses it."""
    name = run.source.choice(list(run.members))
    server = run.servers.servers[name]
    here, leaked, own = (server.config.parent / folder for folder in ("identity", "leaked", "own"))
    shutil.copytree(here, leaked)
    run.remember_folder()
    run.servers.renew(name)
    run.servers.reload(name)
    run.servers.revoke(leaked / "node.crt")
    run.servers.change()
    run.wait_whole(name)
    if run.away.may("a revoked certificate is used", run.disks_of(name), []):
        run.away.take(name, run.disks_of(name))
        run.servers.stop_node(name)
        here.rename(own)
        leaked.rename(here)
        run.servers.begin(name)
        run.servers.wait_until(
            lambda: "code=CERTIFICATE_REVOKED" in run.servers.log_of(name, 5000), 60, f"{name} is refused by name"
        )
        run.servers.stop_node(name)
        here.rename(leaked)
        own.rename(here)
        run.servers.start_node(name)
        run.wait_whole(name)
        run.away.back(name)
    shutil.rmtree(leaked)


def reprofile(run: Change) -> None:
    """Everything is coded again."""
    before = run.layout().profile
    wanted = run.source.choice([profile for profile in PROFILES if profile != before])
    run.remember_folder()
    run.servers.profile(wanted)
    run.change(f"change the profile to {wanted}")
    for key in run.objects.coded[:5]:
        found = {row["profile"] for row in run.servers.where("demo", key)["fragments"]}
        if found != {wanted}:
            run.wrong.append(f"{key} has {found} after the profile was changed to {wanted}")


def rename(run: Change) -> None:
    """A rack gets another name. Nothing moves."""
    name = run.source.choice(list(run.members))
    old = run.members[name]
    new = f"{old.partition('/')[0]}/moved/{name}-{run.steps[RENAME.name]}"
    run.remember_folder()
    run.servers.run("rack", "rename", str(run.servers.authority), old, new)
    if run.servers.change()["moves_data"]:
        run.wrong.append(f"{old} became {new}, and data moves")
    run.members[name] = new
    node = run.servers.node(name)
    if node is None or node["rack"] != new:
        run.wrong.append(f"{old} became {new}, and status says {node and node['rack']}")


def spare(run: Change) -> None:
    """A server is away, and nobody types anything: the others take over what it had. Then it returns."""
    servers, name = run.servers, run.source.choice(list(run.members))
    run.remember_folder()
    sparing(run, "20s", "40s")
    layout, disks = run.layout(), run.disks_of(name)
    run.away.take(name, disks)
    servers.kill_node(name)
    servers.wait_until(lambda: out(run) >= set(disks), 240, f"the disks of {name} out")
    run.away.begin_move(replicas(target(layout, disks)))
    servers.wait_until(lambda: not has_seed(run, name), 240, f"no seed disk at {name}")
    run.settle()
    run.away.end_move()
    servers.adopt()
    layout = run.layout()
    servers.start_node(name)
    run.away.begin_move(replicas(layout))
    servers.wait_until(lambda: not out(run) & set(disks), 240, f"the disks of {name} are back")
    run.away.back(name)
    run.settle()
    run.away.end_move()
    sparing(run, "10m", "1h")
    run.wait_whole(name)


def sparing(run: Change, fragments: str, registers: str) -> None:
    authority = str(run.servers.authority)
    run.servers.run("cluster", "sparing", authority, "--fragments", fragments, "--registers", registers)
    run.servers.change()


def out(run: Change) -> set[str]:
    """The disks that are out."""
    return {entry["disk"] for entry in run.servers.status().get("sparing", {"out": ()})["out"]}


def has_seed(run: Change, name: str) -> bool:
    """Whether the system partition has a disk of this server, or moves."""
    found = run.servers.status().get("sparing", {"seed_moves": True})
    return found["seed_moves"] or name in {seed["node"] for seed in found["seeds"]}


def renew(run: Change) -> None:
    """A node gets a new certificate for a new key, and presents it after a reload."""
    name = run.source.choice([*run.members, *run.servers.gateways])
    run.servers.renew(name)
    run.servers.reload(name)
    run.servers.wait_until(
        lambda: "this node presents a new certificate" in run.servers.log_of(name, 200), 60, f"{name} is renewed"
    )


def lose(run: Change) -> None:
    """A server is gone for good, and is removed."""
    name = run.source.choice(list(run.members))
    run.remember_folder()
    run.servers.kill_node(name)
    run.away.take(name, run.disks_of(name))
    time.sleep(run.source.uniform(0, 5))
    run.servers.remove(name)
    del run.members[name]
    run.change("remove a lost server")
    run.away.back(name)
    run.left.append(Left(name, "was lost and removed"))


def come_back(run: Change) -> None:
    run.come_back(run.left.pop(0))


def replace_disk(run: Change) -> None:
    """A disk is gone; an empty one takes its place under its own id. The old one put back later is refused."""
    name, disk = run.source.choice(list(run.members)), run.source.choice(DISKS)
    server = run.servers.servers[name]
    here, aside, new = server.folder / disk, server.folder / f"{disk}.old", server.folder / f"{disk}.new"
    run.remember_folder()
    run.away.take(name, run.disks_of(name))
    run.servers.kill_node(name)
    here.rename(aside)
    here.mkdir(mode=0o700)
    old, _ = run.servers.replace_disk(name, disk)
    planned = run.servers.plan()
    files = run.servers.layouts()
    run.servers.start_node(name)
    run.away.take(name, [old])
    with run.moving("replace a disk") as move:
        move.update(planned)
        for file in files:
            run.servers.apply(file)
    run.away.back(name)
    run.wait_whole(name)
    if not run.away.may("the old disk is put back", run.disks_of(name), []):
        return
    with exchanged(run, name, here, aside, new):
        run.servers.wait_until(lambda: refuses(run, name), 60, f"the old disk in {here} is refused")
    shutil.rmtree(aside)
    run.wait_whole(name)


@contextlib.contextmanager
def exchanged(run: Change, name: str, here: Path, aside: Path, new: Path) -> Iterator[None]:
    """The old disk is in the place of the new one, inside the block."""
    run.servers.stop_node(name)
    here.rename(new)
    aside.rename(here)
    run.servers.start_node(name)
    yield
    run.servers.stop_node(name)
    here.rename(aside)
    new.rename(here)
    run.servers.start_node(name)


def refuses(run: Change, name: str) -> bool:
    return any(
        problem["code"] == "DISK_FOREIGN" and f"/{name}" in f"/{problem['subject']}"
        for problem in run.servers.status()["problems"]
    )


def two_administrators(run: Change) -> None:
    """Each adds another server, from a folder of his own, at the same time. One succeeds."""
    servers = run.servers
    mine, other = servers.authority, servers.root / f"authority-{run.count}"
    shutil.copytree(mine, other)
    wanted: list[tuple[Path, str, str, Path]] = []
    for folder in (mine, other):
        servers.authority = folder
        name, rack = run.new_server()
        servers.invite(name, rack)
        (file,) = servers.layouts()
        wanted.append((folder, name, rack, file))
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(servers.on, gateway, "cluster", "apply", str(file), check=False, timeout_s=120)
            for gateway, (_, _, _, file) in zip((servers.gateways[0], servers.gateways[-1]), wanted, strict=True)
        ]
    done = [future.result() for future in asked]
    won = [number for number, one in enumerate(done) if one.returncode == 0]
    if len(won) != 1 or "LAYOUT_OVERTAKEN" not in done[1 - won[0]].stderr:
        run.wrong.append(f"two administrators: {[(one.returncode, one.stdout, one.stderr) for one in done]}")
        raise AssertionError(run.wrong[-1])
    servers.authority, name, rack, _ = wanted[won[0]]
    loser, lost_name, _, _ = wanted[1 - won[0]]
    shutil.rmtree(loser)
    shutil.rmtree(servers.servers.pop(lost_name).folder)
    servers.join(name)
    servers.begin(name)
    with run.moving("two administrators add a server") as move:
        run.members[name] = rack
        move["partitions"] = None
    run.wait_whole(name)


def plan_on_an_older_layout(run: Change) -> None:
    """From a folder that does not know the last change. Refused by name, and nothing changes."""
    assert run.older is not None
    servers, epoch = run.servers, run.servers.status()["epoch"]
    kept, servers.authority = servers.authority, run.older
    try:
        name, rack = run.new_server()
        servers.invite(name, rack)
        file = servers.layouts()[0]
        done = servers.on(servers.gateways[-1], "cluster", "apply", str(file), check=False, timeout_s=120)
    finally:
        servers.authority = kept
    shutil.rmtree(run.older)
    shutil.rmtree(servers.servers.pop(name).folder)
    run.older = None
    if done.returncode == 0 or "LAYOUT_OVERTAKEN" not in done.stderr or servers.status()["epoch"] != epoch:
        run.wrong.append(f"a plan on an older layout: {done.returncode} {done.stdout} {done.stderr}")


ADD = Step("add a server", lambda run: len(run.members) < NODES_MAX, add)
ABORT = Step("add a server and take it back", lambda run: len(run.members) < NODES_MAX, abort)
BAD_INPUT = Step("bad input", lambda run: len(run.members) < NODES_MAX, bad_input)
DRAIN = Step("drain and remove a server", lambda run: len(run.members) > NODES_MIN, drain)
UNDRAIN = Step("drain and undrain a server", lambda run: len(run.members) > NODES_MIN, undrain)
REPROFILE = Step("change the profile", lambda run: True, reprofile)
RENAME = Step("rename a rack", lambda run: True, rename)
SPARE = Step("a server is away and replaced by itself", lambda run: len(run.members) > NODES_MIN, spare)
REVOKE = Step("revoke a certificate", lambda run: True, revoke)
RENEW = Step("renew a certificate", lambda run: True, renew)
LOSE = Step("lose a server for good", lambda run: len(run.members) > NODES_MIN, lose)
COME_BACK = Step("a removed server comes back", lambda run: bool(run.left), come_back)
REPLACE = Step("replace a disk", lambda run: True, replace_disk)
RIVALS = Step("two administrators", lambda run: len(run.members) < NODES_MAX - 1, two_administrators)
OLDER = Step("a plan on an older layout", lambda run: run.older is not None, plan_on_an_older_layout)
STEPS = (
    ADD,
    ABORT,
    BAD_INPUT,
    DRAIN,
    UNDRAIN,
    LOSE,
    COME_BACK,
    REPLACE,
    RIVALS,
    OLDER,
    RENEW,
    REVOKE,
    REPROFILE,
    RENAME,
    SPARE,
)
