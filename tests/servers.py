"""A cluster of servers, made and changed by the commands of deploy/README.md: real processes on loopback, and a folder
for each server.

``Servers`` is what an administrator and the people beside the servers do. ``authority`` is the folder with the
authority's keys. A server's folder has ``etc`` (what was copied from the authority), ``state`` (the node's own
directory) and its disks. Nothing of ``storaged dev`` is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from storaged.cli.client import request
from storaged.cli.create import layout_path
from storaged.cluster.issuing import load_authority
from storaged.errors import StoragedError
from tests.cluster import RACKS, Cluster, free_port, last_lines
from tests.commands import Running, commands
from tests.patience import GUARD_S, SLOWNESS

DISKS = ("d1", "d2")
PASSPHRASE = "a long passphrase of a test"
DOWN: Mapping[str, Any] = {"verdict": "DOWN", "nodes": [], "problems": [], "objects_counted": False, "moving": None}


@dataclass
class Server:
    """One server, or one gateway. ``port``: where other nodes call it; it keeps it. ``s3_port``: of a gateway."""

    name: str
    folder: Path
    port: int = field(default_factory=free_port)
    s3_port: int = 0
    ticket: str = ""
    process: Running | None = None

    @property
    def config(self) -> Path:
        return self.folder / "etc" / "config.toml"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def disk_ids(self) -> dict[str, str]:
        """The id of each disk by the name of its directory, as the configuration has them."""
        found = re.findall(r'^id = "(\w+)"\ndirectory = "([^"]+)"', self.config.read_text(), re.MULTILINE)
        return {Path(directory).name: disk for disk, directory in found}


class Servers(Cluster):
    """``create`` makes and starts a cluster. Commands without a gateway's name go to the first gateway."""

    def __init__(self, root: Path) -> None:
        super().__init__(
            root / "gateway" / "state",
            home=root / "home",
            more_environment={"CREDENTIALS_DIRECTORY": str(root / "credentials")},
        )
        self.root = root
        self.authority = root / "authority"
        self.servers: dict[str, Server] = {}
        self.gateways: list[str] = []
        self._epoch = 0
        """Of the layout that was applied last."""
        self._known = 0
        self._refusal = ""

    # --- what an administrator types

    def create(self, racks: Mapping[str, str] = RACKS, *, gateways: int = 1) -> Servers:
        credentials = Path(self.more_environment["CREDENTIALS_DIRECTORY"])
        credentials.mkdir(mode=0o700, parents=True)
        (credentials / "keyring").write_bytes(secrets.token_bytes(32))
        self.run("cluster", "create", str(self.authority), "--cluster", "test")
        for name, rack in racks.items():
            self.issue(name, rack)
        names = ["gateway", *(f"gateway{number}" for number in range(2, gateways + 1))]
        for name in names:
            self.issue(name, RACKS["n1"], roles="gateway")
        self.run("cluster", "layout", str(self.authority))
        for name in self.servers:
            self.install(name)
            if name in racks:
                self.begin(name)
        self.run("keys", "create", str(self.servers["gateway"].config))
        self.start_gateway("gateway")
        user = self._first_user()
        for name in names[1:]:
            self.give_keyring(name)
            self.start_gateway(name)
        self.wait_healthy(120)
        self.settings = {
            "endpoint": self.endpoint_of("gateway"),
            "region": "eu-fr-1",
            "access_key": user["access_key"],
            "secret_key": user["secret_key"],
            "bucket": "demo",
        }
        self.boto3(attempts=5).create_bucket(Bucket="demo")
        return self

    def start_gateway(self, name: str) -> None:
        self.start_node(name)
        self.gateways.append(name)

    def _first_user(self) -> dict[str, str]:
        """The cluster begins when all its nodes are up."""
        found: dict[str, str] = {}

        def made() -> bool:
            done = self.run("user", "add", "demo", "--json", check=False)
            found.update(json.loads(done.stdout) if done.returncode == 0 else {})
            return bool(found)

        self.wait_until(made, 60, "a first user")
        return found

    def give_keyring(self, name: str) -> None:
        """As for every further gateway: a backup of the first one's."""
        saved, passphrase = self.root / "keyring.backup", self.root / "passphrase"
        passphrase.write_text(PASSPHRASE + "\n")
        if not saved.exists():
            self.run("keys", "backup", str(saved), "--passphrase-file", str(passphrase))
        config = str(self.servers[name].config)
        self.run("keys", "restore", str(saved), "--config", config, "--passphrase-file", str(passphrase))

    def server(self, name: str) -> Server:
        """A server that has nothing yet, or the one of this name."""
        if name not in self.servers:
            self.servers[name] = Server(name, self.root / name)
            self.servers[name].folder.mkdir(exist_ok=True)
        return self.servers[name]

    def issue(self, name: str, rack: str, *, roles: str = "storage") -> None:
        server = self.server(name)
        self.run(
            *("cluster", "issue", str(self.authority), name, "--rack", rack, "--roles", roles, "--admin", "none"),
            *("--address", f"127.0.0.1:{server.port}", "--state", str(server.state)),
            *(f"--disk={server.folder / disk}" for disk in DISKS if roles == "storage"),
        )

    def install(self, name: str) -> None:
        """Copies the issued folder to its server. A gateway gets a port of its own."""
        server = self.server(name)
        shutil.copytree(self.authority / "nodes" / name, server.folder / "etc")
        self.give_s3_port(name)

    def give_s3_port(self, name: str) -> None:
        """All gateways are on one machine here."""
        server = self.servers[name]
        text = server.config.read_text()
        if "[s3]" in text:
            server.s3_port = free_port()
            server.config.write_text(text.replace("127.0.0.1:8333", f"127.0.0.1:{server.s3_port}"))

    def plan(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("cluster", "plan", str(self.authority), "--json").stdout)
        return found

    def layouts(self) -> list[Path]:
        """Signs what follows, and returns the files to apply, in their order."""
        return self._signs("layout")

    def _signs(self, command: str) -> list[Path]:
        known = set(self._signed())
        self.run("cluster", command, str(self.authority))
        return [path for path in self._signed() if path not in known]

    def _signed(self) -> list[Path]:
        folder = layout_path(load_authority(self.authority), 1).parent
        return sorted(folder.glob("layout-*.signed"), key=lambda path: int(path.stem.split("-")[1]))

    def apply(self, file: Path) -> None:
        """It may have to be repeated while rows of the system partition are copied, or a gateway is away."""
        self.wait_until(lambda: self.on_any("cluster", "apply", str(file)), 180, f"{file.name} in force")
        self._epoch = int(file.stem.rpartition("-")[2])

    def adopt(self) -> None:
        """Takes over what came into force without this administrator."""
        file = self.root / "now.signed"
        self.run("cluster", "fetch", str(file))
        self.run("cluster", "adopt", str(self.authority), str(file))

    def abort(self) -> None:
        """Takes the last change back."""
        for file in self._signs("abort"):
            self.apply(file)

    def on_any(self, *command: str) -> bool:
        """Whether a command succeeds on one of the gateways."""
        for name in self.gateways:
            done = self.on(name, *command, check=False, timeout_s=120)
            if done.returncode == 0:
                return True
            self._refusal = done.stderr
        return False

    def change(self) -> dict[str, Any]:
        """``plan``, ``layout`` and ``apply`` of all layouts that this makes. Returns what ``plan`` said."""
        planned = self.plan()
        for file in self.layouts():
            self.apply(file)
        return planned

    def add(self, name: str, rack: str) -> dict[str, Any]:
        """A server more, as the guide says: it waits until the layout is in force. Returns what ``plan`` said."""
        self.invite(name, rack)
        planned = self.plan()
        files = self.layouts()
        self.join(name)
        self.begin(name)
        for file in files:
            self.apply(file)
        return planned

    def invite(self, name: str, rack: str) -> None:
        """A ticket, the key on the new server, and the certificate for it."""
        server = self.server(name)
        invited = self.run(
            *("node", "invite", str(self.authority), name, "--rack", rack, "--admin", "none", "--json"),
            *("--address", f"127.0.0.1:{server.port}", "--state", str(server.state)),
            *(f"--disk={server.folder / disk}" for disk in DISKS),
        )
        self._ask_certificate(server, invited.stdout)

    def _ask_certificate(self, server: Server, invited: str) -> None:
        server.ticket = json.loads(invited)["ticket"]
        self.run("node", "join", server.ticket, str(server.config.parent))
        self.run("node", "sign", str(self.authority), str(server.config.parent / "request"))

    def join(self, name: str) -> None:
        """With the answer, and so with the layout that was signed last."""
        server, answer = self.servers[name], self.authority / "nodes" / name / "answer"
        self.run("node", "join", server.ticket, str(server.config.parent), str(answer))

    def renew(self, name: str) -> None:
        """A new certificate for a new key. The node is not reloaded."""
        invited = self.run("cluster", "renew", str(self.authority), name, "--json")
        self._ask_certificate(self.servers[name], invited.stdout)
        self.join(name)

    def revoke(self, certificate: Path) -> None:
        """The next layout revokes it."""
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        self.run("cluster", "revoke", str(self.authority), found.fingerprint(hashes.SHA256()).hex())

    def on(self, name: str, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command on one node's server."""
        return self.run("--dir", str(self.servers[name].state), *command, **options)

    def drain(self, name: str) -> None:
        self.run("node", "drain", str(self.authority), name)

    def undrain(self, name: str) -> None:
        self.run("node", "undrain", str(self.authority), name)

    def profile(self, wanted: str) -> None:
        self.run("cluster", "profile", str(self.authority), wanted)

    def remove(self, name: str) -> None:
        self.run("node", "remove", str(self.authority), name)

    def replace_disk(self, name: str, disk: str) -> tuple[str, str]:
        """``disk replace``, and what it says: the new id in the configuration. Returns the ids (old, new)."""
        server = self.servers[name]
        place = str(server.folder / disk)
        said = self.run("disk", "replace", str(self.authority), name, place).stdout
        found = re.search(r"disk (\w+) is in the list for (\w+)", said)
        assert found, said
        new, old = found.groups()
        server.config.write_text(server.config.read_text().replace(f'"{old}"', f'"{new}"'))
        return old, new

    # --- what happens to processes

    def begin(self, name: str) -> None:
        """Starts a node, and does not wait until it is ready."""
        server = self.servers[name]
        assert server.process is None or server.process.poll() is not None, f"{name} runs"
        with server.log.open("ab") as log:
            server.process = commands().start(server.config, self.environment(), log.fileno())

    def start_node(self, name: str) -> None:
        """Starts a node and waits until it serves."""
        self.begin(name)

        def ready() -> bool:
            assert self.runs(name), f"{name} ended: {self.log_of(name)}"
            return self.serves(name)

        self.wait_until(ready, 60, f"{name} serves")

    def serves(self, name: str) -> bool:
        """Whether its admin socket answers, and a gateway listens."""
        server = self.servers[name]
        if server.s3_port and not _listens(server.s3_port):
            return False
        with contextlib.suppress(StoragedError, OSError, ValueError):
            request(server.state, "GET", "/v1/status", timeout_s=30)
            return True
        return False

    def begin_again(self, *names: str) -> None:
        """Stops nodes in order and starts them again, to read an edited configuration."""
        for name in names:
            self.stop_node(name)
            self.start_node(name)

    def stop_node(self, name: str) -> int:
        return self._end(name, signal.SIGTERM)

    def reload(self, name: str) -> None:
        os.kill(self.pid_of(name), signal.SIGHUP)

    def kill_node(self, name: str) -> int:
        return self._end(name, signal.SIGKILL)

    def _end(self, name: str, number: signal.Signals) -> int:
        process = self.servers[name].process
        if process is None:
            return 0
        process.send_signal(number)
        try:
            code = process.wait(60 * SLOWNESS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait(GUARD_S)
        self.servers[name].process = None
        return code

    def runs(self, name: str) -> bool:
        process = self.servers[name].process
        return process is not None and process.poll() is None

    def pid_of(self, name: str) -> int:
        process = self.servers[name].process
        assert process is not None, f"{name} does not run"
        return process.pid

    def stop(self) -> None:
        """Gateways first, as they ask the others."""
        for name in (*self.gateways, *self.servers):
            with contextlib.suppress(ProcessLookupError):
                self.stop_node(name)

    # --- what is asked

    def endpoint_of(self, gateway: str) -> str:
        return f"http://127.0.0.1:{self.servers[gateway].s3_port}"

    def in_turns(self, **options: Any) -> Any:
        """An S3 client that asks the gateways in turn, as a client of a load balancer does."""
        return _InTurns([self.boto3(endpoint_url=self.endpoint_of(name), **options) for name in self.gateways])

    def status(self) -> dict[str, Any]:
        """Of the first gateway that answers. In this process: commands for all questions take a busy machine's time."""
        for gateway in self.gateways or ["gateway"]:
            with contextlib.suppress(StoragedError, OSError, ValueError):
                found: dict[str, Any] = request(self.servers[gateway].state, "GET", "/v1/status")
                return found
        return dict(DOWN)

    def where(self, bucket: str, key: str) -> dict[str, Any]:
        query = {"bucket": bucket, "key": key.encode().hex()}
        error: Exception | None = None
        for gateway in self.gateways:
            try:
                found: dict[str, Any] = request(self.servers[gateway].state, "GET", "/v1/where", query=query)
                return found
            except (StoragedError, OSError, ValueError) as failed:
                error = failed
        raise AssertionError(f"where {key}: {error}")

    def still_moves(self) -> str:
        """What is not yet where the layout wants it; empty when everything is."""
        if self._known < self._epoch and not self._all_know():
            return "a node has not heard of the layout"
        self._known = self._epoch
        status = self.status()
        moving = status["moving"]
        if not moving or not status["objects_counted"] or status["epoch"] < self._epoch:
            return "not counted yet"
        names = ("partitions", "system", "objects", "recoding")
        left = {name: moving[name] for name in names if moving[name] not in (0, False)}
        if status["objects_below_target"]:
            left["below target"] = status["objects_below_target"]
        return f"{left} {moving['reason']}" if left else ""

    def _all_know(self) -> bool:
        """Whether all nodes that run use the last layout. What a node has counted before is of the layout before."""
        for node in self.status()["nodes"]:
            if self.runs(node["name"]):
                try:
                    known = request(self.servers[node["name"]].state, "GET", "/v1/status")["epoch"]
                except (StoragedError, OSError, ValueError):
                    return False
                if known < self._epoch:
                    return False
        return True

    def wait_moved(self, timeout_s: float = 240.0) -> None:
        self.wait_until(lambda: not self.still_moves(), timeout_s, "everything where the layout wants it")

    def node(self, name: str) -> dict[str, Any] | None:
        """What ``status`` says about a node; None for one that the layout does not name."""
        return next((node for node in self.status()["nodes"] if node["name"] == name), None)

    def log_of(self, name: str, lines: int = 5) -> str:
        return last_lines(self.servers[name].log, lines)

    def log_tail(self, lines: int = 40) -> str:
        logs = [f"{name}: {self.log_of(name, max(2, lines // 8))}" for name in self.servers]
        return "\n".join([self._refusal, *logs])

    @contextlib.contextmanager
    def stands_still(self, name: str, seconds: float) -> Iterator[None]:
        """SIGSTOP for a while: the process hangs, and its connections stay."""
        pid = self.pid_of(name)
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class _InTurns:
    """Each request goes to the next client. ``clients`` are not empty."""

    def __init__(self, clients: list[Any]) -> None:
        self._clients = clients
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        self._count += 1
        return getattr(self._clients[self._count % len(self._clients)], name)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
