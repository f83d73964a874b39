"""Several processes behind one S3 port: a further worker's side. ``workers`` has the theory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog

from storaged.clock import Clock, SystemClock
from storaged.cluster.audit.format import Event
from storaged.cluster.audit.log import REFUSALS_EVERY_S
from storaged.cluster.audit.refusals import Refusals
from storaged.errors import AuditUnwritable
from storaged.node.workers import LINE_BYTES_MAX, NOT_TAKEN, TAKEN, TOLD_AT_ONCE_MAX, encode_samples
from storaged.observe import samples_of

if TYPE_CHECKING:
    from storaged.node.planes import Node

TELL_AGAIN_S = 0.01
ENDED = "the gateway's first process has ended"

log = structlog.get_logger("workers")


class Leader:
    """The gateway's first process, to the worker ``number``. Its audit log is this worker's too: a
    ``cluster.audit.log.Trail``.

    ``door`` and ``talk`` are the descriptors that this process was started with.
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
        """Of what was asked of the first process."""
        self._last = 0
        self._answers = bytearray()
        """TAKEN or NOT_TAKEN for each connection that the first process has not been told of yet: it keeps it until
        then.
        """
        self._telling: asyncio.TimerHandle | None = None
        self._adopted: set[asyncio.Task[None]] = set()
        self._clock = clock or SystemClock()
        self._refusals = Refusals()
        self._refusing: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Returns when the first process has said who it is."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._talk, limit=LINE_BYTES_MAX)
        hello = json.loads(await self._reader.readline() or b"{}")
        if hello.get("do") != "hello":
            raise AuditUnwritable(ENDED)
        self.pid, self.incarnation = hello["pid"], bytes.fromhex(hello["incarnation"])

    def tell(self, message: dict[str, Any]) -> None:
        """What needs no answer."""
        self._tell(message)

    def _tell(self, message: dict[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    def ready(self) -> None:
        self._tell({"tell": "ready"})

    async def serve(self, node: Node, reloading: asyncio.Event, stopping: asyncio.Event) -> None:
        """Obeys until the first process ends, which ends this one."""
        assert node.gateway is not None
        assert self._reader is not None
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                told = json.loads(line)
                if told["do"] == "metrics":
                    self._tell({"tell": "metrics", "samples": encode_samples(samples_of(node.metrics.registry))})
                elif told["do"] == "reload":
                    reloading.set()
                elif told["do"] == "forget":
                    node.gateway.forget(told["kind"], told["key"])
                    self._tell({"tell": "forgotten", "id": told["id"]})
                elif told["do"] == "done" and (waiting := self._waiting.pop(told["id"], None)) and not waiting.done():
                    waiting.set_result((told["error"], told.get("answer", "")))
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result((ENDED, ""))
        self._waiting.clear()
        self._writer = None
        stopping.set()

    # --- connections

    def take_connections(self, adopt: Callable[[socket.socket], Coroutine[Any, Any, None]]) -> None:
        """``adopt`` serves every connection that comes through the door."""

        def come_in() -> None:
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
            if self._telling is None:
                self._tell_taken()
            for descriptor in descriptors:
                connection = socket.socket(fileno=descriptor)
                connection.setblocking(False)
                task = loop.create_task(adopt(connection))
                self._adopted.add(task)
                task.add_done_callback(self._adopted.discard)

        loop = asyncio.get_running_loop()
        loop.add_reader(self._door, come_in)

    def _tell_taken(self) -> None:
        """Until it is told the first process keeps a connection open: its client would not see that
        this one closes it.
        """
        self._telling = None
        try:
            while self._answers:
                del self._answers[: self._door.send(self._answers[:TOLD_AT_ONCE_MAX])]
        except BlockingIOError:  # it is busy
            self._telling = asyncio.get_running_loop().call_later(TELL_AGAIN_S, self._tell_taken)
        except OSError:
            pass  # it has ended

    async def _ask(self, message: dict[str, Any]) -> str:
        """Why the first process did not do it; empty when it did."""
        return (await self.ask(message))[0]

    async def ask(self, message: dict[str, Any]) -> tuple[str, str]:
        """(why the first process did not do it, empty when it did; its answer)."""
        if self._writer is None:
            return ENDED, ""
        self._last += 1
        waiting: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
        self._waiting[self._last] = waiting
        self._tell({**message, "id": self._last})
        return await waiting

    async def forget(self, kind: str, key: str) -> None:
        """Every other process of this gateway has forgotten what it knew of it (or has ended) when this returns."""
        await self._ask({"tell": "forget", "kind": kind, "key": key})

    # --- the audit log

    async def append(self, kind: str, /, **fields: Any) -> None:
        """On disk, in the first process's log, when it returns. Raises AuditUnwritable."""
        if error := await self._ask({"tell": "audit", "kind": kind, "fields": fields}):
            raise AuditUnwritable(error)

    def note(self, kind: str, /, **fields: Any) -> None:
        self._tell({"tell": "note", "kind": kind, "fields": fields})

    def refused(self, kind: str, code: str, /, *, actor: str, target: str = "", **fields: Any) -> None:
        """Counted here: a flood of refusals must not become one of messages to the first process."""
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
        """The log is open."""

    async def close(self) -> None:
        """No further connections, no further entries."""
        if self._refusing is not None:
            self._refusing.cancel()
        self._tell_refusals(all_of_them=True)
        asyncio.get_running_loop().remove_reader(self._door)
        if self._telling is not None:
            self._telling.cancel()
        for task in self._adopted:
            task.cancel()
        self._door.close()
        if self._writer is not None:
            self._writer.close()
