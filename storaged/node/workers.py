"""Several processes behind one S3 port: the first one's side.

Theory of operation. A gateway with ``[s3] workers = N`` is N processes of one node. The first process holds the node's
lock, the port, the admin API and the audit log. It does what a node does once (housekeeping, the layout's register,
status), and serves requests too. It starts the others with ``storaged run CONFIG --worker NUMBER``. Each is a gateway
of its own over the ring: own connections, caches and keys in memory, and an incarnation of its own, so that
no two ballots are alike. To the cluster's membership they are one node, with the first one's pid and incarnation.

The first process accepts every client and hands the connections out in turn (SCM_RIGHTS). Two other ways were tried.
With SO_REUSEPORT a hash chooses the socket: of four connections all four go to one of two processes every eighth time,
and the kernel resets the connections in the queue of a process that dies. With one inherited listening socket the
process that wakes first takes a burst of connections, now and then all 64 of them. A hand-over costs about 16 us, once
a connection.

A worker that dies takes its requests in flight with it. The others go on, and the first starts it again. A worker
answers each connection with a byte. A connection that it did not take (it died, or has no descriptor left) goes to
another worker. When the first process dies the kernel ends the others (PR_SET_PDEATHSIG), and the service manager
starts all anew.

Each worker has two sockets to the first process: ``door``, which brings connections, and ``talk``, JSON lines:

    to the worker     {"do": "hello", pid, incarnation}      {"do": "metrics"}      {"do": "reload"}
                      {"do": "forget", id, kind, key}        {"do": "done", id, error, answer}
    from the worker   {"tell": "ready"}                      {"tell": "metrics", samples}
                      {"tell": "forgotten", id}              {"tell": "note", kind, fields}
    answered by done  {"tell": "audit", id, kind, fields}    {"tell": "forget", id, kind, key}
                      {"tell": "keys", id, what, buckets, ...}, about the gateway's copies of bucket keys

Processes remember buckets and users for a moment. When one process changes one, all forget it before that process
answers its client (``forget``): to a client of the port they are one gateway.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from storaged.cluster.audit.trail import Trail
from storaged.errors import OperatorError, StoragedError
from storaged.node.worker import Worker
from storaged.observe import Metrics, Samples, counts_of
from storaged.s3.http.listen import listen

START_S = 30.0
"""How long the start waits for the workers. A worker that takes longer serves when it is ready. A gateway that ends
because of it, and is started again, never comes up on an overloaded machine.
"""
ENDING_S = 10.0
"""Added to the time that requests in flight have."""

RESTART_FIRST_S, RESTART_MAX_S = 0.2, 10.0
METRICS_EVERY_S = 10.0
"""Counts since the last look are lost when a worker is killed."""

HANGS_S = 30.0
"""A worker that does not answer for this time hangs, and is killed. WatchdogSec= does this for the first process.
"""

ACCEPTED_AT_ONCE_MAX = 64
REFUSED_PAUSE_S = 1.0
"""The pause after an accept that failed, mostly because no descriptor was left."""

log = structlog.get_logger("workers")

Adopt = Callable[[socket.socket], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class FirstProcess:
    """What the gateway's first process does for its workers."""

    adopt: Adopt
    """Serves a connection in this process."""
    audit: Trail
    """The node's audit log, for the workers' entries."""
    forget: Callable[[str, str], None]
    """(kind, key): a worker changed this bucket, user or key."""
    keys: Callable[[Mapping[str, Any]], Awaitable[str]]
    """Answers a worker's question about this gateway's copies of bucket keys."""


class Workers:
    """All workers of a gateway and its listening sockets.

    Use: ``listen``, ``start``, ``run`` as a task; ``drain`` and ``close`` at the end.
    """

    def __init__(
        self,
        config_path: str,
        count: int,
        incarnation: bytes,
        metrics: Metrics,
        first: FirstProcess,
        *,
        remembers_s: float,
        command: Sequence[str] = (sys.executable, "-m", "storaged", "run"),
    ) -> None:
        """``count``: processes, this one included. ``remembers_s``: how long a process uses a remembered bucket or
        user. ``command`` starts a worker; the configuration's path follows.
        """
        command = [*command, config_path]
        hello = {"pid": os.getpid(), "incarnation": incarnation.hex()}
        self._others = [
            Worker(number, command, hello, self._on_message, self._give, remembers_s) for number in range(2, count + 1)
        ]
        self._metrics = metrics
        self._first = first
        self._listeners: list[socket.socket] = []
        self._turn = 0
        self._stopping = False
        self._started = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: list[asyncio.Task[None]] = []
        self._past: Counter[Any] = Counter()
        """The counts of processes that have ended."""
        self._restarts = metrics.counter("storaged_worker_restarts_total")
        metrics.gauge("storaged_workers").set_function(lambda: float(self.serving))

    @property
    def serving(self) -> int:
        """The number of processes that accept connections, this one included."""
        return 1 + sum(worker.serving for worker in self._others)

    @property
    def count(self) -> int:
        return 1 + len(self._others)

    def listen(self, host: str, port: int) -> None:
        """Binds the port; accepts no client yet. Raises PortInUse, OSError."""
        self._listeners = listen(host, port)

    async def start(self) -> None:
        """Starts all workers and waits until they serve, START_S at most. Raises OperatorError when one ends."""
        self._watchers = [asyncio.create_task(self._keep(worker)) for worker in self._others]
        try:
            async with asyncio.timeout(START_S):
                for worker in self._others:
                    await worker.ready.wait()
        except TimeoutError:
            log.warning("workers are late, and serve when they are ready", serving=self.serving, count=self.count)
        if ended := [str(worker.number) for worker in self._others if worker.ready.is_set() and not worker.serving]:
            raise OperatorError(f"worker {', '.join(ended)} did not start; its last lines above say why")
        self._started = True
        self._accept_again()

    async def run(self) -> None:
        """Runs until cancelled: collects the workers' counts, in case one dies, and kills those that hang."""
        while True:
            ended, _ = await asyncio.wait(self._watchers, timeout=METRICS_EVERY_S, return_when=asyncio.FIRST_EXCEPTION)
            for watcher in ended:
                watcher.result()
            if len(ended) == len(self._watchers):
                return  # the gateway stops
            await self.gather()
            for worker in self._others:
                if worker.silent_s() > HANGS_S:
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
        """Hands a connection to the next worker in turn that takes it, or serves it here."""
        for _ in self._others:
            self._turn = (self._turn + 1) % self.count
            if not self._turn:
                break
            if self._others[self._turn - 1].try_hand(connection):
                return
        self._spawn(self._first.adopt(connection))

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- processes

    async def _keep(self, worker: Worker) -> None:
        """Starts a worker, and again whenever it ends, until the gateway stops.

        A worker that ends during ``start`` and never served is not started again: ``start`` fails.
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
            if self._stopping or not (worker.served or self._started):
                return
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            log.error("a worker ended and is started again", worker=worker.number, how=how)
            self._restarts.inc()
            lived_s = asyncio.get_running_loop().time() - began
            if lived_s > RESTART_MAX_S:
                pause_s = RESTART_FIRST_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RESTART_MAX_S)

    def _on_message(self, worker: Worker, message: dict[str, Any]) -> None:
        if message["tell"] == "audit":
            self._spawn(self._write_audit(worker, message))
        elif message["tell"] == "forget":
            self._spawn(self._forget_everywhere(worker, message))
        elif message["tell"] == "keys":
            self._spawn(self._answer_of_keys(worker, message))
        elif message["tell"] == "note":
            self._first.audit.note(message["kind"], **message["fields"])

    async def _answer_of_keys(self, worker: Worker, message: dict[str, Any]) -> None:
        error = answer = ""
        try:
            answer = await self._first.keys(message)
        except StoragedError as refused:
            error = refused.message
        except Exception as defect:  # the worker must not wait for ever
            log.exception("a question about bucket keys cannot be answered", worker=worker.number)
            error = f"{type(defect).__name__}: {defect}"
        if "id" in message:
            worker.tell({"do": "done", "id": message["id"], "error": error, "answer": answer})

    async def _write_audit(self, worker: Worker, message: dict[str, Any]) -> None:
        error = ""
        try:
            await self._first.audit.append(message["kind"], **message["fields"])
        except StoragedError as refused:
            error = refused.message
        except Exception as defect:  # the worker must not wait for ever
            log.exception("an entry cannot be audited", worker=worker.number, kind=message["kind"])
            error = f"{type(defect).__name__}: {defect}"
        worker.tell({"do": "done", "id": message["id"], "error": error})

    async def forget(self, kind: str, key: str, *, but: Worker | None = None) -> None:
        """Makes every other process (except ``but``) forget a bucket, user or key that changed."""
        await asyncio.gather(*(worker.forget(kind, key) for worker in self._others if worker is not but))

    async def _forget_everywhere(self, worker: Worker, message: dict[str, Any]) -> None:
        self._first.forget(message["kind"], message["key"])
        await self.forget(message["kind"], message["key"], but=worker)
        worker.tell({"do": "done", "id": message["id"], "error": ""})

    async def gather(self) -> list[Samples]:
        """The counts of the other processes, and of those that have ended."""
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
        """Lets every worker finish its requests and end; waits ``drain_s`` and ENDING_S at most.

        ``close`` kills the workers that are left.
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
        """Kills what is left. Safe to call twice."""
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
