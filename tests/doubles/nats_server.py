"""A server that speaks as much of NATS's protocol as a client needs to publish to a stream of JetStream.

https://docs.nats.io/reference/reference-protocols/nats-protocol
"""

from __future__ import annotations

import asyncio
import json


class NatsServer:
    """``got``: (subject, body) of what was published. ``silent``: so many further messages get no acknowledgement.
    ``without_stream``: nobody listens to the subject.
    """

    def __init__(self, token: str = "") -> None:
        self.got: list[tuple[str, bytes]] = []
        self.silent = 0
        self.without_stream = False
        self._token = token
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.drop()

    def drop(self) -> None:
        """Breaks all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        about = {
            "server_id": "double", "version": "2.10.0", "proto": 1, "host": "127.0.0.1", "port": 0, "headers": True,
            "max_payload": 1 << 20, "jetstream": True, "auth_required": bool(self._token),
        }  # fmt: skip
        writer.write(f"INFO {json.dumps(about)}\r\n".encode())
        subscriptions: list[tuple[str, str]] = []
        try:
            while line := (await reader.readline()).decode().strip():
                verb, _, rest = line.partition(" ")
                if verb == "CONNECT" and self._token and json.loads(rest).get("auth_token") != self._token:
                    writer.write(b"-ERR 'Authorization Violation'\r\n")
                    break
                if verb == "PING":
                    writer.write(b"PONG\r\n")
                elif verb == "SUB":
                    subject, *_, sid = rest.split()
                    subscriptions.append((subject, sid))
                elif verb in ("PUB", "HPUB"):
                    await self._publish(reader, writer, verb, rest.split(), subscriptions)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _publish(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        verb: str,
        words: list[str],
        subscriptions: list[tuple[str, str]],
    ) -> None:
        head = int(words[-2]) if verb == "HPUB" else 0
        data = await reader.readexactly(int(words[-1]) + 2)
        subject, reply = words[0], words[1] if len(words) - (2 if head else 1) > 1 else ""
        sid = next((sid for wanted, sid in subscriptions if _like(wanted, reply)), "")
        if self.without_stream:
            status = b"NATS/1.0 503\r\n\r\n"
            writer.write(f"HMSG {reply} {sid} {len(status)} {len(status)}\r\n".encode() + status + b"\r\n")
            return
        self.got.append((subject, data[head:-2]))
        if self.silent:
            self.silent -= 1
            return
        answer = json.dumps({"stream": "EVENTS", "seq": len(self.got)}).encode()
        writer.write(f"MSG {reply} {sid} {len(answer)}\r\n".encode() + answer + b"\r\n")


def _like(wanted: str, subject: str) -> bool:
    """A subscription's subject, whose last word may be a wildcard."""
    return wanted == subject or (wanted[-1:] in "*>" and subject.startswith(wanted[:-1]))
