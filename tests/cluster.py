"""A trial cluster in a folder of its own, driven through the commands an operator has.

What tests ask again and again until it comes true (``status``, ``where``) is asked in this process, by what the command
calls.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storaged.cli.client import gateway
from storaged.cli.env import settings
from storaged.cli.status import fetch
from storaged.errors import StoragedError
from tests.commands import commands
from tests.patience import SLOWNESS

STORAGED = str(Path(sys.executable).parent / "storaged")
POLL_S, POLL_S_MAX = 0.2, 1.0
POLLS_A_WAIT = 20
"""What comes after ten seconds may be noticed half a second late: to answer takes the cluster's processors."""
PORTS = range(12_000, 32_000)
LINE_CHARS_MAX, STATE_LINES_MAX = 500, 60
"""Of what a failure shows of a cluster's state and logs."""

RACKS = {"n1": "FR/par1/a", "n2": "FR/par2/b", "n3": "FR/lyo1/c"}


def free_port() -> int:
    """Below the ports that Linux gives to clients, so that it stays free until a node listens, or listens again."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", PORTS[secrets.randbelow(len(PORTS))]))
            port: int = probe.getsockname()[1]
            return port


def last_lines(path: Path, lines: int) -> str:
    """The end of a log; empty while there is none."""
    found = path.read_text(errors="replace").splitlines()[-lines:] if path.is_file() else []
    return "\n".join(line[:LINE_CHARS_MAX] for line in found)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@dataclass
class Cluster:
    """``storaged dev DIR``: started by ``start``, stopped by ``stop``; the pids it started are the only ones it ever
    signals.
    """

    directory: Path
    s3_port: int = 0
    home: Path | None = None
    """A HOME of its own, so that trying a cluster changes no user's defaults."""
    workers: int = 1
    """Processes of the gateway: on a machine with many cores ``storaged dev`` would choose more."""
    more_environment: Mapping[str, str] = field(default_factory=dict)
    """For its processes."""
    settings: dict[str, Any] = field(default_factory=dict)
    _process: subprocess.Popen[str] | None = None

    def environment(self) -> dict[str, str]:
        home = self.home or self.directory.parent / (self.directory.name + "-home")
        home.mkdir(exist_ok=True)
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "STORAGED_", "XDG_", "RCLONE_", "RESTIC_"))
        }
        own = {"HOME": str(home), "STORAGED_DIR": str(self.directory), "AWS_EC2_METADATA_DISABLED": "true"}
        return {**kept, **own, **self.more_environment}

    def start(self, timeout_s: float = 60.0) -> Cluster:
        """Runs ``storaged dev`` in the foreground of a process of its own and waits until S3 answers ``status``."""
        if not self.s3_port:
            self.s3_port = free_port()
        log = (self.directory.parent / (self.directory.name + ".log")).open("a")
        ports = ["--s3-port", str(self.s3_port), "--admin-port", str(free_port())]
        self._process = subprocess.Popen(
            [STORAGED, "dev", str(self.directory), *ports, "--workers", str(self.workers)],
            env=self.environment(),
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        log.close()
        self.wait_until(lambda: self.status()["verdict"] == "HEALTHY", timeout_s, "a healthy cluster")
        first = (
            self.directory / "dev.json"
        )  # at its very first start a cluster is healthy a moment before its user is there
        self.wait_until(lambda: json.loads(first.read_text())["prepared"], timeout_s, "its user and its bucket")
        self.settings = settings(self.directory)
        return self

    def stop(self) -> None:
        """Ctrl-C, as a person would; SIGKILL for what is left after 30 s."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(30 * SLOWNESS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(10 * SLOWNESS)
        self._process = None

    def kill(self) -> None:
        """SIGKILL for the process that ``start`` began, and for no other."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10 * SLOWNESS)

    def run(self, *arguments: str, check: bool = True, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """``storaged ARGUMENTS`` for this cluster."""
        done = commands().run(arguments, self.environment(), timeout_s * SLOWNESS)
        if check and done.returncode:
            raise AssertionError(f"storaged {' '.join(arguments)} -> {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def status(self) -> dict[str, Any]:
        """What ``storaged status --json`` prints; DOWN as well before there is a cluster, and then with the error."""
        try:
            return fetch(self.directory)
        except (StoragedError, OSError, ValueError) as error:
            return {
                "verdict": "DOWN",
                "nodes": [],
                "problems": [],
                "objects_below_target": 0,
                "objects_lost": 0,
                "error": str(error),
            }

    def where(self, bucket: str, key: str) -> dict[str, Any]:
        """What ``storaged where --json`` prints."""
        query = {"bucket": bucket, "key": key.encode().hex()}
        found: dict[str, Any] = gateway(self.directory, "GET", "/v1/where", query=query, timeout_s=60.0)
        return found

    def wait_until(self, condition: Any, timeout_s: float, what: str) -> None:
        """Polls a condition; the test fails with ``what`` when it does not come true, on a slow machine too
        (``SLOWNESS``).
        """
        began = time.monotonic()
        while (waited_s := time.monotonic() - began) < timeout_s * SLOWNESS:
            if condition():
                return
            if self._process is not None and self._process.poll() is not None:
                raise AssertionError(
                    f"storaged dev ended with {self._process.returncode} while waiting for {what}: {self.log_tail()}"
                )
            time.sleep(max(POLL_S, min(waited_s / POLLS_A_WAIT, POLL_S_MAX)))
        raise AssertionError(f"waited {timeout_s * SLOWNESS:.0f} s for {what}\n{self.state()}\n{self.log_tail()}")

    def wait_healthy(self, timeout_s: float = 90.0) -> None:
        self.wait_until(lambda: self.status()["verdict"] == "HEALTHY", timeout_s, "HEALTHY")

    def state(self) -> str:
        """A few lines that show why the cluster is not as expected."""
        found = self.status()
        lines = [", ".join(f"{key} {value}" for key, value in found.items() if isinstance(value, str | int | None))]
        for node in found["nodes"]:
            disks = ", ".join(f"{disk['id']} {disk['state']}" for disk in node["disks"])
            lines.append(f"{node['name']} {node['state']}: {disks}")
        lines += [f"{kind}: {json.dumps(one)}" for kind in ("problems", "warnings") for one in found.get(kind, ())]
        try:
            jobs = gateway(self.directory, "GET", "/v1/jobs")
        except (StoragedError, OSError, ValueError) as error:
            lines.append(f"jobs: {error}")
        else:
            lines += [f"busy {jobs['busy']}, waits: {json.dumps(jobs['waits'])}"]
            lines += [f"job: {json.dumps(job)}" for job in jobs["jobs"]]
        return "\n".join(line[:LINE_CHARS_MAX] for line in lines[:STATE_LINES_MAX])

    def log_tail(self, lines: int = 40) -> str:
        """Of ``storaged dev``, and some of each of its nodes."""
        own = last_lines(self.directory.parent / (self.directory.name + ".log"), lines)
        nodes = [f"{path.parent.name}: {last_lines(path, lines // 3)}" for path in sorted(self.directory.glob("*/log"))]
        return "\n".join([own, *nodes])

    def pids(self) -> Mapping[str, int]:
        return {node["name"]: node["pid"] for node in self.status()["nodes"] if node.get("pid")}

    def further_workers(self) -> list[int]:
        """The pids of the gateway's processes but its first."""
        first = self.pids().get("gateway")
        if first is None:
            return []
        return children_of(first)

    @property
    def endpoint(self) -> str:
        return str(self.settings["endpoint"])

    def client_environment(self) -> dict[str, str]:
        """What ``eval "$(storaged env)"`` gives to an S3 client."""
        return {
            **self.environment(),
            "AWS_ACCESS_KEY_ID": self.settings["access_key"],
            "AWS_SECRET_ACCESS_KEY": self.settings["secret_key"],
            "AWS_DEFAULT_REGION": self.settings["region"],
            "AWS_ENDPOINT_URL": self.settings["endpoint"],
        }

    def boto3(self, **options: Any) -> Any:
        """An S3 client of boto3 without its own retries, so that every failure shows. ``attempts``: of a request, with
        the first one (``max_attempts`` of botocore counts only those after it). ``keys``: another user's than the
        cluster's own.
        """
        from botocore.config import Config

        access_key, secret_key = options.pop("keys", (self.settings["access_key"], self.settings["secret_key"]))
        region = options.pop("region_name", self.settings["region"])
        endpoint = options.pop("endpoint_url", self.settings["endpoint"])
        config = Config(
            retries={"total_max_attempts": options.pop("attempts", 1), "mode": "standard"},
            max_pool_connections=options.pop("connections", 16),
            connect_timeout=5,
            read_timeout=options.pop("read_timeout_s", 60),
        ).merge(Config(**options))
        with _making_clients:  # a session is not for several threads at once
            return _session().client(
                "s3",
                endpoint_url=endpoint,
                region_name=region,
                aws_access_key_id=access_key,
                aws_secret_access_key=secret_key,
                config=config,
            )


_making_clients = threading.Lock()


@functools.cache
def _session() -> Any:
    """Of all clients: each session reads and parses a megabyte of descriptions anew."""
    import boto3

    return boto3.session.Session()
