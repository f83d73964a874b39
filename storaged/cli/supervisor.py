"""The process above a trial cluster's nodes: starts them, reports deaths, obeys ``storaged dev stop|kill|start``.

Theory of operation. Each node is ``storaged run CONFIG`` in a process group of its own, so that Ctrl-C reaches this
process alone. The fork server starts it, and ends with this process; the node ends with the fork server (prctl
PR_SET_PDEATHSIG). It reports READY=1 over a datagram socket of the sd_notify protocol that only this process knows. A
node that dies is reported and stays down: the cluster is there to try such failures. Control is one JSON line each way
over ``DIR/dev.sock``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from storaged.admin.place import bind_private, lock_directory, short_path
from storaged.cli.fork_server import Forked, ForkServer
from storaged.cli.target import NodeName, command_for, nodes_of, resolve
from storaged.errors import OperatorError, StoragedError

CONTROL_NAME = "dev.sock"
READY_TIMEOUT_S = 120.0
"""A guard. Four processes that start at once on a machine that is busy with others have needed more than 30 s."""
STOP_TIMEOUT_S = 40.0
LOG_BYTES_MAX = 32 * 1024 * 1024
REQUEST_BYTES_MAX = 4096

STORAGE_NICE = 10
"""The nice value of storage nodes, relative to the gateway.

All nodes share one machine and one session here, and all storage nodes wait for the gateway. Without it two busy
storage nodes hold both cores of a small machine while the gateway has their next requests; when the gateway has run,
they have no work. Three of them together keep a quarter of a core (sched(7)). Towards other sessions Linux weighs the
whole cluster as one program (autogroup). On a server ``CPUWeight`` of the gateway's unit does this.
"""


ENDING_S = 0.2
"""The supervisor knows within this time that a process which was killed has ended."""


class NodeProcess:
    """One node's process. ``state``: stopped, starting, ready, dead (it ended by itself)."""

    def __init__(self, node: NodeName, directory: Path, fork_server: ForkServer) -> None:
        self.node = node
        self.directory = directory
        self.state = "stopped"
        self.process: Forked | None = None
        self.ready = asyncio.Event()
        self._fork_server = fork_server
        self._notify: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    async def start(self) -> None:
        """Starts the process. ``ready`` is set when the process reports so, or ends. Raises OperatorError."""
        loop = asyncio.get_running_loop()
        name = f"storaged-{secrets.token_hex(8)}"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._notify.bind("\0" + name)
        loop.add_reader(self._notify, self._on_notify)
        self.ready.clear()
        self.state = "starting"
        log_path = self.directory / "log"
        try:
            if log_path.exists() and log_path.stat().st_size > LOG_BYTES_MAX:
                log_path.replace(self.directory / "log.1")
            with append_private(log_path) as log:
                self.process = await self._fork_server.start(
                    ["run", str(self.directory / "config.toml")], {"NOTIFY_SOCKET": "@" + name}, log.fileno()
                )
        except OSError as error:
            self.state = "dead"
            self._end_notify()
            raise OperatorError(f"{self.node.name} can't be started: {error.strerror or error}") from error

    def _on_notify(self) -> None:
        assert self._notify is not None
        with contextlib.suppress(BlockingIOError):
            if b"READY=1" in self._notify.recv(4096).split(b"\n") and self.state == "starting":
                self.state = "ready"
                if self.process is not None and "gateway" not in self.node.roles:
                    _give_way(self.process.pid)
                self.ready.set()

    async def ended(self) -> int:
        """Waits for the end of the process; its exit code, negative for a signal."""
        assert self.process is not None
        code = await self.process.wait()
        self._end_notify()
        self.process = None
        self.ready.set()
        return code

    def _end_notify(self) -> None:
        if self._notify is not None:
            asyncio.get_running_loop().remove_reader(self._notify)
            self._notify.close()
            self._notify = None

    def last_words(self, count: int = 3) -> str:
        """The end of its log."""
        try:
            with (self.directory / "log").open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
                return "\n".join(log.read().decode(errors="replace").splitlines()[-count:])
        except OSError:
            return ""


def append_private(path: Path) -> BinaryIO:
    """Opens a file for appending that only its owner may read: logs name objects and users. Raises OSError."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")


def _give_way(pid: int) -> None:
    """Makes all threads of a process nice. Linux keeps a nice value for each thread; a new one inherits its maker's.

    Called when the process is ready: nice from its start it comes up after the gateway, which then waits a second
    before it looks for it again.
    """
    nice = os.getpriority(os.PRIO_PROCESS, 0) + STORAGE_NICE
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, int(thread), nice)


class Supervisor:
    """``async with Supervisor(...)``: the nodes run inside the block. ``say`` gets one line for each event."""

    def __init__(
        self, directory: Path, dev: dict[str, Any], fork_server: ForkServer, say: Callable[[str], None]
    ) -> None:
        self.directory = directory
        self.nodes = {node.name: NodeProcess(node, directory / node.name, fork_server) for node in nodes_of(dev)}
        self.stopping = asyncio.Event()
        self._started: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._say = say
        self._fork_server = fork_server
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None
        self._lock = -1

    async def __aenter__(self) -> Supervisor:
        self._lock = lock_directory(self.directory)
        try:
            control = bind_private(self.directory / CONTROL_NAME)
            self._server = await asyncio.start_unix_server(self._serve, sock=control, limit=REQUEST_BYTES_MAX)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.add_signal_handler(number, self.stopping.set)
        except BaseException:
            os.close(self._lock)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        if not self._started.done():
            self._started.set_result(False)
        try:
            for role in ("gateway", "storage"):
                await self.stop([name for name, node in self.nodes.items() if role in node.node.roles])
        finally:
            for watcher in self._watchers.values():
                watcher.cancel()
            await asyncio.gather(*self._watchers.values(), return_exceptions=True)
            self._fork_server.close()
            (self.directory / CONTROL_NAME).unlink(missing_ok=True)
            os.close(self._lock)

    def note_ready(self) -> None:
        """The cluster can be used: ``storaged dev --detach`` waits for it."""
        if not self._started.done():
            self._started.set_result(True)

    async def start(self, names: Sequence[str]) -> None:
        """Starts the nodes that do not run and waits until they are ready.

        Raises OperatorError with the end of the log of a node that does not get ready.
        """
        for name in names:
            node = self.nodes[name]
            if node.process is not None and name in self._watchers:
                await asyncio.wait((self._watchers[name],), timeout=ENDING_S)
            if node.process is None:
                if watcher := self._watchers.pop(name, None):
                    await watcher
                await node.start()
                self._watchers[name] = asyncio.create_task(self._watch(node))
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                for name in names:
                    await self.nodes[name].ready.wait()
        except TimeoutError:
            late = ", ".join(name for name in names if not self.nodes[name].ready.is_set())
            raise OperatorError(
                f"{late}: not ready after {READY_TIMEOUT_S:.0f} s; see its log in {self.directory}"
            ) from None
        for name in names:
            if self.nodes[name].state != "ready":
                raise OperatorError(f"{name} did not start:\n{self.nodes[name].last_words()}")

    async def _watch(self, node: NodeProcess) -> None:
        code = await node.ended()
        if node.state in ("ready", "starting"):
            was_ready = node.state == "ready"
            node.state = "dead"
            if was_ready:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                again = f"{command_for(self.directory)} dev start {node.node.name}"
                self._say(f"{node.node.name} {how}; its log is {node.directory / 'log'}; start it with: {again}")

    async def stop(self, names: Sequence[str]) -> None:
        """SIGTERM, so that requests in flight are finished; SIGKILL for one that has not ended after STOP_TIMEOUT_S."""
        await self._end(names, signal.SIGTERM)

    async def kill(self, names: Sequence[str]) -> None:
        """SIGKILL, as a power failure of the machine would."""
        await self._end(names, signal.SIGKILL)

    async def _end(self, names: Sequence[str], number: signal.Signals) -> None:
        for name in names:
            node = self.nodes[name]
            if node.process is not None:
                node.state = "stopped"
                node.process.send_signal(number)
        watchers = [self._watchers[name] for name in names if name in self._watchers]
        if not watchers:
            return
        _, late = await asyncio.wait(watchers, timeout=STOP_TIMEOUT_S)
        for name in names:
            process = self.nodes[name].process
            if late and process is not None:
                self._say(f"{name} did not end within {STOP_TIMEOUT_S:.0f} s and is killed")
                process.kill()
        if late:
            await asyncio.wait(late)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await self._obey(json.loads(await reader.readline() or b"{}"))
        except StoragedError as error:
            answer = {"code": error.code, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        except ValueError as error:
            answer = {"code": "OPERATOR_ERROR", "message": f"not a request: {error}", "hint": "", "exit_code": 1}
        with contextlib.suppress(ConnectionError):
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    async def _obey(self, request: dict[str, Any]) -> dict[str, Any]:
        action, name = str(request.get("do")), str(request.get("name") or "")
        if action == "shutdown":
            self.stopping.set()
        elif action == "wait":
            if not await asyncio.shield(self._started):
                raise OperatorError("the cluster did not start")
        elif action in ("start", "stop", "kill"):
            chosen = [node.name for node in resolve(name, [node.node for node in self.nodes.values()])]
            await {"start": self.start, "stop": self.stop, "kill": self.kill}[action](chosen)
            return {"nodes": chosen}
        elif action != "nodes":
            raise OperatorError(f"there is no action {action!r}")
        return {"nodes": [{"name": name, "state": node.state, "pid": node.pid} for name, node in self.nodes.items()]}


def control(directory: Path, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Sends a request to the supervisor of ``directory`` and returns its answer.

    The answer to a refused request has ``code``, ``message``, ``hint``, ``exit_code``. Raises OSError when no
    supervisor listens.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, short_path(directory / CONTROL_NAME) as name:
        connection.settimeout(timeout_s)
        connection.connect(name)
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as answers:
            found: dict[str, Any] = json.loads(answers.readline() or b"{}")
            return found
