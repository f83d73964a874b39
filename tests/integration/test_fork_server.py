"""The fork server of a trial cluster: its processes are like those that are started one by one."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from storaged.cli.fork_server import Forked, ForkServer
from storaged.cli.supervisor import NodeProcess
from storaged.cli.target import NodeName
from storaged.errors import OperatorError
from tests.patience import GUARD_S

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nodes end with their parent by Linux's prctl")


@pytest.fixture
def waits(tmp_path: Path) -> Path:
    """A configuration that a node reads for ever: nothing writes to the pipe."""
    os.mkfifo(tmp_path / "config.toml")
    return tmp_path / "config.toml"


@pytest.fixture
async def server(waits: Path) -> AsyncIterator[ForkServer]:
    found = ForkServer([str(waits)] * 3)
    found.begin()
    yield found
    found.close()


async def started(server: ForkServer, config: Path, **environment: str) -> Forked:
    with (config.parent / "log").open("ab") as log:
        return await server.start(["run", str(config)], environment, log.fileno())


def begun_as(script: str, waits: Path, monkeypatch: pytest.MonkeyPatch) -> ForkServer:
    """A fork server that runs ``script`` in place of its own module."""
    own, interpreter = waits.parent / "fork_server.py", waits.parent / "python"
    own.write_text(script)
    interpreter.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {own} "$@"\n')
    interpreter.chmod(0o755)
    found = ForkServer([str(waits)] * 3)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(interpreter))
        found.begin()
    return found


def words_of(pid: int, name: str) -> list[str]:
    return Path(f"/proc/{pid}/{name}").read_text().rstrip("\0").split("\0")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(GUARD_S):
        while not condition():  # noqa: ASYNC110  (processes, which set no event)
            await asyncio.sleep(0.01)


async def test_a_process_list_shows_each_node_as_if_it_had_been_started_alone(server: ForkServer, waits: Path) -> None:
    forked = await started(server, waits)
    parent = int(words_of(forked.pid, "stat")[0].rpartition(")")[2].split()[1])
    await until(lambda: "run" in words_of(forked.pid, "cmdline"))
    command = [sys.executable, "-m", "storaged", "run", str(waits), "--parent", str(parent)]
    assert words_of(forked.pid, "cmdline") == command
    assert os.getpgid(forked.pid) == forked.pid
    assert os.getsid(forked.pid) == os.getsid(0)


async def test_a_node_that_cannot_start_says_why_in_its_own_log_and_the_next_one_starts(
    server: ForkServer, waits: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad" / "config.toml"
    bad.parent.mkdir()
    bad.write_text("[node]\n")
    assert await (await started(server, bad)).wait() == 1
    assert "storaged explain" in (bad.parent / "log").read_text()
    forked = await started(server, waits)
    forked.kill()
    assert await forked.wait() == -signal.SIGKILL
    forked.kill()
    assert (waits.parent / "log").read_text() == ""


async def test_nodes_end_with_the_fork_server_and_the_next_one_starts_another(server: ForkServer, waits: Path) -> None:
    nodes = [await started(server, waits) for _ in range(2)]
    await until(lambda: all("run" in words_of(node.pid, "cmdline") for node in nodes))
    os.kill(int(words_of(nodes[0].pid, "cmdline")[-1]), signal.SIGKILL)
    assert [await node.wait() for node in nodes] == [-signal.SIGTERM] * 2
    await until(lambda: not any(Path(f"/proc/{node.pid}/exe").exists() for node in nodes))
    again = await started(server, waits)
    await until(lambda: "run" in words_of(again.pid, "cmdline"))
    server.close()
    assert await again.wait() == -signal.SIGTERM
    await until(lambda: not Path(f"/proc/{again.pid}/exe").exists())


PATIENT = """
import signal
from storaged.cli import fork_server

signal.signal(signal.SIGTERM, signal.SIG_IGN)
fork_server.main()
"""
"""A fork server whose nodes do not end for SIGTERM, as one that has long requests to finish."""


async def test_a_node_whose_fork_server_was_killed_counts_as_ended_only_when_it_has(
    waits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = begun_as(PATIENT, waits, monkeypatch)
    writers: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):  # no node reads it yet
            writers.append(os.open(waits, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    try:
        node = await started(server, waits)
        await until(is_read)
        os.kill(int(words_of(node.pid, "cmdline")[-1]), signal.SIGKILL)
        await until(lambda: server._socket is None)
        ended = asyncio.ensure_future(node.wait())
        await started(server, waits)
        assert not ended.done()
        node.kill()
        async with asyncio.timeout(GUARD_S):
            await ended
        await until(lambda: not Path(f"/proc/{node.pid}/exe").exists())
    finally:
        server.close()
        for writer in writers:
            os.close(writer)


LACKING = """
import errno, os
from storaged.cli import fork_server

fork, forks = os.fork, 0

def fork_once_too_often():
    global forks
    forks += 1
    if forks == 2:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    return fork()

os.fork = fork_once_too_often
fork_server.main()
"""
"""A fork server that finds no room for its second process."""


@pytest.fixture
async def lacking(waits: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ForkServer]:
    found = begun_as(LACKING, waits, monkeypatch)
    yield found
    found.close()


async def test_where_there_is_no_room_for_one_more_process_the_others_go_on(lacking: ForkServer, waits: Path) -> None:
    first = await started(lacking, waits)
    with pytest.raises(OSError, match="temporarily unavailable"):
        await started(lacking, waits)
    third = await started(lacking, waits)
    assert third.pid != first.pid
    first.kill()
    assert await first.wait() == -signal.SIGKILL, "it had not ended before"


async def test_a_start_that_could_not_be_sent_takes_no_answer_of_another_one(
    server: ForkServer, waits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "the server does not read")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "send_fds", full)
        with pytest.raises(BlockingIOError):
            await started(server, waits)
    async with asyncio.timeout(GUARD_S):
        assert (await started(server, waits)).pid > 0


async def test_a_node_whose_start_was_refused_can_be_started_again(lacking: ForkServer, waits: Path) -> None:
    await started(lacking, waits)
    node = NodeProcess(NodeName("n", "FR/par1/a", ("storage",)), waits.parent, lacking)
    with pytest.raises(OperatorError, match="n can't be started: Resource temporarily unavailable"):
        await node.start()
    assert (node.state, node.pid) == ("dead", None)
    await node.start()
    assert node.process is not None
    node.process.kill()
    assert await node.ended() == -signal.SIGKILL
