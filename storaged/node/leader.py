"""Several processes behind one S3 port: a further worker's side. ``workers`` has the theory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from storaged.clock import Clock, SystemClock
from storaged.cluster.audit.format import Event
from storaged.cluster.audit.log import REFUSALS_EVERY_S
from storaged.cluster.audit.refusals import Refusals
from storaged.errors import AuditUnwritable
from storaged.node.worker import ANSWERS_BYTES_MAX, LINE_BYTES_MAX, NOT_TAKEN, TAKEN, encode_samples
from storaged.observe import samples_of

ANSWER_AGAIN_S = 0.01
ENDED = "the gateway's first process has ended"

log = structlog.get_logger("workers")


class Leader:
    """The gateway's first process, as worker ``number`` sees it. ``door`` and ``talk`` are this process's descriptors.

    It is a ``cluster.audit.trail.Trail`` too: this worker writes to the audit log of the first process.
    """

    def __init__(self, number: int, door: int, talk: int, clock: Clock | None = None) -> None:
        self.number = number
        self.pid = 0
        self.incarnation = b""
        self._door = socket.socket(fileno=door)
        self._door.setblocking(False)
        self._door.set_inheritable(False)
        self._talk = socket.socket(fileno=talk)
        self._talk.set_inheritable(False)
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None
        self._waiting: dict[int, asyncio.Future[tuple[str, str]]] = {}
        """Questions to the first process, by id."""
        self._last = 0
        self._answers = bytearray()
        """TAKEN or NOT_TAKEN for each connection; the first process keeps a connection until it has this answer."""
        self._answering: asyncio.TimerHandle | None = None
        self._adopted: set[asyncio.Task[None]] = set()
        self._clock = clock or SystemClock()
        self._refusals = Refusals()
        self._refusing: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Waits for the hello of the first process. Raises AuditUnwritable when it has ended."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._talk, limit=LINE_BYTES_MAX)
        hello = json.loads(await self._reader.readline() or b"{}")
        if hello.get("do") != "hello":
            raise AuditUnwritable(ENDED)
        self.pid, self.incarnation = hello["pid"], bytes.fromhex(hello["incarnation"])

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message that needs no answer."""
        self._tell(message)

    def _tell(self, message: dict[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    def ready(self) -> None:
        self._tell({"tell": "ready"})

    async def serve(
        self,
        registry: CollectorRegistry,
        on_forget: Callable[[str, str], None],
        reloading: asyncio.Event,
        stopping: asyncio.Event,
    ) -> None:
        """Obeys the first process until it ends; then this one ends too.

        ``registry``: the metrics that it asks for. ``on_forget(kind, key)``: another process changed this bucket, user
        or key.
        """
        assert self._reader is not None
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                message = json.loads(line)
                if message["do"] == "metrics":
                    self._tell({"tell": "metrics", "samples": encode_samples(samples_of(registry))})
                elif message["do"] == "reload":
                    reloading.set()
                elif message["do"] == "forget":
                    on_forget(message["kind"], message["key"])
                    self._tell({"tell": "forgotten", "id": message["id"]})
                elif (
                    message["do"] == "done"
                    and (waiting := self._waiting.pop(message["id"], None))
                    and not waiting.done()
                ):
                    waiting.set_result((message["error"], message.get("answer", "")))
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result((ENDED, ""))
        self._waiting.clear()
        self._writer = None
        stopping.set()

    # --- connections

    def take_connections(self, adopt: Callable[[socket.socket], Coroutine[Any, Any, None]]) -> None:
        """Accepts connections from the first process; ``adopt`` serves each."""

        def on_connection() -> None:
            try:
                message, descriptors, _, _ = socket.recv_fds(self._door, 1, 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                message = b""
            if not message:
                loop.remove_reader(self._door)
                return
            if not descriptors:
                log.error("a connection is left to another process: there is no descriptor for it")
            self._answers.append(TAKEN if descriptors else NOT_TAKEN)
            if self._answering is None:
                self._send_answers()
            for descriptor in descriptors:
                connection = socket.socket(fileno=descriptor)
                connection.setblocking(False)
                task = loop.create_task(adopt(connection))
                self._adopted.add(task)
                task.add_done_callback(self._adopted.discard)

        loop = asyncio.get_running_loop()
        loop.add_reader(self._door, on_connection)

    def _send_answers(self) -> None:
        """Answers for the connections taken. Until then the first process keeps them open, so that a client would
        not see this process close one.
        """
        self._answering = None
        try:
            while self._answers:
                del self._answers[: self._door.send(self._answers[:ANSWERS_BYTES_MAX])]
        except BlockingIOError:  # the first process is busy
            self._answering = asyncio.get_running_loop().call_later(ANSWER_AGAIN_S, self._send_answers)
        except OSError:
            pass  # it has ended

    async def _ask(self, message: dict[str, Any]) -> str:
        """Returns why the first process did not do it; empty when it did."""
        return (await self.ask(message))[0]

    async def ask(self, message: dict[str, Any]) -> tuple[str, str]:
        """Asks the first process. Returns why it did not do it (empty when it did), and its answer."""
        if self._writer is None:
            return ENDED, ""
        self._last += 1
        waiting: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
        self._waiting[self._last] = waiting
        self._tell({**message, "id": self._last})
        return await waiting

    async def forget(self, kind: str, key: str) -> None:
        """Makes every other process of this gateway forget a bucket, user or key; waits until all did or ended."""
        await self._ask({"tell": "forget", "kind": kind, "key": key})

    # --- the audit log

    async def append(self, kind: str, /, **fields: Any) -> None:
        """Writes an entry to the first process's log; returns when it is synced. Raises AuditUnwritable."""
        if error := await self._ask({"tell": "audit", "kind": kind, "fields": fields}):
            raise AuditUnwritable(error)

    def note(self, kind: str, /, **fields: Any) -> None:
        self._tell({"tell": "note", "kind": kind, "fields": fields})

    def refused(self, kind: str, code: str, /, *, actor: str, target: str = "", **fields: Any) -> None:
        """Counts a refusal here, so that a flood of refusals is no flood of messages to the first process."""
        event = self._refusals.add(self._clock.wall_ms(), kind, code, actor, target, fields)
        if event is not None:
            self._tell_event(event)
        if self._refusing is None:
            self._refusing = asyncio.get_running_loop().call_later(REFUSALS_EVERY_S, self._tell_refusals)

    def _tell_event(self, event: Event) -> None:
        self.note(event.kind, actor=event.actor, target=event.target, outcome=event.outcome, **event.fields)

    def _tell_refusals(self, *, all_of_them: bool = False) -> None:
        self._refusing = None
        for event in self._refusals.due(self._clock.wall_ms(), all_of_them=all_of_them):
            self._tell_event(event)
        if not all_of_them and self._refusals.waiting:
            self._refusing = asyncio.get_running_loop().call_later(REFUSALS_EVERY_S, self._tell_refusals)

    async def start(self) -> None:
        """Does nothing: the first process opened the log."""

    async def close(self) -> None:
        """Accepts no further connections and writes no further entries."""
        if self._refusing is not None:
            self._refusing.cancel()
        self._tell_refusals(all_of_them=True)
        asyncio.get_running_loop().remove_reader(self._door)
        if self._answering is not None:
            self._answering.cancel()
        for task in self._adopted:
            task.cancel()
        self._door.close()
        if self._writer is not None:
            self._writer.close()
