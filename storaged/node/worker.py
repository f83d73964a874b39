"""One further process of a gateway, as its first process sees it: started, served with connections, asked, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from storaged.observe import Samples

LINE_BYTES_MAX = 4 * 1024 * 1024
METRICS_TIMEOUT_S = 1.0
ANSWERS_BYTES_MAX = 4096
TAKEN, NOT_TAKEN = b"tn"
"""A worker's answers to a connection: it serves it, or it has no descriptor left to receive it."""

log = structlog.get_logger("workers")


def encode_samples(samples: Samples) -> list[Any]:
    return [[name, labels, value] for (name, labels), value in samples.items()]


def decode_samples(encoded: list[Any]) -> Samples:
    return {(name, tuple((key, text) for key, text in labels)): value for name, labels, value in encoded}


class Worker:
    """One further process, however often it is started. ``number`` counts from 2: the first process is number 1."""

    def __init__(
        self,
        number: int,
        command: list[str],
        hello: Mapping[str, Any],
        on_message: Callable[[Worker, dict[str, Any]], None],
        give: Callable[[socket.socket], None],
        remembers_s: float,
    ) -> None:
        """``command`` starts the process, ``hello`` is its first message.

        ``on_message``: called with each message that is not an answer. ``give``: takes back a connection that the
        worker did not take. ``remembers_s``: how long the worker uses a remembered bucket or user.
        """
        self.number = number
        self.ready = asyncio.Event()
        """Set while it serves, and when it has ended."""
        self.serving = False
        self.served = False
        """Whether it ever served."""
        self.samples: Samples = {}
        """The metrics of its last answer."""
        self.process: asyncio.subprocess.Process | None = None
        self._command = command
        self._hello = hello
        self._on_message = on_message
        self._give = give
        self._remembers_s = remembers_s
        self._door: socket.socket | None = None
        self._handed: deque[socket.socket] = deque()
        """Connections that it was given and has not answered yet."""
        self._talk: asyncio.StreamWriter | None = None
        self._metrics: asyncio.Future[None] | None = None
        self._forgetting: dict[int, asyncio.Future[None]] = {}
        self._last = 0
        self._heard_at = 0.0

    async def run(self) -> int:
        """Starts it, waits for its end and returns its exit code, negative for a signal. Raises OSError."""
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
            loop.add_reader(door, self._on_answers)
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
            log.exception("a message of a worker is not understood; it is killed", worker=self.number)
            self.signal(signal.SIGKILL)

    async def _obey(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            self._heard_at = asyncio.get_running_loop().time()
            message = json.loads(line)
            if message["tell"] == "ready":
                self.serving = self.served = True
                self.ready.set()
            elif message["tell"] == "metrics":
                self.samples = decode_samples(message["samples"])
                if self._metrics is not None and not self._metrics.done():
                    self._metrics.set_result(None)
            elif message["tell"] == "forgotten":
                if (waiting := self._forgetting.pop(message["id"], None)) and not waiting.done():
                    waiting.set_result(None)
            else:
                self._on_message(self, message)

    def tell(self, message: dict[str, Any]) -> None:
        if self._talk is not None and not self._talk.is_closing():
            self._talk.write(json.dumps(message).encode() + b"\n")

    def try_hand(self, connection: socket.socket) -> bool:
        """Gives a client's connection to the worker; False when it does not take any now."""
        if self._door is None or not self.serving:
            return False
        try:
            socket.send_fds(self._door, [b"c"], [connection.fileno()])
        except OSError:
            return False
        self._handed.append(connection)
        return True

    def _on_answers(self) -> None:
        assert self._door is not None
        try:
            while answers := self._door.recv(ANSWERS_BYTES_MAX):
                for answer in answers[: len(self._handed)]:
                    connection = self._handed.popleft()
                    if answer == NOT_TAKEN:
                        self._give(connection)
                    else:
                        connection.close()
        except BlockingIOError:
            return
        except OSError:
            pass
        asyncio.get_running_loop().remove_reader(self._door)  # the worker closed its end: it ends

    async def forget(self, kind: str, key: str) -> None:
        """Makes it forget a bucket, user or key. Returns when it did or has ended, after ``remembers_s`` at most."""
        if not self.serving:
            return  # it has served no request yet
        self._last += 1
        number, waiting = self._last, asyncio.get_running_loop().create_future()
        self._forgetting[number] = waiting
        self.tell({"do": "forget", "id": number, "kind": kind, "key": key})
        await asyncio.wait([waiting], timeout=self._remembers_s)
        self._forgetting.pop(number, None)

    async def ask_metrics(self) -> None:
        """Updates ``samples``; keeps the old ones when it does not answer within METRICS_TIMEOUT_S."""
        if not self.serving:
            return
        if self._metrics is None or self._metrics.done():
            self._metrics = asyncio.get_running_loop().create_future()
            self.tell({"do": "metrics"})
        await asyncio.wait([self._metrics], timeout=METRICS_TIMEOUT_S)

    def silent_s(self) -> float:
        """Seconds since its last message; 0 when it does not serve."""
        return asyncio.get_running_loop().time() - self._heard_at if self.serving else 0.0

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
