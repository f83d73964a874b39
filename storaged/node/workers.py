"""Several processes behind one S3 port: the first one's side.

Theory of operation. A gateway with ``[s3] workers = N`` is N processes of one node. The first holds the node's lock,
the port, the admin API and the audit log, and
does what is done once a node (housekeeping, the layout's register, status); it serves requests as the others do. It
starts the others
(``storaged run CONFIG --worker NUMBER``), each a gateway of its own over the ring: own connections, caches and keys in
memory, and an incarnation of its own, so that
no two ballots are alike. To the cluster's membership they are one node, under the first one's pid and incarnation.

The first accepts every client and hands the connections out in turn (SCM_RIGHTS). Sockets that share a port by
SO_REUSEPORT are chosen by a hash: of four connections
all four go to one of two processes every eighth time, and those that wait in the queue of a process that dies are
reset. With one listening socket that
all inherit, a burst of connections is taken by whoever wakes first, all 64 of them now and then. A hand-over costs some
16 us, once a connection.

A worker that dies takes its requests in flight with it; the others go on, and it is started again. A connection that it
was handed and had not taken yet
(it answers each with a byte) is handed to another, as is one for which it has no descriptor left. When the first dies
the kernel ends the others
(PR_SET_PDEATHSIG), and the service manager starts all anew.

Each worker has two sockets to the first: ``door``, which brings connections, and ``talk``, JSON lines:

    to the worker     {"do": "hello", pid, incarnation}   {"do": "metrics"}   {"do": "reload"}   {"do": "forget", id,
    kind, key}   {"do": "done", id, error}
    from the worker   {"tell": "ready"}   {"tell": "metrics", samples}   {"tell": "forgotten", id}   {"tell": "note",
    kind, fields}
                      {"tell": "audit", id, kind, fields}, {"tell": "forget", id, kind, key}: answered by ``done``
                      {"tell": "keys", id, what, buckets, ...}: of the gateway's copies of bucket keys; answered by
                      ``done`` with an ``answer``

What processes remember of buckets and users for a moment is forgotten by all of them before the one that changed it
answers (``forget``): to a client of the port
they are one gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import structlog

from storaged.errors import OperatorError, StoragedError
from storaged.observe import Metrics, Samples, counts_of
from storaged.s3.http.listen import listen

LINE_BYTES_MAX = 4 * 1024 * 1024
READY_TIMEOUT_S = 30.0
ENDING_S = 10.0
"""On top of the time that requests in flight are given."""

RESTART_FIRST_S, RESTART_MAX_S = 0.2, 10.0
METRICS_TIMEOUT_S = 1.0
METRICS_EVERY_S = 10.0
"""What a worker counted since the last look is lost when it is killed."""

HANGS_S = 30.0
"""A worker that has said nothing for so long, although it was asked, hangs, and is killed: what WatchdogSec= is for the
first process.
"""

ACCEPTED_AT_ONCE_MAX = 64
TOLD_AT_ONCE_MAX = 4096
TAKEN, NOT_TAKEN = b"tn"
"""A worker's answers to a connection: it serves it; it could not receive it (it has no descriptor left)."""

REFUSED_PAUSE_S = 1.0
"""When there are no descriptors left, accepting again at once would fail again."""

log = structlog.get_logger("workers")

Adopt = Callable[[socket.socket], Coroutine[Any, Any, None]]


def encode_samples(samples: Samples) -> list[Any]:
    return [[name, labels, value] for (name, labels), value in samples.items()]


def decode_samples(told: list[Any]) -> Samples:
    return {(name, tuple((key, text) for key, text in labels)): value for name, labels, value in told}


class Worker:
    """One further process, as often as it is started. ``number`` counts from 2: the first process
    is the first worker.
    """

    def __init__(
        self,
        number: int,
        command: list[str],
        hello: Mapping[str, Any],
        hear: Callable[[Worker, dict[str, Any]], None],
        give: Callable[[socket.socket], None],
        remembers_s: float,
    ) -> None:
        self.number = number
        self.ready = asyncio.Event()
        """It serves, or has ended."""
        self.serving = False
        self.served = False
        """It has come up at least once."""
        self.samples: Samples = {}
        """As it last told them."""
        self.process: asyncio.subprocess.Process | None = None
        self._command = command
        self._hello = hello
        self._hear = hear
        self._give = give
        self._remembers_s = remembers_s
        self._door: socket.socket | None = None
        self._handed: deque[socket.socket] = deque()
        """Given away and not taken yet."""
        self._talk: asyncio.StreamWriter | None = None
        self._metrics: asyncio.Future[None] | None = None
        self._forgetting: dict[int, asyncio.Future[None]] = {}
        self._last = 0
        self._heard_at = 0.0

    async def run(self) -> int:
        """Starts it and returns its exit code when it has ended, negative for a signal. Raises OSError when it cannot
        be started.
        """
        self.ready.clear()
        door, its_door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        talk, its_talk = socket.socketpair()
        with door, talk:
            door.setblocking(False)
            with its_door, its_talk:
                descriptors = (its_door.fileno(), its_talk.fileno())
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    *(
                        "--parent",
                        str(os.getpid()),
                        "--worker",
                        str(self.number),
                        "--door",
                        str(descriptors[0]),
                        "--talk",
                        str(descriptors[1]),
                    ),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=descriptors,
                )
            reader, self._talk = await asyncio.open_unix_connection(sock=talk, limit=LINE_BYTES_MAX)
            self.process, self._door = process, door
            loop = asyncio.get_running_loop()
            loop.add_reader(door, self._taken)
            self.tell({"do": "hello", **self._hello})
            listening = asyncio.create_task(self._listen(reader))
            try:
                return await process.wait()
            finally:
                self.serving, self._door, self.process = False, None, None
                loop.remove_reader(door)
                if process.returncode is None:
                    process.kill()
                listening.cancel()
                self._talk.close()
                self.ready.set()
                for waiting in self._forgetting.values():
                    if not waiting.done():
                        waiting.set_result(None)
                self._forgetting.clear()
                while self._handed:
                    self._give(self._handed.popleft())

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            await self._obey(reader)
        except ConnectionError:
            pass  # it has ended
        except Exception:
            log.exception("what a worker says is not understood; it is killed", worker=self.number)
            self.signal(signal.SIGKILL)

    async def _obey(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            self._heard_at = asyncio.get_running_loop().time()
            told = json.loads(line)
            if told["tell"] == "ready":
                self.serving = self.served = True
                self.ready.set()
            elif told["tell"] == "metrics":
                self.samples = decode_samples(told["samples"])
                if self._metrics is not None and not self._metrics.done():
                    self._metrics.set_result(None)
            elif told["tell"] == "forgotten":
                if (waiting := self._forgetting.pop(told["id"], None)) and not waiting.done():
                    waiting.set_result(None)
            else:
                self._hear(self, told)

    def tell(self, message: dict[str, Any]) -> None:
        if self._talk is not None and not self._talk.is_closing():
            self._talk.write(json.dumps(message).encode() + b"\n")

    def hand(self, connection: socket.socket) -> bool:
        """Gives a client's connection away; False when the worker does not take it now."""
        if self._door is None or not self.serving:
            return False
        try:
            socket.send_fds(self._door, [b"c"], [connection.fileno()])
        except OSError:
            return False
        self._handed.append(connection)
        return True

    def _taken(self) -> None:
        assert self._door is not None
        try:
            while told := self._door.recv(TOLD_AT_ONCE_MAX):
                for answer in told[: len(self._handed)]:
                    connection = self._handed.popleft()
                    if answer == NOT_TAKEN:
                        self._give(connection)
                    else:
                        connection.close()
        except BlockingIOError:
            return
        except OSError:
            pass
        asyncio.get_running_loop().remove_reader(self._door)  # it has closed its end, and will end

    async def forget(self, kind: str, key: str) -> None:
        """Returns when it has, or has ended; one that hangs is not waited for longer than it remembers anyway."""
        if not self.serving:
            return  # it has been asked for nothing yet
        self._last += 1
        number, waiting = self._last, asyncio.get_running_loop().create_future()
        self._forgetting[number] = waiting
        self.tell({"do": "forget", "id": number, "kind": kind, "key": key})
        await asyncio.wait([waiting], timeout=self._remembers_s)
        self._forgetting.pop(number, None)

    async def ask_metrics(self) -> None:
        """``samples`` anew; as they were when it does not answer in time."""
        if not self.serving:
            return
        if self._metrics is None or self._metrics.done():
            self._metrics = asyncio.get_running_loop().create_future()
            self.tell({"do": "metrics"})
        await asyncio.wait([self._metrics], timeout=METRICS_TIMEOUT_S)

    def silent_s(self) -> float:
        """How long it has said nothing; 0 for one that does not serve."""
        return asyncio.get_running_loop().time() - self._heard_at if self.serving else 0.0

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


class Workers:
    """All workers of a gateway and its listening sockets. Use: ``listen``, ``start``, ``run`` as a task; ``drain`` and
    ``close`` at the end.

    ``audit`` and ``note`` write to the node's audit log what a worker asks for; ``forget(kind, key)`` is told of what a
    worker has changed; ``keys`` answers
    what it asks of this gateway's copies of bucket keys.
    ``remembers_s``: how long a process goes by what it remembers of a bucket or a user.
    """

    def __init__(
        self,
        config_path: str,
        count: int,
        incarnation: bytes,
        metrics: Metrics,
        *,
        adopt: Adopt,
        audit: Callable[[str, Mapping[str, str]], Awaitable[None]],
        note: Callable[[str, Mapping[str, Any]], None],
        forget: Callable[[str, str], None],
        keys: Callable[[Mapping[str, Any]], Awaitable[str]],
        remembers_s: float,
        command: Sequence[str] = (sys.executable, "-m", "storaged", "run"),
        look_every_s: float = METRICS_EVERY_S,
        hangs_s: float = HANGS_S,
    ) -> None:
        command = [*command, config_path]
        self._look_every_s = look_every_s
        self._hangs_s = hangs_s
        hello = {"pid": os.getpid(), "incarnation": incarnation.hex()}
        self._others = [
            Worker(number, command, hello, self._hear, self._give, remembers_s) for number in range(2, count + 1)
        ]
        self._metrics = metrics
        self._adopt = adopt
        self._audit = audit
        self._note = note
        self._forget = forget
        self._keys = keys
        self._listeners: list[socket.socket] = []
        self._turn = 0
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: list[asyncio.Task[None]] = []
        self._past: Counter[Any] = Counter()
        """What those counted that have ended."""
        self._restarts = metrics.counter("storaged_worker_restarts_total")
        metrics.gauge("storaged_workers").set_function(lambda: float(self.serving))

    @property
    def serving(self) -> int:
        """Processes that take connections, this one included."""
        return 1 + sum(worker.serving for worker in self._others)

    @property
    def count(self) -> int:
        return 1 + len(self._others)

    def listen(self, host: str, port: int) -> None:
        """Takes the port; nobody is accepted yet. Raises PortInUse, OSError."""
        self._listeners = listen(host, port)

    async def start(self) -> None:
        """Returns when all serve. Raises OperatorError when one does not come up."""
        self._watchers = [asyncio.create_task(self._keep(worker)) for worker in self._others]
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                for worker in self._others:
                    await worker.ready.wait()
        except TimeoutError:
            raise OperatorError(
                f"{self.serving} of {self.count} workers came up within {READY_TIMEOUT_S:.0f} s; the log says why"
            ) from None
        if late := [str(worker.number) for worker in self._others if not worker.serving]:
            raise OperatorError(f"worker {', '.join(late)} did not start; its last lines above say why")
        self._accept_again()

    async def run(self) -> None:
        """Until cancelled. Keeps what the workers count, in case one dies, and ends those that hang."""
        while True:
            ended, _ = await asyncio.wait(
                self._watchers, timeout=self._look_every_s, return_when=asyncio.FIRST_EXCEPTION
            )
            for watcher in ended:
                watcher.result()
            if len(ended) == len(self._watchers):
                return  # the gateway stops
            await self.gather()
            for worker in self._others:
                if worker.silent_s() > self._hangs_s:
                    log.error("a worker hangs and is killed", worker=worker.number, silent_s=round(worker.silent_s()))
                    worker.signal(signal.SIGKILL)

    # --- connections

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTED_AT_ONCE_MAX):
            try:
                connection, _address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("connections are not accepted for a moment", reason=str(error))
                loop = asyncio.get_running_loop()
                for each in self._listeners:
                    loop.remove_reader(each)
                loop.call_later(REFUSED_PAUSE_S, self._accept_again)
                return
            connection.setblocking(False)
            self._give(connection)

    def _accept_again(self) -> None:
        for listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _give(self, connection: socket.socket) -> None:
        """To the next in turn; to another one when that one is away."""
        for _ in self._others:
            self._turn = (self._turn + 1) % self.count
            if not self._turn:
                break
            if self._others[self._turn - 1].hand(connection):
                return
        self._spawn(self._adopt(connection))

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- processes

    async def _keep(self, worker: Worker) -> None:
        """Starts it, again whenever it ends, until the gateway stops. One that never served is not tried again:
        ``start`` has failed.
        """
        pause_s = RESTART_FIRST_S
        while not self._stopping:
            began = asyncio.get_running_loop().time()
            try:
                code = await worker.run()
            except OSError as error:
                log.error("a worker cannot be started", worker=worker.number, reason=str(error))
                code = 1
            self._past.update(counts_of(worker.samples, self._metrics.registry))
            worker.samples = {}
            if self._stopping or not worker.served:
                return
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            log.error("a worker ended and is started again", worker=worker.number, how=how)
            self._restarts.inc()
            lived_s = asyncio.get_running_loop().time() - began
            if lived_s > RESTART_MAX_S:
                pause_s = RESTART_FIRST_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RESTART_MAX_S)

    def _hear(self, worker: Worker, told: dict[str, Any]) -> None:
        if told["tell"] == "audit":
            self._spawn(self._write_audit(worker, told))
        elif told["tell"] == "forget":
            self._spawn(self._forget_everywhere(worker, told))
        elif told["tell"] == "keys":
            self._spawn(self._answer_of_keys(worker, told))
        elif told["tell"] == "note":
            self._note(told["kind"], told["fields"])

    async def _answer_of_keys(self, worker: Worker, told: dict[str, Any]) -> None:
        error = answer = ""
        try:
            answer = await self._keys(told)
        except StoragedError as refused:
            error = refused.message
        except Exception as defect:  # the worker must not wait for ever
            log.exception("a question about bucket keys cannot be answered", worker=worker.number)
            error = f"{type(defect).__name__}: {defect}"
        if "id" in told:
            worker.tell({"do": "done", "id": told["id"], "error": error, "answer": answer})

    async def _write_audit(self, worker: Worker, told: dict[str, Any]) -> None:
        error = ""
        try:
            await self._audit(told["kind"], told["fields"])
        except StoragedError as refused:
            error = refused.message
        except Exception as defect:  # the worker must not wait for ever
            log.exception("an entry cannot be audited", worker=worker.number, kind=told["kind"])
            error = f"{type(defect).__name__}: {defect}"
        worker.tell({"do": "done", "id": told["id"], "error": error})

    async def forget(self, kind: str, key: str, *, but: Worker | None = None) -> None:
        """Every other process (``but`` the one that asked) forgets what it knows of a bucket or
        user that was changed.
        """
        await asyncio.gather(*(worker.forget(kind, key) for worker in self._others if worker is not but))

    async def _forget_everywhere(self, worker: Worker, told: dict[str, Any]) -> None:
        self._forget(told["kind"], told["key"])
        await self.forget(told["kind"], told["key"], but=worker)
        worker.tell({"do": "done", "id": told["id"], "error": ""})

    async def gather(self) -> list[Samples]:
        """What the others have counted, and those that have ended."""
        await asyncio.gather(*(worker.ask_metrics() for worker in self._others))
        return [dict(self._past), *(worker.samples for worker in self._others)]

    def reload(self) -> None:
        for worker in self._others:
            worker.tell({"do": "reload"})

    def stop_accepting(self) -> None:
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()

    async def drain(self, drain_s: float) -> None:
        """Every worker finishes its requests and ends; returns when all have, or after ``drain_s`` and a little.
        ``close`` kills those that have not.
        """
        self.stop_accepting()
        self._stopping = True
        for worker in self._others:
            worker.signal(signal.SIGTERM)
        running = [
            watcher for worker, watcher in zip(self._others, self._watchers, strict=False) if worker.process is not None
        ]
        if running:
            _, late = await asyncio.wait(running, timeout=drain_s + ENDING_S)
            if late:
                log.error("workers did not end in time", count=len(late))

    async def close(self) -> None:
        """Nothing of it is left afterwards. Safe to call twice."""
        self.stop_accepting()
        self._stopping = True
        for worker in self._others:
            worker.signal(signal.SIGKILL)
        running = [
            watcher for worker, watcher in zip(self._others, self._watchers, strict=False) if worker.process is not None
        ]
        if running:
            await asyncio.wait(running, timeout=ENDING_S)
        for task in [*self._watchers, *self._tasks]:
            task.cancel()
        await asyncio.gather(*self._watchers, *self._tasks, return_exceptions=True)
