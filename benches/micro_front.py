"""The cost of the S3 front for a request, from the bytes of its head to the bytes of its answer.

The request is counted and timed as in production, but without a socket, an event loop and an object plane. The head is
the one that boto3 writes. Nothing waits, so one ``send`` runs a request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import botocore.auth  # type: ignore[import-untyped]
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]

from benches.micro_world import ACCESS, BUCKET, REGION, SECRET, OneObject, signature_floor
from storaged.clock import SystemClock
from storaged.config import LogSection
from storaged.ids import system_entropy
from storaged.node.requestlog import RequestLog
from storaged.objects.api import Buckets, Objects, Users
from storaged.observe import Metrics
from storaged.s3.app import S3App
from storaged.s3.context import Endpoint
from storaged.s3.http.connection import Connection
from storaged.s3.http.grammar import HEAD_END


class _Transport:
    """A transport that drops what is written."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written = data

    def get_extra_info(self, name: str) -> object:
        return ("127.0.0.1", 1) if name == "peername" else None

    def set_write_buffer_limits(self, high: int) -> None: ...

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...


def boto_request(method: str, body: bytes) -> bytes:
    url = f"http://127.0.0.1:9000/{BUCKET.name}/photos/2026/00000123.jpg"
    headers = {
        "User-Agent": "Boto3/1.40.0 md/Botocore#1.40.0 ua/2.1 os/linux#6.1 md/arch#x86_64 lang/python#3.11.7 "
        "md/pyimpl#CPython m/b,Z,D,e cfg/retry-mode#standard Botocore/1.40.0"
    }
    if method == "PUT":
        headers |= {"Content-Type": "image/jpeg"}
    request = AWSRequest(method, url, headers=headers, data=body)
    botocore.auth.S3SigV4Auth(Credentials(ACCESS, SECRET), "s3", REGION).add_auth(request)
    lines = [
        f"{method} {url.removeprefix('http://127.0.0.1:9000')} HTTP/1.1",
        "Host: 127.0.0.1:9000",
        "Accept-Encoding: identity",
    ]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    lines += ["amz-sdk-invocation-id: 7d64ee3e-7ec4-4d20-9f2a-a8ae93f8f8e9", "amz-sdk-request: attempt=1"]
    if method == "PUT":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + HEAD_END + body


class Exchange:
    """The same request again and again, on one connection."""

    def __init__(self, method: str, plane: OneObject) -> None:
        app = S3App(
            cast(Objects, plane),
            cast(Buckets, plane),
            cast(Users, plane),
            Endpoint(REGION),
            clock=SystemClock(),
            entropy=system_entropy,
            on_request=RequestLog(Metrics(), LogSection()),
        )
        self.request = boto_request(method, plane.plain if method == "PUT" else b"")
        connections = app.open()
        connections.begin = lambda connection: None  # type: ignore[method-assign]
        self.transport = _Transport()
        self.connection = Connection(connections)
        self.connection.connection_made(cast(Any, self.transport))
        self.task = app._responder.converse(self.connection)
        self.room = self.connection.get_buffer(-1)
        self.room[: len(self.request)] = self.request

    def __call__(self) -> None:
        """Answers a request whose bytes have arrived: by callbacks, or by the connection's task, which then waits for
        the next request.
        """
        self.transport.written = b""
        self.connection.buffer_updated(len(self.request))
        if not self.transport.written:
            self.task.send(None)

    def begin(self) -> None:
        self.task.send(None)
        self()
        assert self.transport.written.startswith(b"HTTP/1.1 200 OK\r\n"), self.transport.written


def paths() -> list[tuple[str, Callable[[], object], Callable[[], object], str]]:
    """(name, the path, its floor, what the floor is). Needs a running event loop, because connections make futures."""
    plane = OneObject()
    found: list[tuple[str, Callable[[], object], Callable[[], object], str]] = []
    for method in ("HEAD", "GET", "PUT"):
        exchange = Exchange(method, plane)
        exchange.begin()
        found.append(
            (f"front: {method}, without socket and objects", exchange, signature_floor, "one SHA-256, one HMAC")
        )
    return found
