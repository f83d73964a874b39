"""``python -m benches.waterfall``: one PUT and one GET, small and large, drawn from the gateway's spans.

The servers run with the spans that an operator can turn on (STORAGED_SPANS, see deploy/README.md). Each kind of request
runs several times, alone; the one with the median duration is drawn. A line is one kind of work, from its first span to
its last: ``#`` where it ran, ``.`` where it waited.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import uvloop

from benches import rows
from benches.rows import KIB, MIB, Bodies
from benches.s3client import WrongAnswer
from benches.servers import Server, end_on_sigterm, storaged_cluster, storaged_single

WIDTH = 64
Spans = Sequence[tuple[str, int, int]]


def bars(spans: Spans, total_us: int, width: int = WIDTH) -> list[tuple[str, str, int, int]]:
    """(name, bar, busy microseconds, spans) of each kind of work, in the order of their starts. Overlapping spans of
    one kind count once.
    """
    by_name: dict[str, list[tuple[int, int]]] = {}
    for name, start, end in sorted(spans, key=lambda span: (span[1], span[2])):
        by_name.setdefault(name, []).append((start, end))
    lines = []
    for name, times in by_name.items():
        cells = [" "] * width
        first, last = times[0][0], max(end for _, end in times)
        scale = width / max(total_us, 1)
        for cell in range(int(first * scale), min(width, int(last * scale) + 1)):
            cells[cell] = "."
        for start, end in times:
            for cell in range(int(start * scale), min(width, int(end * scale) + 1)):
                cells[cell] = "#"
        lines.append((name, "".join(cells), covered(times), len(times)))
    return lines


def covered(times: Iterable[tuple[int, int]]) -> int:
    """The time that the intervals cover together."""
    total, reached = 0, 0
    for start, end in sorted(times):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def draw(title: str, request: dict[str, Any]) -> str:
    """One request as text."""
    total = int(request["duration_us"])
    spans: Spans = [(str(name), int(start), int(end)) for name, start, end in request["spans"]]
    lines = [f"{title}: {total / 1000:.2f} ms"]
    for name, bar, busy, count in bars(spans, total):
        lines.append(
            f"  {name:8} |{bar}| {busy / 1000:8.2f} ms  {100 * busy / max(total, 1):3.0f}%"
            + (f"  in {count}" if count > 1 else "")
        )
    idle = total - covered((start, end) for _, start, end in spans)
    lines.append(f"  {'between':8} |{' ' * WIDTH}| {idle / 1000:8.2f} ms  {100 * idle / max(total, 1):3.0f}%")
    if request["left_out"]:
        lines.append(f"  {request['left_out']} later spans are left out")
    return "\n".join(lines) + "\n"


def lines_of(spans: Path, operation: str) -> list[dict[str, Any]]:
    """The records of all requests of one kind, in the order of their ends."""
    if not spans.exists():
        return []
    with spans.open() as file:
        return [request for request in map(json.loads, file) if request["operation"] == operation]


async def requests(server: Server, spans: Path, repeats: int, sizes: Sequence[int]) -> list[str]:
    """Makes the requests and draws them. Raises WrongAnswer when one fails."""
    bucket, target, drawn = "waterfall", server.target, []
    await rows.make_bucket(target, bucket)
    for size in sizes:
        bodies = Bodies(size)
        name = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
        for verb, operation, wanted in (
            ("PUT", rows.putting(target, bucket, f"{size}-", bodies, size), "PutObject"),
            ("GET", rows.getting(target, bucket, f"{size}-", bodies, repeats), "GetObject"),
        ):
            before = len(lines_of(spans, wanted))
            result = await rows.drive(verb, target, operation, in_flight=1, total=repeats, bytes_each=size)
            if result.errors:
                raise WrongAnswer(result.first_error)
            await asyncio.sleep(0.1)  # the last answer leaves a moment before its line is written
            found = lines_of(spans, wanted)[before:]
            found.sort(key=lambda request: request["duration_us"])
            if len(found) < repeats:
                raise WrongAnswer(f"{len(found)} requests of {repeats} left spans")
            drawn.append(draw(f"{verb} {name}, {server.name}", found[len(found) // 2]))
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benches.waterfall", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["cluster", "single"], default="cluster")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sizes", default=f"{4 * KIB},{64 * MIB}", help="bytes, comma separated")
    parser.add_argument("--dir", type=Path)
    wanted = parser.parse_args()
    sizes = [int(size) for size in wanted.sizes.split(",")]
    end_on_sigterm()
    make = storaged_cluster if wanted.shape == "cluster" else storaged_single
    with tempfile.TemporaryDirectory(prefix="storaged-spans-") as place:
        spans = Path(place) / "spans"
        with make(wanted.dir, spans=spans) as server:
            try:
                print("\n".join(uvloop.run(requests(server, spans, wanted.repeats, sizes))))
            except (WrongAnswer, OSError) as error:
                print(f"{server.name}: {error}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
