"""The process that forks a trial cluster's nodes.

Theory of operation. More than half of the work of starting a node is the start of Python and its imports. The four
nodes of a trial cluster import the same modules. So one process, ``python -m storaged.cli.fork_server``, imports them
once and forks for each node. It has one thread and no event loop, and imports nothing of the key plane. A child takes
its log and its environment, and goes on as the command ``storaged run``.

The supervisor and the fork server share a socket (SOCK_SEQPACKET). Each message is a JSON object:

    to the server     {"start": arguments, "environment": variables to add}, with a descriptor of the log
                      {"signal": number, "pid": pid}
    from the server   {"started": pid} or {"refused": errno}, in the order of the requests
                      {"ended": pid, "code": exit code}

When there is no memory or process left for one more node, that node does not start, and the others go on.

Only the server waits for its children and signals them. So no signal reaches a foreign process that got the pid of an
ended node. The server ends when the supervisor's end of the socket is closed, and its nodes end with it
(``storaged run --parent``).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MESSAGE_BYTES_MAX = 1 << 16
END_TIMEOUT_S = 10.0


# --- the supervisor's side


class Forked:
    """A process that the server forked."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self._server = server
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._descriptor = -1
        """Of the process itself (pidfd_open(2)), once its server has ended."""

    async def wait(self) -> int:
        """Waits for its end; its exit code, negative for a signal."""
        return await asyncio.shield(self._ended)

    def send_signal(self, number: signal.Signals) -> None:
        """No-op for a process that has ended."""
        if self._descriptor >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)
        elif not self._ended.done():
            self._server.send({"signal": int(number), "pid": self.pid})

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def note_end(self, code: int) -> None:
        if not self._ended.done():
            self._ended.set_result(code)

    def note_orphaned(self) -> None:
        """Watches the process itself: its server has ended, and reports no end any more. The process gets SIGTERM, and
        may finish requests before it ends.
        """
        try:
            self._descriptor = os.pidfd_open(self.pid)
        except OSError:  # it has ended
            self.note_end(-signal.SIGTERM)
            return
        asyncio.get_running_loop().add_reader(self._descriptor, self._on_end)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        self.note_end(-signal.SIGTERM)


class ForkServer:
    """The supervisor's end. A server that has ended is started again with the next node.

    Use: ``begin``, which needs no event loop, then ``start`` for each process, then ``close``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """``names``: arguments of the server's process, which say what it is for.

        A node's command line is written over them in memory (``_show``), so they must be at least as long.
        """
        self._names = names
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._starting: deque[asyncio.Future[Forked]] = deque()
        self._running: dict[int, Forked] = {}

    def begin(self) -> None:
        """Starts the server, which imports what nodes need while the caller goes on. Raises OSError."""
        own, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own.setblocking(False)
        with its:
            try:
                self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and module, no shell
                    [sys.executable, "-m", "storaged.cli.fork_server", str(its.fileno()), *self._names],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(its.fileno(),),
                    process_group=0,  # Ctrl-C reaches the supervisor alone
                )
            except BaseException:
                own.close()
                raise
        self._socket = own

    async def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: int) -> Forked:
        """Starts ``storaged ARGUMENTS --parent PID`` with its output in ``log``. Raises OSError."""
        loop = asyncio.get_running_loop()
        if self._socket is None:
            self.begin()
        assert self._socket is not None
        loop.add_reader(self._socket, self._on_message)  # repeating it does no harm; ``begin`` had no loop
        started: asyncio.Future[Forked] = loop.create_future()
        self.send({"start": list(arguments), "environment": dict(environment)}, log)
        self._starting.append(started)  # only now: a request that was not sent gets no answer
        return await started

    def send(self, message: Mapping[str, Any], *descriptors: int) -> None:
        if self._socket is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # ``_on_message`` notices it
                socket.send_fds(self._socket, [json.dumps(message).encode()], descriptors)

    def _on_message(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(MESSAGE_BYTES_MAX)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._forget()
            return
        message = json.loads(data)
        if "started" in message:
            forked = self._running[message["started"]] = Forked(self, message["started"])
            if (started := self._starting.popleft()).done():
                forked.kill()  # its caller was cancelled
            else:
                started.set_result(forked)
        elif "refused" in message:
            if not (started := self._starting.popleft()).done():
                started.set_exception(OSError(message["refused"], os.strerror(message["refused"])))
        else:
            self._running.pop(message["ended"]).note_end(message["code"])

    def _forget(self) -> None:
        """The server has ended, and its nodes end."""
        assert self._socket is not None
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self._socket = None
        for started in self._starting:
            if not started.done():
                started.set_exception(OSError("the process that starts nodes has ended"))
        self._starting.clear()
        for forked in self._running.values():
            forked.note_orphaned()
        self._running.clear()

    def close(self) -> None:
        """Ends the server, and the nodes that still run."""
        if self._socket is not None:
            self._forget()
        if self._process is not None:
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


# --- the server


def main() -> None:
    supervisor = socket.socket(fileno=int(sys.argv[1]))
    _import_node()
    if (arguments := _serve(supervisor)) is not None:
        from storaged.cli.main import main as storaged

        storaged(arguments)


def _import_node() -> None:
    """Imports what every node needs. A node that cannot import it says so in its own log."""
    sys.modules.setdefault("rich", None)  # type: ignore[arg-type]  # as the command line does it
    with contextlib.suppress(Exception):
        from storaged.cli.run import importing

        with importing():
            import storaged.node.daemon  # noqa: F401


def _serve(supervisor: socket.socket) -> list[str] | None:
    """Forks and waits for nodes. Returns None when the supervisor has ended, and in a child the arguments of
    ``storaged``.
    """
    wakes, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(supervisor, select.POLLIN)
    poll.register(wakes, select.POLLIN)
    children: set[int] = set()

    def tell(message: Mapping[str, int]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the next receive says that it has ended
            supervisor.send(json.dumps(message).encode())

    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if wakes in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wakes, 4096)
            while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                children.discard(ended[0])
                tell({"ended": ended[0], "code": os.waitstatus_to_exitcode(ended[1])})
        if supervisor.fileno() in ready:
            data, descriptors, _, _ = socket.recv_fds(supervisor, MESSAGE_BYTES_MAX, 1)
            if not data:
                return None
            message = json.loads(data)
            if "start" in message:
                own = os.getpid()
                try:
                    child = os.fork()
                except OSError as error:
                    os.close(*descriptors)
                    tell({"refused": error.errno or errno.EAGAIN})
                    continue
                if not child:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    supervisor.close()
                    os.close(wakes)
                    os.close(woken)
                    return _become_node(message, own, *descriptors)
                os.close(*descriptors)
                children.add(child)
                tell({"started": child})
            elif message["pid"] in children:
                os.kill(message["pid"], message["signal"])


def _become_node(message: Mapping[str, Any], parent: int, log: int) -> list[str]:
    os.setpgid(0, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.update(message["environment"])
    arguments = [*message["start"], "--parent", str(parent)]
    with contextlib.suppress(OSError, ValueError, IndexError):
        _show([sys.executable, "-m", "storaged", *arguments])
    sys.argv = ["storaged", *arguments]
    return arguments


def _show(command: Sequence[str]) -> None:
    """Makes this the process's command line for ps(1), as setproctitle(3) does: over the arguments in memory.

    ``arg_start`` and ``arg_end`` are fields 48 and 49 of /proc/self/stat (proc(5)).
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"".join(os.fsencode(word) + b"\0" for word in command)
    if 0 < len(text) <= end - start:
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    main()
