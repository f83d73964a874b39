"""Runs ``storaged COMMAND`` for the tests of whole clusters, each in a process of its own.

Theory of operation. The tests give hundreds of commands and start hundreds of nodes. A Python that starts and imports
them needs most of the processor's time for a command, and more than half of it for the start of a node. So one process,
``python -m tests.commands``, imports the command line once, and forks for each command. It imports a node when the
first one is asked for. The child takes the command's environment, directory and output, and calls ``main`` as the
console script does. A second fork waits for it, and reports its pid and then its exit code.

Nodes end with this process (``--parent``), and so with the tests.

``storaged.cli.fork_server`` looks alike, and shares nothing with it: that one starts only nodes, and reports all of
them over one socket to one event loop. Here threads wait for commands, each of which has an output, a directory and an
environment of its own.

The console script itself is started by the tests of the guides (``test_readme``, ``test_guide``), and for each trial
cluster.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from storaged.node.process import end_with

ROOT = Path(__file__).resolve().parents[1]
REQUEST_BYTES_MAX = 1 << 18
IMPORTED_INSIDE_FUNCTIONS = (
    "storaged.cli.create",
    "storaged.cli.planning",
    "storaged.cli.signing",
    "storaged.cli.succeeding",
    "storaged.cli.supervisor",
    "storaged.cluster.issuing",
    "storaged.cluster.tickets",
    "storaged.keys",
)
"""Of modules that many commands need, those that importing all commands does not import."""
NODE = ("storaged.node.daemon", "storaged.node.gateway")
"""What ``storaged run`` imports."""


# --- in the process of the tests


class Commands:
    """The process that forks. Threads may share one."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.commands", str(other.fileno())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
            )

    def close(self) -> None:
        self._socket.close()
        self._process.wait()

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Waits for the end of ``storaged ARGUMENTS``. Kills it and raises TimeoutExpired after ``timeout_s``."""
        end = time.monotonic() + timeout_s
        output, errors = os.memfd_create("stdout"), os.memfd_create("stderr")
        reports = -1
        try:
            reports = self._ask(arguments, environment, output, errors)
            pid = _number_from(reports)
            if not select_readable(reports, end - time.monotonic()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(["storaged", *arguments], timeout_s, _text_of(output), _text_of(errors))
            code = _number_from(reports)
            return subprocess.CompletedProcess(["storaged", *arguments], code, _text_of(output), _text_of(errors))
        finally:
            for descriptor in (reports, output, errors):
                if descriptor >= 0:
                    os.close(descriptor)

    def start(self, config: Path, environment: Mapping[str, str], log: int) -> Running:
        """Starts ``storaged run CONFIG`` in a session of its own, with its output in ``log``."""
        return Running(self._ask(["run", str(config)], environment, log, log, node=True))

    def _ask(
        self, arguments: Sequence[str], environment: Mapping[str, str], output: int, errors: int, *, node: bool = False
    ) -> int:
        """Sends a request. Returns the pipe that brings the pid and the exit code."""
        request = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "directory": os.getcwd(),
            "node": node,
        }
        reports, writer = os.pipe()
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [output, errors, writer])
        finally:
            os.close(writer)
        return reports


class Running:
    """A process that ``Commands.start`` started, with the methods of ``subprocess.Popen``. Threads may share one."""

    def __init__(self, reports: int) -> None:
        """``reports``: the pipe that brings the pid and the exit code."""
        self._reports = reports
        self._reading = threading.Lock()
        self.pid = _number_from(reports)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        with self._reading:
            if self.returncode is None and select_readable(self._reports, 0):
                self.returncode = _number_from(self._reports)
                os.close(self._reports)
            return self.returncode

    def wait(self, timeout_s: float) -> int:
        """Raises TimeoutExpired."""
        if self.returncode is None:
            select_readable(self._reports, timeout_s)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(["storaged", "run"], timeout_s)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """No-op for a process that has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def commands() -> Commands:
    """The one of this process. It ends with this process."""
    found = Commands()
    atexit.register(found.close)
    return found


def select_readable(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _number_from(pipe: int) -> int:
    """The next line. The waiting process writes a line with one system call, and the second one after the first."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(pipe, 1)
        assert piece, "the process of a command, or the one that forks, has ended by itself"
        line += piece
    return int(line)


def _text_of(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode()


# --- in the process that forks


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    _import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # this process waits for none of those that wait for commands
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the tests, which end this process
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, REQUEST_BYTES_MAX, 3)
        if not data:
            return
        request = json.loads(data)
        if request["node"]:
            _import_and_keep(NODE)
        own = os.getpid()
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if request["node"]:
                end_with(own, signal.SIGTERM)
            else:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            _wait_for_one(request, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _import_all() -> None:
    from storaged.cli.main import COMMANDS

    sys.modules.setdefault("rich", None)  # type: ignore[arg-type]  # as the command line does it
    _import_and_keep([*(place.partition(":")[0] for place, _ in COMMANDS.values()), *IMPORTED_INSIDE_FUNCTIONS])


def _import_and_keep(names: Sequence[str]) -> None:
    """Imports modules. The garbage collector does not look at them again, so that children share their memory."""
    if all(name in sys.modules for name in names):
        return
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _wait_for_one(request: dict[str, Any], output: int, errors: int, reports: int) -> NoReturn:
    own = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(reports)
        if request["node"]:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setsid()  # as units have: Linux divides a busy machine between sessions, so none starves
            request["arguments"] += ["--parent", str(own)]
        _run(request, output, errors)
    for descriptor in (output, errors):
        os.close(descriptor)
    with suppress(BrokenPipeError):
        os.write(reports, b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(reports, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _run(request: dict[str, Any], output: int, errors: int) -> NoReturn:
    """As the console script does it."""
    from storaged.cli.main import main as storaged

    code: Any = 1
    try:
        os.dup2(output, 1)
        os.dup2(errors, 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", errors="backslashreplace")  # noqa: SIM115
        os.chdir(request["directory"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = ["storaged", *request["arguments"]]
        try:
            storaged()
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    main()
