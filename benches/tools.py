"""``python -m benches.tools``: how long runs of restic and rclone take, where these are installed.

A folder of files of all sizes is copied to the server and back. What comes back is compared with what was sent. The
seconds include the tool's own work, which is most of restic's; the table also has the servers' CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from benches.rows import KIB, MIB
from benches.s3client import Target
from benches.servers import Server, end_on_sigterm, seaweedfs_durable, storaged_cluster, storaged_single

FILES = ((400, 4 * KIB), (100, 64 * KIB), (40, 1 * MIB), (4, 16 * MIB))
RUN_TIMEOUT_S = 900.0
Runs = Iterator[tuple[str, Sequence[str]]]


def make_files(folder: Path) -> int:
    """Random files of ``FILES``; returns their bytes."""
    source, total = random.Random(1), 0
    folder.mkdir()
    for count, size in FILES:
        for number in range(count):
            (folder / f"{size}-{number:04d}").write_bytes(source.randbytes(size))
            total += size
    return total


def same(sent: Path, came: Path) -> bool:
    names = sorted(path.name for path in sent.iterdir())
    if names != sorted(path.name for path in came.iterdir()):
        return False
    return filecmp.cmpfiles(sent, came, names, shallow=False)[0] == names


def environment(target: Target, home: Path) -> dict[str, str]:
    """For both tools: they read no configuration of the user who runs this."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RESTIC_", "RCLONE_", "AWS_"))},
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "AWS_ACCESS_KEY_ID": target.access_key,
        "AWS_SECRET_ACCESS_KEY": target.secret_key,
        "AWS_DEFAULT_REGION": target.region,
        "RESTIC_REPOSITORY": f"s3:{target.endpoint}/restic",
        "RESTIC_PASSWORD": "benchmark",
        "RCLONE_CONFIG": str(home / "rclone.conf"),
        "RCLONE_CONFIG_B_TYPE": "s3",
        "RCLONE_CONFIG_B_PROVIDER": "Other",
        "RCLONE_CONFIG_B_ENV_AUTH": "true",
        "RCLONE_CONFIG_B_ENDPOINT": target.endpoint,
        "RCLONE_CONFIG_B_REGION": target.region,
    }


def restic(files: Path, came: Path) -> Runs:
    yield "restic init", ("restic", "init", "--quiet")
    yield "restic backup", ("restic", "backup", "--quiet", str(files))
    yield "restic check --read-data", ("restic", "check", "--quiet", "--read-data")
    yield "restic restore", ("restic", "restore", "--quiet", "latest", "--target", str(came))


def rclone(files: Path, came: Path) -> Runs:
    yield "rclone mkdir", ("rclone", "mkdir", "b:rclone")
    yield "rclone copy, up", ("rclone", "copy", "--transfers", "8", str(files), "b:rclone")
    yield "rclone check", ("rclone", "check", "--download", "--transfers", "8", str(files), "b:rclone")
    yield "rclone copy, down", ("rclone", "copy", "--transfers", "8", "b:rclone", str(came))


def measure(server: Server, folder: Path, files: Path) -> Iterator[str]:
    """A line for each run. Raises SystemExit when a tool fails, or what it brought back is not what was sent."""
    for make, inside in ((restic, files.relative_to("/")), (rclone, Path())):
        if shutil.which(make.__name__) is None:
            yield f"| {make.__name__} is not installed | | | |"
            continue
        came = folder / f"came-{make.__name__}"
        for name, command in make(files, came):
            cpu, began = sum(server.cpu_seconds().values()), time.perf_counter()
            done = subprocess.run(
                command,
                env=environment(server.target, folder),
                capture_output=True,
                text=True,
                timeout=RUN_TIMEOUT_S,
                check=False,
            )
            seconds = time.perf_counter() - began
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
            used = sum(server.cpu_seconds().values()) - cpu
            yield f"| {name} | {server.name} | {seconds:.2f} | {used:.2f} |"
        if not same(files, came / inside):
            raise SystemExit(f"{make.__name__}: what came back is not what was sent")
        shutil.rmtree(came)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benches.tools", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["cluster", "single"], default="cluster")
    parser.add_argument("--peer", choices=["seaweedfs"], help="the same with SeaweedFS, durable")
    parser.add_argument("--dir", type=Path)
    wanted = parser.parse_args()
    end_on_sigterm()
    own = storaged_cluster if wanted.shape == "cluster" else storaged_single
    makes: list[Callable[[], AbstractContextManager[Server]]] = [lambda: own(wanted.dir)]
    makes += [lambda: seaweedfs_durable(wanted.dir)] if wanted.peer else []
    with tempfile.TemporaryDirectory(prefix="storaged-tools-", dir=wanted.dir) as place:
        files = Path(place).resolve() / "files"
        total = make_files(files)
        print(f"{sum(count for count, _ in FILES)} files, {total / MIB:.0f} MiB\n")
        print("| run | server | seconds | server CPU, s |\n|---|---|---|---|")
        for number, make in enumerate(makes):
            folder = Path(place).resolve() / str(number)
            folder.mkdir()
            with make() as server:
                for line in measure(server, folder, files):
                    print(line, flush=True)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
