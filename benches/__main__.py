"""``benches/run``: rows of S3 work against storaged, a peer, or any endpoint. Exit code 1 when an operation failed or a
byte was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import uvloop

from benches.measure import BURDEN_S_MAX, flat, measure
from benches.peers import garage, minio
from benches.report import flat_markdown, line, markdown, summarize
from benches.rows import GROUPS, ROWS, Result, rows_of
from benches.s3client import SILENCE_S_MAX, WrongAnswer
from benches.servers import (
    Server,
    end_on_sigterm,
    endpoint,
    seaweedfs_binary,
    seaweedfs_default,
    seaweedfs_durable,
    storaged_cluster,
    storaged_single,
)
from storaged.node.process import keep_memory

CONNECTIONS_MAX = 4096

Make = Callable[[], AbstractContextManager[Server]]
TREE = Path(__file__).resolve().parents[1]
"""The source tree of this file is measured, not the storaged that the environment has installed."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benches/run", description=__doc__)
    parser.add_argument(
        "--shape",
        default="cluster",
        help="cluster (three storage nodes and a gateway), single (one process, six disks), or both with a comma",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes of the cluster's gateway (default: half the cores, 4 at most)",
    )
    parser.add_argument("--rows", default="default", help=f"comma separated: {', '.join((*GROUPS, *ROWS))}")
    parser.add_argument("--scale", type=float, default=1.0, help="how much work, relative to the default")
    parser.add_argument(
        "--runs",
        type=int,
        default=1,
        help="number of runs; each has fresh servers, and the servers take turns; the table has medians",
    )
    parser.add_argument(
        "--flat",
        type=int,
        nargs="?",
        const=100_000,
        metavar="N",
        help="the small rows again after N more objects, N overwrites, ...",
    )
    parser.add_argument(
        "--flat-s",
        type=float,
        default=BURDEN_S_MAX,
        metavar="S",
        help="seconds after which a burden of --flat does not grow any more (default 1800)",
    )
    parser.add_argument(
        "--peer",
        choices=["seaweedfs"],
        help="measure this peer in the same run too, with its defaults and durable",
    )
    parser.add_argument("--minio", type=Path, metavar="PATH", help="measure MinIO too: its binary")
    parser.add_argument("--garage", type=Path, metavar="PATH", help="measure Garage too: its binary")
    parser.add_argument("--https", action="store_true", help="storaged single speaks https; no other server does")
    parser.add_argument("--endpoint", help="measure this endpoint instead (http://127.0.0.1:8333)")
    parser.add_argument("--access")
    parser.add_argument("--secret")
    parser.add_argument("--region", default="us-east-1")
    parser.add_argument(
        "--silence",
        type=float,
        default=SILENCE_S_MAX,
        metavar="S",
        help="a request where nothing moves for so long has failed",
    )
    parser.add_argument("--dir", type=Path, help="where the servers keep their data (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="write all results to this file too")
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = _parser()
    found = parser.parse_args(arguments)
    found.shape = found.shape.split(",")
    try:
        found.rows = rows_of(found.rows)
    except ValueError as error:
        parser.error(str(error))
    if unknown := [name for name in found.shape if name not in ("cluster", "single")]:
        parser.error(f"unknown shapes: {', '.join(unknown)}; there are cluster and single")
    if found.runs < 1 or found.scale <= 0 or (found.flat is not None and found.flat < 1):
        parser.error("--runs, --scale and --flat are above 0")
    if found.endpoint and not (found.access and found.secret):
        parser.error("--endpoint wants --access and --secret")
    if found.https and (found.shape != ["single"] or found.endpoint):
        parser.error("--https wants --shape single")
    if missing := [
        str(path) for path in (found.minio, found.garage) if path is not None and not os.access(path, os.X_OK)
    ]:
        parser.error(f"not an executable file: {', '.join(missing)}")
    if found.peer:
        seaweedfs_binary()
    return found


def servers_of(wanted: argparse.Namespace) -> list[Make]:
    """How to make each server to measure."""
    if wanted.endpoint:
        makes: list[Make] = [lambda: endpoint(wanted.endpoint, wanted.access, wanted.secret, wanted.region)]
    else:
        makes = (
            [lambda: storaged_cluster(wanted.dir, tree=TREE, workers=wanted.workers)]
            if "cluster" in wanted.shape
            else []
        )
        single = functools.partial(storaged_single, wanted.dir, tree=TREE, https=wanted.https)
        makes += [single] if "single" in wanted.shape else []
    if wanted.peer:
        makes += [lambda: seaweedfs_durable(wanted.dir), lambda: seaweedfs_default(wanted.dir)]
    makes += [lambda: minio(wanted.minio.resolve(), wanted.dir)] if wanted.minio else []
    makes += [lambda: garage(wanted.garage.resolve(), wanted.dir)] if wanted.garage else []
    return makes


def one_server(make: Make, wanted: argparse.Namespace, found: dict[str, list[Result]]) -> bool:
    """Starts a server, measures it, stops it. Adds results to ``found``. Returns False when something failed."""
    failed: list[str] = []

    def note(name: str, result: Result) -> None:
        print(line(name, result), flush=True)
        found.setdefault(name, []).append(result)
        if result.errors:
            failed.append(result.first_error)

    with make() as server:
        try:
            if wanted.flat is not None:
                work = flat(
                    server,
                    wanted.flat,
                    wanted.scale,
                    lambda result: note(server.name, result),
                    functools.partial(print, flush=True),
                    silence_s_max=wanted.silence,
                    seconds_max=wanted.flat_s,
                )
                print("\n" + flat_markdown(uvloop.run(work)))
            else:
                uvloop.run(
                    measure(
                        server,
                        wanted.rows,
                        wanted.scale,
                        lambda result: note(server.name, result),
                        silence_s_max=wanted.silence,
                    )
                )
        except (WrongAnswer, OSError) as error:
            print(f"{server.name}: {error}", file=sys.stderr)
            failed.append(str(error))
    return not failed


def main(arguments: list[str] | None = None) -> int:
    wanted = parse(arguments)
    keep_memory()
    end_on_sigterm()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= CONNECTIONS_MAX > soft:  # --flat opens a thousand connections
        resource.setrlimit(resource.RLIMIT_NOFILE, (CONNECTIONS_MAX, hard))
    found: dict[str, list[Result]] = {}
    load, fine = os.getloadavg()[0], True
    try:
        for _ in range(wanted.runs):
            for make in servers_of(wanted):
                fine = one_server(make, wanted, found) and fine
    except ValueError as error:
        print(f"benches: {error}", file=sys.stderr)
        return 1
    if wanted.flat is None and found:
        summaries = [
            summarize(name, [result for result in results if result.row == row])
            for name, results in found.items()
            for row in dict.fromkeys(result.row for result in results)
        ]
        print(
            f"\n{os.cpu_count()} cores shared by servers and load; load average {load:.1f} before,"
            f" {os.getloadavg()[0]:.1f} after\n"
        )
        print(markdown(summaries))
        if wanted.json:
            wanted.json.write_text(json.dumps([summary.as_dict() for summary in summaries], indent=1) + "\n")
    elif wanted.json:
        listed = [{"server": name, **_plain(result)} for name, results in found.items() for result in results]
        wanted.json.write_text(json.dumps(listed, indent=1) + "\n")
    if not fine:
        print("benches: operations failed; see above", file=sys.stderr)
    return 0 if fine else 1


def _plain(result: Result) -> dict[str, object]:
    return {
        **vars(result),
        "per_second": round(result.per_second, 1),
        "cpu_us_per_operation": round(result.cpu_us_per_operation, 1),
    }


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
