"""Peers whose binaries the caller names: MinIO and Garage, each in the durable setting that its documentation has."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benches.s3client import Target
from benches.servers import Server, await_port, free_port, stop

GARAGE_NODES = 3
COMMAND_TIMEOUT_S = 30.0


def _run(folder: Path, name: str, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(arguments, stdout=log, stderr=log, cwd=folder, env={**os.environ, **environment})


@contextlib.contextmanager
def minio(binary: Path, parent: Path | None = None) -> Iterator[Server]:
    """One process with four drives (2+2 or as it chooses); MINIO_FS_OSYNC has it sync what it writes."""
    with TemporaryDirectory(prefix="minio-bench-", dir=parent) as place:
        folder, port = Path(place), free_port()
        access, secret = "benchmark", "benchmark-secret"
        environment = {
            "HOME": place,
            "MINIO_ROOT_USER": access,
            "MINIO_ROOT_PASSWORD": secret,
            "MINIO_BROWSER": "off",
            "MINIO_FS_OSYNC": "on",
            "MINIO_CI_CD": "on",  # else it refuses drives on the file system of the root directory
        }
        drives = [str(folder / f"drive{number}") for number in range(1, 5)]
        process = _run(folder, "minio", [str(binary), "server", "--address", f"127.0.0.1:{port}", *drives], environment)
        try:
            await_port(port, process)
            time.sleep(3)  # it listens before its drives are formatted
            target = Target(f"http://127.0.0.1:{port}", access, secret)
            yield Server("MinIO, four drives", target, {"minio": process.pid}, folder)
        finally:
            stop(process)


_GARAGE_CONFIG = """
metadata_dir = "{folder}/meta"
data_dir = "{folder}/data"
db_engine = "lmdb"
metadata_fsync = true
data_fsync = true
replication_factor = 3
rpc_secret = "{secret}"
rpc_bind_addr = "127.0.0.1:{rpc}"
rpc_public_addr = "127.0.0.1:{rpc}"
[s3_api]
s3_region = "garage"
api_bind_addr = "127.0.0.1:{s3}"
"""


@contextlib.contextmanager
def garage(binary: Path, parent: Path | None = None) -> Iterator[Server]:
    """Three processes in three zones, three copies, data and metadata synced. The first one is asked."""
    with TemporaryDirectory(prefix="garage-bench-", dir=parent) as place, contextlib.ExitStack() as stack:
        folder, secret = Path(place), secrets.token_hex(32)
        processes: dict[str, subprocess.Popen[bytes]] = {}
        configs, ports, rpc = [], [free_port() for _ in range(GARAGE_NODES)], [free_port() for _ in range(GARAGE_NODES)]
        for number in range(GARAGE_NODES):
            home = folder / f"node{number}"
            home.mkdir()
            config = home / "garage.toml"
            text = _GARAGE_CONFIG.format(folder=home, secret=secret, rpc=rpc[number], s3=ports[number])
            config.write_text(text)
            config.chmod(0o600)
            configs.append(config)
            process = processes[f"garage{number}"] = _run(
                home, "garage", [str(binary), "-c", str(config), "server"], {}
            )
            stack.callback(stop, process)
            await_port(rpc[number], process)

        def command(number: int, *words: str) -> str:
            asked = [str(binary), "-c", str(configs[number]), *words]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
            if done.returncode:
                raise SystemExit(f"garage {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
            return done.stdout

        ids = [command(number, "node", "id", "-q").strip() for number in range(GARAGE_NODES)]
        for node in ids[1:]:
            command(0, "node", "connect", node)
        for number, node in enumerate(ids):
            command(0, "layout", "assign", "-z", f"zone{number}", "-c", "10G", node.split("@")[0])
        command(0, "layout", "apply", "--version", "1")
        await_port(ports[0], processes["garage0"])
        access, key = f"GK{secrets.token_hex(12)}", secrets.token_hex(32)
        command(0, "key", "import", "--yes", access, key, "-n", "bench")
        command(0, "key", "allow", "--create-bucket", access)
        target = Target(f"http://127.0.0.1:{ports[0]}", access, key, "garage")
        yield Server("Garage, three copies", target, {name: one.pid for name, one in processes.items()}, folder)
