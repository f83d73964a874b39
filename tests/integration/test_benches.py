"""The load generator against a small server that lies: what failed is never counted as done."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from benches import bursts, compare, hops_probe, micro
from benches.compare import ratios, spread, table
from benches.measure import flat, measure
from benches.mixed import mixing, ranging, uploading
from benches.report import flat_markdown, markdown, summarize
from benches.rows import Bodies, Operation, Result, drive, getting, putting
from benches.s3client import Ask, Connection, Target, WrongAnswer, connect, signed_head
from benches.servers import Server, stop, storaged_cluster
from tests.patience import GUARD_S

ROOT = Path(__file__).parents[2]
SILENT_S = 60.0
"""How long a silent server says nothing."""
SILENCE_S = 2.0
"""Where silence is what is tested."""
SMALL = ("put-4k-1", "put-4k-64", "get-4k-64", "head-64", "list-1000-4")


class SmallServer:
    """Enough of S3 for the rows. ``lie`` spoils the answers to requests that ``about`` matches ("GET /b/k"); the others
    are honest.
    """

    def __init__(self, lie: str = "", about: str = "") -> None:
        self.lie = lie
        self.about = re.compile(about)
        self.objects: dict[str, bytes] = {}
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self.answer(reader, writer):
                await writer.drain()
        writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path = head.split(" ")[:2]
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        body = await reader.readexactly(int(length[1]) if length else 0)
        self.requests += 1
        lie = self.lie if self.about.search(f"{method} {path}") else ""
        if lie == "silence":
            await asyncio.sleep(SILENT_S)
        if lie == "hang-up":
            return False
        if lie == "noise":
            writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
            return True
        asked = re.search(r"range: bytes=(\d+)-(\d+)", head, re.IGNORECASE)
        status, answer = self.honest(method, path, body, keep=lie != "forgets")
        if asked is not None:
            status, answer = "206 Partial Content", answer[int(asked[1]) : int(asked[2]) + 1]
        if lie == "error":
            status, answer = "503 Slow Down", b"<Error><Code>SlowDown</Code></Error>"
        if lie == "flipped" and answer:
            answer = answer[:-1] + bytes([answer[-1] ^ 1])
        if lie == "short":
            answer = answer[:-1]
        if lie == "one-key-less":
            answer = answer.replace(b"<Key>", b"<Kex>", 1)
        if lie == "other-length":
            answer += b"x"
        if lie == "chunked":
            pieces = [answer[start : start + 1000] for start in range(0, len(answer), 1000)]
            coded = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
            writer.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + coded)
            return True
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Length: {len(answer)}\r\n\r\n".encode()
            + (b"" if method == "HEAD" else answer)
        )
        if lie == "too-much":
            writer.write(b"and more")
        return True

    def honest(self, method: str, path: str, body: bytes, *, keep: bool) -> tuple[str, bytes]:
        if method == "PUT":
            if keep:
                self.objects[path] = body
            return "200 OK", b""
        if method == "DELETE":
            self.objects.pop(path, None)
            return "204 No Content", b""
        if method == "POST":
            if path.endswith("?uploads="):
                return "200 OK", b"<UploadId>u-1</UploadId>"
            key = path.partition("?")[0]
            parts = [f"{key}?partNumber={part}&uploadId=u-1" for part in range(1, body.count(b"<Part>") + 1)]
            self.objects[key] = b"".join(self.objects.pop(part) for part in parts)
            return "200 OK", b"<CompleteMultipartUploadResult/>" if keep else b"<Error/>"
        if "?" in path:
            prefix, after = re.findall(r"(?:prefix|start-after)=([^&]*)", path)
            bucket = path.partition("?")[0] + "/"
            keys = sorted(key.removeprefix(bucket) for key in self.objects if key.startswith(bucket))
            page = [key for key in keys if key > after and key.startswith(prefix)][:1000]
            return "200 OK", b"".join(b"<Key>%s</Key>" % key.encode() for key in page)
        found = self.objects.get(path)
        return ("404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>") if found is None else ("200 OK", found)


@contextlib.asynccontextmanager
async def serving(lie: str = "", about: str = "") -> AsyncIterator[tuple[SmallServer, Target]]:
    small = SmallServer(lie, about)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(small.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield small, Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "a", "s")
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture(autouse=True)
def _nothing_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benches.measure.LATE_S", 0.001)


async def rows_of(target: Target, names: tuple[str, ...] = SMALL, *, silence_s_max: float = GUARD_S) -> list[Result]:
    return await measure(Server("small", target), names, 0.0001, lambda _result: None, silence_s_max=silence_s_max)


async def test_an_honest_server_passes_every_row_and_every_operation_is_counted() -> None:
    async with serving() as (_, target):
        results = await rows_of(target)
    assert [(result.row, result.operations, result.errors) for result in results] == [
        ("put-4k-64", 1100, 0),
        ("put-4k-1", 100, 0),
        ("get-4k-64", 2200, 0),
        ("head-64", 2200, 0),
        ("list-1000-4", 40, 0),
    ]
    assert all(0 < result.p50_ms <= result.p99_ms <= result.max_ms for result in results)


async def test_pages_between_writes_and_pages_in_order_are_checked_as_the_others_are() -> None:
    names = ("list-written-4", "list-first-4")
    async with serving() as (_, target):
        assert [(result.row, result.operations, result.errors) for result in await rows_of(target, names)] == [
            ("list-written-4", 80, 0),
            ("list-first-4", 4, 0),
        ]
    async with serving() as (small, target):
        small.lie, small.about = "one-key-less", re.compile("GET /.*list-type")
        for name in names:
            assert [
                (result.row, result.operations < 80 and result.errors > 0) for result in await rows_of(target, (name,))
            ] == [(name, True)]


async def test_mixes_ranges_and_uploads_are_checked_as_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benches.mixed.PART_BYTES", 4096)
    bodies = Bodies(10_000)
    async with serving() as (small, target):

        async def errors_of(operation: Operation) -> tuple[int, bool]:
            result = await drive("row", target, operation, in_flight=2, total=80, silence_s_max=GUARD_S)
            return result.operations, result.errors > 0

        assert await errors_of(putting(target, "b", "s-", bodies, 10_000)) == (80, False)
        mix = mixing(target, "b", "m-", "s-", bodies, 80, 10_000)
        assert await errors_of(mix) == (80, False)
        left = {path for path in small.objects if path.startswith("/b/m-")}
        assert len(left) == 12 - 2  # of the last of four cycles' deletes, each finds what the first cycle has put
        ranges = ranging(target, "b", "s-", bodies, 80, 10_000, 1000)
        assert await errors_of(ranges) == (80, False)
        uploads = uploading(target, "b", "u-", bodies, 10_000)
        assert await errors_of(uploads) == (80, False)
        assert small.objects["/b/u-00000079"] == bodies.of(79)
        for lie, about, operation in (
            ("flipped", "GET /b/s-", mix),
            ("flipped", "GET /b/s-", ranges),
            ("forgets", "POST /b/u-.*uploadId", uploads),
        ):
            small.lie, small.about = lie, re.compile(about)
            assert (await errors_of(operation))[1]


async def test_a_connection_rests_between_operations() -> None:
    async with serving() as (_, target):
        put = putting(target, "b", "k-", Bodies(10), 10)
        result = await drive("row", target, put, in_flight=1, total=3, pause_s=0.05, silence_s_max=GUARD_S)
    assert result.operations == 3
    assert result.seconds >= 0.1


async def test_what_servers_write_late_is_waited_for_by_whatever_wrote_it(monkeypatch: pytest.MonkeyPatch) -> None:
    late_s, sleep, told = 0.0123, asyncio.sleep, list[str]()

    async def noting(delay: float) -> None:
        if delay == late_s:
            told.append("late")
        await sleep(delay)

    monkeypatch.setattr("benches.measure.LATE_S", late_s)
    monkeypatch.setattr(asyncio, "sleep", noting)
    names = ("put-4k-1", "put-4k-64", "get-4k-64", "list-1000-4", "list-written-4")
    async with serving() as (_, target):
        await measure(Server("small", target), names, 0.0001, lambda result: told.append(result.row))
        assert told == ["late", "put-4k-64", "late", "put-4k-1", "get-4k-64", "list-1000-4", "late", "list-written-4"]
        told.clear()
        await flat(Server("small", target), 300, 0.0001, lambda result: told.append(result.row), lambda _line: None)
    rows = ["late", "put-4k-64", "get-4k-64", "head-64", "list-1000-4"]
    burdens = [["late", name] for name in ("fill-4k-64", "overwrite-4", "bucket-4")]
    assert told == ["late", *rows, *burdens[0], *rows, *burdens[1], *rows, *burdens[2], *rows, *rows]


async def test_a_chunked_answer_is_as_good_as_one_with_a_length() -> None:
    async with serving("chunked", "GET /") as (_, target):
        assert [result.errors for result in await rows_of(target, ("get-4k-64", "list-1000-4"))] == [0, 0]


@pytest.mark.parametrize(
    ("lie", "about", "row", "said"),
    [
        ("error", "PUT /.*/put-4k-64", "put-4k-64", "status 503"),
        ("error", "GET /.*/put-4k-64-0-00000219", "put-4k-64", "status 503"),
        ("forgets", "PUT /.*/put-4k-64", "put-4k-64", "status 404"),
        ("flipped", "GET /.*/put-4k-64-0-00000007", "get-4k-64", "not what was written"),
        ("short", "GET /.*/put-4k-64-0-00000007", "get-4k-64", "not what was written"),
        ("other-length", "GET /.*/put-4k-64-0-00000007", "get-4k-64", "not what was written"),
        ("too-much", "GET /.*/put-4k-64-0-00000007", "get-4k-64", ""),
        ("hang-up", "GET /.*/put-4k-64-0-00000007", "get-4k-64", "connection broke"),
        ("noise", "GET /.*/put-4k-64-0-00000007", "get-4k-64", "not HTTP"),
        ("silence", "GET /.*/put-4k-64-0-00000007", "get-4k-64", "no answer within"),
        ("other-length", "HEAD /", "head-64", "HEAD says 4097"),
    ],
)
async def test_a_lie_is_an_error_of_its_row_and_ends_the_run(lie: str, about: str, row: str, said: str) -> None:
    async with serving(lie, about) as (_, target):
        results = await rows_of(target, silence_s_max=SILENCE_S if lie == "silence" else GUARD_S)
    failed = results[-1]
    assert (failed.row, failed.errors > 0) == (row, True)
    assert said in failed.first_error
    assert failed.operations < 2200
    assert not any(result.errors for result in results[:-1])


async def test_a_page_with_a_key_missing_is_an_error() -> None:
    async with serving() as (small, target):
        await rows_of(target, ("put-4k-64",))
        small.lie, small.about = "one-key-less", re.compile("GET /.*list-type")
        results = await rows_of(target, ("list-1000-4",))
    assert (results[-1].row, results[-1].operations) == ("list-1000-4", 0)
    assert "999 keys" in results[-1].first_error


async def test_failed_operations_are_not_among_those_done() -> None:
    async with serving("error", "PUT /b/k0000000[13]") as (small, target):
        result = await drive(
            "row", target, putting(target, "b", "k", Bodies(100), 100), in_flight=3, total=10, bytes_each=100
        )
    assert (result.operations, result.errors, result.bytes, small.requests) == (8, 2, 800, 10)


async def test_a_server_that_answers_nothing_is_given_up_quickly() -> None:
    async with serving("silence", "") as (_, target):
        began = time.monotonic()
        with pytest.raises(WrongAnswer, match="no answer within"):
            await rows_of(target, silence_s_max=0.4)
        assert time.monotonic() - began < SILENT_S, "it has not waited for the answer"
        result = await drive(
            "row", target, getting(target, "b", "k", Bodies(9), 9), in_flight=64, total=1000, silence_s_max=0.2
        )
    assert (result.operations, 1 <= result.errors <= 128) == (0, True)


async def test_a_server_that_is_not_there_is_an_error_of_the_row() -> None:
    target = Target("http://127.0.0.1:1", "a", "s")
    result = await drive("row", target, getting(target, "b", "k", Bodies(9), 9), in_flight=2, total=10)
    assert (result.operations, result.errors) == (0, 1)
    assert "no connection" in result.first_error


async def test_bytes_after_an_answer_spoil_the_connection() -> None:
    async with serving("too-much", "") as (_, target):
        connection = await connect(target)
        with contextlib.suppress(WrongAnswer):
            await connection.request(signed_head(target, "PUT", "/b"))
        await asyncio.sleep(0.05)
        with pytest.raises(WrongAnswer):
            await connection.request(signed_head(target, "GET", "/b"))
        connection.close()


class Mute(asyncio.Transport):
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def write(self, data: bytes | bytearray | memoryview) -> None: ...

    def is_closing(self) -> bool:
        return False


@pytest.mark.parametrize("split", [1, 7, 1000])
def test_chunks_may_be_cut_anywhere(split: int) -> None:
    outcomes: list[WrongAnswer | None] = []
    connection = Connection()
    connection.connection_made(Mute())
    connection.begin(Ask(b"GET /b/k HTTP/1.1\r\n\r\n"), outcomes.append)
    coded = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding:"
        b" chunked\r\n\r\n4\r\nabcd\r\nA;x=y\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\n"
    )
    for start in range(0, len(coded), split):
        assert not outcomes
        connection.data_received(coded[start : start + split])
    assert (outcomes, bytes(connection.kept)) == ([None], b"abcd0123456789")


async def test_a_body_larger_than_the_socket_takes_at_once_arrives_whole() -> None:
    size = 9 << 20
    bodies = Bodies(size)
    async with serving() as (small, target):
        result = await drive(
            "row", target, putting(target, "b", "k", bodies, size), in_flight=2, total=4, bytes_each=size
        )
    assert (result.errors, result.operations, result.client_cpu_s > 0) == (0, 4, True)
    assert [small.objects[f"/b/k{number:08d}"] == bodies.of(number) for number in range(4)] == [True] * 4


async def run_command(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benches", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
    )
    told, _ = await process.communicate()
    return process.returncode or 0, told.decode()


async def test_the_command_says_what_failed_and_exits_1(tmp_path: Path) -> None:
    written = tmp_path / "results.json"
    common = ("--access", "a", "--secret", "s", "--scale", "0.0001", "--silence", "60", "--rows", "put-4k-64,get-4k-64")
    async with serving("flipped", "GET /") as (_, target):
        code, told = await run_command("--endpoint", target.endpoint, *common)
    assert (code, "ERRORS" in told, "not what was written" in told) == (1, True, True)
    async with serving() as (_, target):
        code, told = await run_command("--endpoint", target.endpoint, *common, "--runs", "2", "--json", str(written))
    assert (code, "ERRORS" in told) == (0, False)
    assert "| put-4k-64 |" in told
    assert '"runs": 2' in written.read_text()
    code, told = await run_command("--endpoint", "http://127.0.0.1:1", *common)
    assert (code, "refused" in told.lower() or "connect" in told.lower()) == (1, True)
    code, told = await run_command("--endpoint", "ftp://127.0.0.1:1", *common)
    assert (code, "http://HOST:PORT" in told) == (1, True)
    code, told = await run_command("--rows", "put-5k")
    assert (code, "unknown rows" in told) == (2, True)


async def test_flat_cost_repeats_the_rows_after_each_burden() -> None:
    async with serving() as (_, target):
        stages = await flat(Server("small", target), 300, 0.0001, lambda _result: None, lambda _line: None)
    assert [after for after, _ in stages] == [
        "empty",
        "300 more objects in the bucket",
        "1,000 overwrites of one key",
        "998 more buckets",
        "1,000 idle connections",
    ]
    assert not [result.first_error for _, results in stages for result in results if result.errors]
    assert flat_markdown(stages).count("\n") == 7
    async with serving("error", "PUT /.*/fill-00000200") as (_, target):
        stages = await flat(Server("small", target), 300, 0.0001, lambda _result: None, lambda _line: None)
    assert [after for after, _ in stages] == ["empty"]
    assert stages[0][1][-1].errors == 1


async def test_a_burden_that_takes_too_long_is_as_large_as_it_became_and_its_stage_says_so() -> None:
    said: list[str] = []
    async with serving() as (_, target):
        stages = await flat(
            Server("small", target), 1_000_000, 0.0001, lambda _result: None, said.append, seconds_max=0.5
        )
    assert not [result.first_error for _, results in stages for result in results if result.errors]
    filled = int(stages[1][0].split(" ")[0].replace(",", ""))
    assert 0 < filled < 1_000_000
    assert stages[0][1][-1].operations == filled
    assert any("fill-4k-64" in line and "of 1,000,000" in line for line in said)


def test_a_table_has_medians_and_tells_failed_rows_apart() -> None:
    runs = [
        Result(
            "row",
            operations=10,
            seconds=seconds,
            cpu_s={"n1": 0.001 * seconds},
            peak_bytes={"n1": int(seconds) << 20},
            own_bytes={"n1": int(seconds) << 19},
        )
        for seconds in (1.0, 2.0, 4.0)
    ]
    summary = summarize("server", runs)
    assert (summary.speed, summary.low, summary.high, summary.runs) == (5.0, 2.5, 10.0, 3)
    assert round(summary.cpu_us["n1"]) == 200
    assert (summary.peak_bytes["n1"], summary.own_bytes["n1"]) == (4 << 20, 2 << 20)
    broken = summarize(
        "server", [Result("other", operations=3, seconds=1.0, errors=1, first_error="other #1: status 500")]
    )
    assert (broken.runs, broken.speed, broken.errors) == (0, 0.0, 1)
    told = markdown([summary, broken])
    assert "| row | server | 5.0 /s | 2.5 to 10.0 |" in told
    assert "n1 2 (4)" in told
    assert "failed: other #1: status 500" in told


def test_a_server_that_does_not_come_up_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    tree, place = tmp_path / "tree", tmp_path / "place"
    (tree / "storaged").mkdir(parents=True)
    place.mkdir()
    (tree / "storaged" / "__init__.py").touch()
    pid_file = tmp_path / "pid"
    (tree / "storaged" / "__main__.py").write_text(
        f"import os, sys, time\nif sys.argv[1] == 'dev':\n    open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n   "
        " time.sleep(0.5)\n    sys.exit(3)\n"
    )
    with pytest.raises(SystemExit, match="did not become HEALTHY"), storaged_cluster(place, tree=tree):
        pass
    assert list(place.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_sigterm_while_a_server_starts_leaves_no_process_and_no_file_and_a_second_one_changes_nothing(
    tmp_path: Path,
) -> None:
    tree, place, pid_file = tmp_path / "tree", tmp_path / "place", tmp_path / "pid"
    (tree / "storaged").mkdir(parents=True)
    place.mkdir()
    (tree / "storaged" / "__init__.py").touch()
    (tree / "storaged" / "__main__.py").write_text(
        "import os, sys, time\n"
        "if sys.argv[1] != 'dev':\n    sys.exit(1)\n"
        f"with open({str(tmp_path / 'new')!r}, 'w') as file:\n    file.write(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'new')!r}, {str(pid_file)!r})\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.5)\n"
    )
    program = (
        "from pathlib import Path\nfrom benches.servers import end_on_sigterm, storaged_cluster\nend_on_sigterm()\n"
        f"with storaged_cluster(Path({str(place)!r}), tree=Path({str(tree)!r})):\n    pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while not pid_file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(GUARD_S) == 128 + signal.SIGTERM
    assert list(place.iterdir()) == []
    pid, ends = int(pid_file.read_text()), time.monotonic() + 10
    while not has_ended(pid):  # who is its parent now may wait for it a moment later
        assert time.monotonic() < ends
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_comparison_takes_the_ratio_of_each_pair_and_leaves_failed_runs_out() -> None:
    def run(seconds: float, cpu_s: float, errors: int = 0) -> Result:
        return Result("row", operations=100, seconds=seconds, cpu_s={"n1": cpu_s}, errors=errors)

    first, second = (
        [run(1.0, 1.0), run(2.0, 1.0), run(1.0, 1.0)],
        [run(0.5, 0.5), run(2.0, 0.8), run(9.0, 9.0, errors=1)],
    )
    speeds, cpu = ratios(first, second)
    assert (speeds, cpu) == ([2.0, 1.0], [0.5, 0.8])
    assert spread(speeds) == "1.50 (1.00 to 2.00)"
    told = table(("aaa", "bbb"), {"row": first, "gone": first}, {"row": second})
    assert "| 1.50 (1.00 to 2.00) | 0.65 (0.50 to 0.80) |" in told
    assert told.splitlines()[-1].endswith("| failed | failed | failed |")


def test_a_run_that_failed_half_way_does_not_shift_the_pairs_of_later_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter(
        (
            [Result("put-4k-1", operations=1)],
            [Result("put-4k-64", errors=1)],
            OSError("no bucket"),
            [Result("put-4k-1", operations=4)],
        )
    )

    async def measured(*_args: object) -> list[Result]:
        run = next(runs)
        if isinstance(run, OSError):
            raise run
        return run

    monkeypatch.setattr(compare, "measure", measured)
    found: dict[str, list[Result]] = {}
    server = contextlib.nullcontext(Server("some", Target("http://127.0.0.1:1", "a", "s")))
    assert [compare._one(server, ["put-4k-1"], 1.0, found) for _ in range(4)] == [True, False, False, True]
    assert [(result.operations, result.errors) for result in found["put-4k-1"]] == [(1, 0), (0, 1), (0, 1), (4, 0)]
    assert list(found) == ["put-4k-1"]


def test_the_interval_of_a_median_comes_from_the_order_of_the_values() -> None:
    assert bursts.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert bursts.interval([float(number) for number in range(1, 21)]) == (6.0, 15.0)
    assert bursts.interval([float(number) for number in range(1, 11)]) == (2.0, 9.0)


def test_rows_that_change_what_the_next_burst_finds_have_no_bursts() -> None:
    bursts.check(["put-4k-64", "get-64m-16", "list-1000-4"])
    for name in ("mix-64k-16", "hot-64", "get-4k-64-degraded", "put-64k-idle"):
        with pytest.raises(ValueError, match=name):
            bursts.check([name])


async def test_bursts_take_turns_in_alternating_order_and_the_first_pair_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[str] = []

    async def opened(_side: bursts.Side, _rows: object) -> None:
        pass

    async def burst(side: bursts.Side, _row: object, count: int) -> bursts.Burst:
        name = side._server.name
        turns.append(name)
        return bursts.Burst(0.5, {"a": 1.0, "b": 0.9}[name], 0.1, count, 4096 * count)

    monkeypatch.setattr(bursts.Side, "open", opened)
    monkeypatch.setattr(bursts.Side, "burst", burst)
    servers = tuple(Server(name, Target("http://127.0.0.1:1", "a", "s")) for name in "ab")
    said: list[str] = []
    found = await bursts.measured((servers[0], servers[1]), ["put-4k-64"], pairs=3, scale=0.1, say=said.append)
    assert "".join(turns) == "baabbaab"
    assert [pair.first.operations for pair in found["put-4k-64"]] == [800] * 3
    assert "CPU 0.900 (0.900 to 0.900)" in said[0]
    assert bursts.table(("x", "y"), found).endswith("| 1.000 (1.000 to 1.000) | 0.900 (0.900 to 0.900) |")


def test_the_cpu_time_of_another_process_counts_threads_that_have_ended() -> None:
    code = (
        "import sys, threading, time\n"
        "def work():\n while time.thread_time() < 0.2: pass\n"
        "worker = threading.Thread(target=work)\nworker.start()\nworker.join()\n"
        "print('done', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert bursts.cpu_s(process.pid) >= 0.2
        process.communicate()


@pytest.mark.parametrize("name", micro.PATHS)
async def test_every_hot_path_can_be_taken_on_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``benches.micro`` does it, but once."""

    def once_us(work: Callable[[], object], **_: int) -> float:
        work()
        return 1.0

    async def wall_once_us(work: Callable[[], Awaitable[object]], _operations: int) -> float:
        await work()
        return 1.0

    monkeypatch.setattr(micro, "least_us", once_us)
    monkeypatch.setattr(micro, "wall_us", wall_once_us)
    path = micro.PATHS[name]
    found = await path() if inspect.iscoroutinefunction(path) else await asyncio.to_thread(path)
    assert found
    assert all(row.us > 0 and row.floor_us > 0 for row in found)


def test_a_worktree_of_a_revision_is_there_for_the_comparison_and_gone_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    git("init", "--quiet")
    for content in ("one", "two"):
        (tmp_path / "file").write_text(content)
        git("add", "file")
        git("commit", "--quiet", "-m", content)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    with compare.worktree("HEAD~1") as (commit, folder):
        assert (folder / "file").read_text() == "one"
        assert git("rev-parse", "HEAD~1").startswith(commit)
        (folder / "file").write_text("made dirty")
    assert not folder.exists()
    assert git("worktree", "list").count("\n") == 1
    with pytest.raises(SystemExit, match="nonsense"), compare.worktree("nonsense"):
        pass


def test_a_server_is_stopped_although_whoever_waits_for_its_end_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by SIGTERM while servers are being stopped: the others are stopped as well."""
    processes = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(3)]
    wait = subprocess.Popen.wait
    interrupted: list[int] = []

    def waiting(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not interrupted:
            interrupted.append(process.pid)
            raise SystemExit(143)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", waiting)
    stack = contextlib.ExitStack()
    for process in processes:
        stack.callback(stop, process)
    with pytest.raises(SystemExit):
        stack.close()
    assert interrupted == [processes[-1].pid]
    assert all(process.poll() is not None for process in processes)


FORKING = """
import os, time
from storaged.ids import new_disk_id
child = os.fork()
while True:
    time.sleep(0.01)
    if not child:
        new_disk_id()
"""


def test_the_probe_of_hops_counts_in_a_forked_process_too(tmp_path: Path) -> None:
    shutil.copy(hops_probe.__file__, tmp_path / "sitecustomize.py")
    own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    own.bind(str(tmp_path / "own"))
    own.settimeout(GUARD_S)
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        env=os.environ | {"HOPS_DIR": str(tmp_path), "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        ends = time.monotonic() + GUARD_S
        while len(listening := [path for path in tmp_path.iterdir() if path.name.isdigit()]) < 2:
            assert time.monotonic() < ends
            time.sleep(0.01)
        [forked] = [path for path in listening if int(path.name) != process.pid]
        calls: list[list[object]] = []
        own.sendto(b"start", str(forked))
        own.recv(1 << 16)
        while not calls and time.monotonic() < ends:
            time.sleep(0.1)
            own.sendto(b"stop", str(forked))
            calls = json.loads(own.recv(1 << 16))
            own.sendto(b"start", str(forked))
            own.recv(1 << 16)
        assert {module for _, module, _, _ in calls} == {"storaged.ids"}
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
        own.close()
    assert said == b""
