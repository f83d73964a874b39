"""``storaged dev``: a trial cluster of three storage nodes and a gateway on this machine."""

from __future__ import annotations

import difflib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from storaged.cli.target import command_for, find_directory, known_directories, record_default, require_dev
from storaged.disk_states import SOUND
from storaged.errors import DirectoryInUse, NotRunning, OperatorError, PortInUse, every_error

if TYPE_CHECKING:
    from storaged.cli.fork_server import ForkServer

REGION = "eu-fr-1"
BUCKET = "demo"
S3_PORT = 8333
ADMIN_PORT = 8334
START_TIMEOUT_S = 180.0
"""More than the supervisor's guard, so that its reason is shown."""
COUNT_TIMEOUT_S = 2.0
COUNT_POLL_S = 0.1
NEW_TIMEOUT_S = 60.0
SEEN_TIMEOUT_S = 10.0
SEEN_POLL_S = 0.05
RACKS = (("n1", "FR/par1/a"), ("n2", "FR/par2/b"), ("n3", "FR/lyo1/c"))
GATEWAY = ("gateway", "FR/par1/a")
DISKS_EACH = 2
LIMITS = """[limits]
reserve_bytes = "1 GiB"
"""
"""The nodes share one disk, which other things fill: a twentieth of it may be more than is free."""
CREATING = ".creating"
MISSPELT = 0.75
"""A word this similar to an action (difflib's ratio) is a misspelt action and no directory: ``strat``, ``sotp``."""


class DevGroup(click.Group):
    """``storaged dev DIR`` and ``storaged dev --detach`` mean ``storaged dev up ...``; a directory named like an action
    is written ``./stop``.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            if (
                args
                and (near := difflib.get_close_matches(args[0], self.commands, 1, MISSPELT))
                and not Path(args[0]).exists()
            ):
                raise click.UsageError(
                    f"{args[0]!r}: did you mean {near[0]!r}? A directory of this name is written ./{args[0]}.", ctx
                )
            args = ["up", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DevGroup)
def dev() -> None:
    """A whole cluster on this machine, for trying: storaged dev [DIR] [--detach] [--s3-port N] [--admin-port N]
    [--workers N].

    Three storage nodes of two disks each in three racks, and a gateway that alone has keys. Everything listens on
    127.0.0.1 only.
    """


@dev.command("up")
@click.argument("directory", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--detach", is_flag=True, help="Go on in the background once it is ready; `storaged dev stop` ends it.")
@click.option(
    "--s3-port",
    type=click.IntRange(1, 65535),
    default=None,
    help=f"Port of the S3 service (default {S3_PORT}, or what DIR had).",
)
@click.option(
    "--admin-port",
    type=click.IntRange(1, 65535),
    default=None,
    help=f"Port of health and metrics (default {ADMIN_PORT}, or what DIR had).",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=None,
    help="Processes of the gateway that share its port (default half the cores, 4 at most, or what DIR had).",
)
@click.pass_obj
def up(
    named: str | None,
    directory: Path | None,
    detach: bool,
    s3_port: int | None,
    admin_port: int | None,
    workers: int | None,
) -> None:
    """Start the cluster in DIR (made at first), or the last one. This is what `storaged dev DIR` does."""
    chosen = directory or (Path(named) if named else None) or next(iter(known_directories()), None) or default_place()
    place = chosen.expanduser().absolute()
    if detach:
        _detach(place, s3_port, admin_port, workers)
        return
    import asyncio

    from storaged.cli.fork_server import ForkServer

    check_place(place)
    fork_server = ForkServer([str(place / name / "config.toml") for name, _ in (*RACKS, GATEWAY)])
    fork_server.begin()  # its imports take as long as the certificates of a new cluster
    new = prepare(place, s3_port, admin_port, workers)
    record_default(place)
    asyncio.run(_supervise(place, fork_server, new))


def default_workers() -> int:
    """Half the cores, 4 at most: storage nodes and clients run on this machine too.

    On two cores a second process gained nothing and took 75 MiB.
    """
    return max(1, min(4, (os.cpu_count() or 1) // 2))


def default_place() -> Path:
    """The directory of a trial cluster that the user did not name (XDG base directory specification)."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "storaged" / "dev"


async def _supervise(place: Path, fork_server: ForkServer, new: bool) -> None:
    from storaged.cli.supervisor import Supervisor

    async with Supervisor(place, require_dev(place), fork_server, click.echo) as supervisor:
        await supervisor.start(list(supervisor.nodes))
        await _first_things(place)
        click.echo(banner(place, new), nl=False)
        sys.stdout.flush()
        supervisor.note_ready()
        await supervisor.stopping.wait()
        click.echo("stopping; requests in flight are finished first")


# --- making it


def check_place(place: Path) -> None:
    """Checks that no cluster runs in ``place``, and that it is empty or a cluster of `storaged dev`. Changes nothing.

    Raises DirectoryInUse, OperatorError.
    """
    from storaged.admin.place import running_pid

    if not place.exists():
        return
    if pid := running_pid(place):
        raise DirectoryInUse(f"{place} is already running, as process {pid}")
    strangers = sorted(
        path.name for path in place.iterdir() if path.name not in ("credentials.json", "dev.log", "lock")
    )
    if strangers and not (place / "dev.json").exists() and not (place / CREATING).exists():
        raise OperatorError(
            f"{place} is neither empty nor a cluster of `storaged dev` (it holds {strangers[0]}); name another"
            " directory"
        )


def prepare(place: Path, s3_port: int | None, admin_port: int | None, workers: int | None = None) -> bool:
    """Makes the cluster's files unless they exist, and settles its ports. Returns whether the cluster is new.

    Raises DirectoryInUse, PortInUse, OperatorError.
    """
    check_place(place)
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    interrupted = (place / CREATING).exists()
    if interrupted:  # no node ever ran here: the marker goes before the first one starts
        for name in (*(name for name, _ in (*RACKS, GATEWAY)), "authority"):
            shutil.rmtree(place / name, ignore_errors=True)
        (place / "dev.json").unlink(missing_ok=True)
    new = not (place / "dev.json").exists()
    known = {} if new else require_dev(place)
    s3, admin = s3_port or known.get("s3_port") or S3_PORT, admin_port or known.get("admin_port") or ADMIN_PORT
    _check_free(s3)
    try:
        _check_free(admin)
    except PortInUse:
        if admin_port:
            raise
        (admin,) = _free_ports(1, {s3})  # no user knows this port yet, and another trial cluster may run
    count = workers or known.get("workers") or default_workers()
    if new:
        _create(place, s3, admin, count)
    elif (s3, admin, count) != (known["s3_port"], known["admin_port"], known.get("workers")):
        known.update(s3_port=s3, admin_port=admin, workers=count)
        _write_gateway(place, s3, admin, count)
        _write_json(place / "dev.json", known)
    return new


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except PermissionError:
            raise OperatorError(f"port {port} is for root alone on this machine; choose one from 1024 on") from None
        except OSError:
            raise PortInUse(f"127.0.0.1:{port} is already in use by another program") from None


def _create(place: Path, s3: int, admin: int, workers: int) -> None:
    from storaged.cli import create as files
    from storaged.cli.keys import create_with_credential
    from storaged.cluster import issuing

    (place / CREATING).touch()
    authority = issuing.create_authority(place / "authority", f"dev-{secrets.token_hex(6)}")
    plan = files.ClusterPlan(authority.cluster)
    for (name, rack), port in zip(RACKS, _free_ports(len(RACKS), {s3, admin}), strict=True):
        disks = files.new_disks([f"d{number}" for number in range(1, DISKS_EACH + 1)])
        plan.nodes.append(files.NodePlan(name, rack, ("storage",), f"127.0.0.1:{port}", disks=disks))
    plan.nodes.append(files.NodePlan(GATEWAY[0], GATEWAY[1], ("gateway",)))
    for node in plan.nodes:
        config = files.storage_config(node, ".", node.address, LIMITS) if node.disks else ""
        files.issue_node(authority, node, place / node.name, config)
    _write_gateway(place, s3, admin, workers)
    layout = files.layout_of(plan)
    files.sign_layout(authority, layout, [place / node.name for node in plan.nodes])
    plan.epoch = layout.epoch
    files.save_plan(place / "authority", plan)
    create_with_credential(place / "gateway" / "keys")
    credentials = {"access_key": f"SOV{secrets.token_hex(8).upper()}", "secret_key": secrets.token_urlsafe(30)}
    _write_json(place / "credentials.json", credentials)
    document = {
        "version": 1,
        "cluster": authority.cluster,
        "region": REGION,
        "bucket": BUCKET,
        "s3_port": s3,
        "admin_port": admin,
        "workers": workers,
        "prepared": False,
        "nodes": [{"name": node.name, "rack": node.location, "roles": list(node.roles)} for node in plan.nodes],
    }
    _write_json(place / "dev.json", document)
    (place / CREATING).unlink()


def _write_gateway(place: Path, s3: int, admin: int, workers: int) -> None:
    from storaged.cli import create as files

    node = files.NodePlan(GATEWAY[0], GATEWAY[1], ("gateway",))
    keys = {"keyring": "keys/keyring", "credential": "keys/credential"}
    extra = f'\n[admin]\nlisten = "127.0.0.1:{admin}"\n'
    text = files.gateway_config(node, ".", f"127.0.0.1:{s3}", REGION, keys, extra, workers=workers)
    files.write_private(place / GATEWAY[0] / "config.toml", text.encode())


def _free_ports(count: int, taken: set[int]) -> list[int]:
    """Ports that are free now. The configuration keeps them, so that a stopped node comes back at its address."""
    probes = [socket.socket() for _ in range(count + len(taken))]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [port for port in (probe.getsockname()[1] for probe in probes) if port not in taken][:count]
    finally:
        for probe in probes:
            probe.close()


def _write_json(path: Path, document: dict[str, Any]) -> None:
    from storaged.cli.create import write_private

    write_private(path, json.dumps(document, indent=2).encode() + b"\n")


async def _first_things(place: Path) -> None:
    """Waits until the cluster accepts writes; at the first start makes the bucket and the user of credentials.json.

    Then waits up to COUNT_TIMEOUT_S until repair has counted the objects, so that the first ``status`` has the counts,
    and in a new cluster until all disks are up.
    """
    import asyncio

    from storaged.cli.client import gateway

    deadline = time.monotonic() + START_TIMEOUT_S
    while not (answer := await asyncio.to_thread(gateway, place, "GET", "/readyz"))["ready"]:
        if time.monotonic() > deadline:
            raise OperatorError(f"the cluster is not ready after {START_TIMEOUT_S:.0f} s: {answer['reason']}")
        await asyncio.sleep(0.03)
    known = require_dev(place)
    if not known["prepared"]:
        credentials = json.loads((place / "credentials.json").read_text())
        await asyncio.to_thread(gateway, place, "POST", "/v1/users", body={"name": "dev", **credentials})
        await asyncio.to_thread(
            gateway, place, "POST", "/v1/buckets", body={"name": known["bucket"], "user": credentials["access_key"]}
        )
        _write_json(place / "dev.json", {**known, "prepared": True})
    for _ in range(int(COUNT_TIMEOUT_S / COUNT_POLL_S)):
        if (await asyncio.to_thread(gateway, place, "GET", "/v1/jobs"))["objects_counted"]:
            break
        await asyncio.sleep(COUNT_POLL_S)
    if not known["prepared"]:
        await _all_up(place)


async def _all_up(place: Path) -> None:
    """Waits up to NEW_TIMEOUT_S until all nodes and disks of a new cluster are up: on a busy machine they come late."""
    import asyncio

    from storaged.cli.client import gateway

    deadline = time.monotonic() + NEW_TIMEOUT_S
    while time.monotonic() < deadline:
        nodes = (await asyncio.to_thread(gateway, place, "GET", "/v1/status"))["nodes"]
        disks = [disk for node in nodes for disk in node["disks"]]
        if all(node["state"] == "up" for node in nodes) and all(disk["state"] in SOUND for disk in disks):
            return
        await asyncio.sleep(COUNT_POLL_S)


def banner(place: Path, new: bool) -> str:
    """The text that `storaged dev` prints when the cluster is ready."""
    from storaged.cli.client import gateway

    found = gateway(place, "GET", "/v1/status")
    known = require_dev(place)
    storage = [node for node in found["nodes"] if "storage" in node["roles"]]
    disks = [disk for node in storage for disk in node["disks"]]
    nodes_up = sum(node["state"] == "up" for node in storage)
    disks_ok = sum(disk["state"] in SOUND for disk in disks)
    home = str(Path.home())
    shown = str(place / "gateway" / "keys")
    shown = "~" + shown.removeprefix(home) if shown.startswith(home + "/") else shown
    return (
        "Three storage nodes with six disks in three racks, and a gateway, on this machine, for trying. Any one rack"
        " may fail.\n"
        f"  nodes   {nodes_up}/{len(storage)}      disks  {disks_ok}/{len(disks)}      "
        f"metadata  {found['metadata']}      keys  {'new' if new else 'kept'}, in the gateway only ({shown})\n"
        f"  S3      http://127.0.0.1:{known['s3_port']}    "
        f"health and metrics  http://127.0.0.1:{known['admin_port']}/metrics\n"
        f'  bucket  {known["bucket"]}                     next, in another shell:  eval "$({command_for(place)} env)"\n'
    )


def _detach(place: Path, s3_port: int | None, admin_port: int | None, workers: int | None) -> None:
    from storaged.cli.supervisor import append_private, control

    check_place(place)  # before its log is truncated
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    arguments = [sys.executable, "-m", "storaged", "dev", "up", str(place)]
    arguments += ["--s3-port", str(s3_port)] if s3_port else []
    arguments += ["--admin-port", str(admin_port)] if admin_port else []
    arguments += ["--workers", str(workers)] if workers else []
    with append_private(place / "dev.log") as log:
        log.truncate(0)
        # our own interpreter and module, no shell
        child = subprocess.Popen(  # noqa: S603
            arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            click.echo((place / "dev.log").read_text(), err=True, nl=False)
            sys.exit(child.returncode or 1)
        try:
            started = "nodes" in control(place, {"do": "wait"}, START_TIMEOUT_S)
        except OSError:
            started = False
        if started:
            click.echo((place / "dev.log").read_text(), nl=False)
            return
        time.sleep(0.03)
    child.terminate()
    raise OperatorError(f"the cluster did not become ready within {START_TIMEOUT_S:.0f} s; see {place / 'dev.log'}")


# --- while it runs


def _ask(named: str | None, action: str, name: str = "") -> list[str]:
    from storaged.cli.supervisor import READY_TIMEOUT_S, STOP_TIMEOUT_S, control

    place = find_directory(named)
    try:
        answer = control(place, {"do": action, "name": name}, READY_TIMEOUT_S + STOP_TIMEOUT_S)
    except OSError:
        raise NotRunning(f"no `storaged dev` runs in {place}") from None
    if "message" in answer:
        kind = next((kind for kind in every_error() if kind.code == answer["code"]), OperatorError)
        raise kind(answer["message"])
    return [str(node["name"]) if isinstance(node, dict) else str(node) for node in answer["nodes"]]


@dev.command("start")
@click.argument("name", metavar="NODE|RACK")
@click.pass_obj
def start(named: str | None, name: str) -> None:
    """Start a node, or the storage nodes of a rack, that were stopped or killed."""
    started = _ask(named, "start", name)
    _wait_until_seen(find_directory(named), started)
    click.echo(f"started {', '.join(started)} of {find_directory(named)}")


def _wait_until_seen(place: Path, names: list[str]) -> None:
    """Waits until the gateway sees these nodes as up, so that the next ``status`` does not report them as down.

    Returns early when there is no gateway, and after SEEN_TIMEOUT_S: ``status`` then says why.
    """
    from storaged.cli.client import gateway

    deadline = time.monotonic() + SEEN_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            up = {node["name"] for node in gateway(place, "GET", "/v1/status")["nodes"] if node["state"] == "up"}
        except OperatorError:
            return
        if up.issuperset(names):
            return
        time.sleep(SEEN_POLL_S)


@dev.command("stop")
@click.argument("name", metavar="[NODE|RACK]", required=False)
@click.pass_obj
def stop(named: str | None, name: str | None) -> None:
    """Stop a node, or the storage nodes of a rack (SIGTERM); without a name, the whole cluster."""
    if name:
        click.echo(f"stopped {', '.join(_ask(named, 'stop', name))} of {find_directory(named)}")
        return
    from storaged.admin.place import running_pid
    from storaged.cli.supervisor import STOP_TIMEOUT_S

    place = find_directory(named)
    _ask(named, "shutdown")
    deadline = time.monotonic() + 2 * STOP_TIMEOUT_S
    while running_pid(place) is not None:
        if time.monotonic() > deadline:
            raise OperatorError(f"the cluster in {place} is still stopping; see {place / 'dev.log'}")
        time.sleep(0.05)
    click.echo(f"stopped the cluster in {place}")


@dev.command("kill")
@click.argument("name", metavar="NODE|RACK")
@click.pass_obj
def kill(named: str | None, name: str) -> None:
    """Kill a node, or the storage nodes of a rack, as a power failure would (SIGKILL)."""
    click.echo(f"killed {', '.join(_ask(named, 'kill', name))} of {find_directory(named)}")
