"""The destinations of notifications that the operator has configured: webhooks, and NATS where its client is installed.

A webhook gets each event as the body of a POST, with the secret as ``Authorization: Bearer``. Its 2xx answers
acknowledge the event; redirections are not followed, so no answer sends the event, or the secret, elsewhere. A
destination of NATS gets it as a message of JetStream, which acknowledges that it is stored: a bare publication would
not say that anybody got it.

An attempt takes ``timeout_s`` at most; each event is tried three times before it waits.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import structlog

from storaged.config import NotificationSection
from storaged.errors import ConfigInvalid
from storaged.objects.destinations import DeliveryFailed

try:
    import nats
    from nats.errors import Error as NatsError
except ImportError:  # an optional extra
    nats = None
    NatsError = OSError

ATTEMPTS: Final = 3
PAUSE_S: Final = 0.2
"""Before the second attempt; twice as long before the third."""
ANSWER_BYTES_MAX: Final = 4096

log = structlog.get_logger("notifications")


def arn_of(section: NotificationSection) -> str:
    kind = "webhook" if urlsplit(section.url).scheme in ("http", "https") else "nats"
    return f"arn:storaged:sqs::{section.name}:{kind}"


class ConfiguredDestinations:
    """An ``objects.destinations.Destinations``."""

    def __init__(self, sections: Sequence[NotificationSection]) -> None:
        """Raises ConfigInvalid for a file that can't be read, and for NATS without its client."""
        self._by_arn: dict[str, Webhook | NatsStream] = {}
        for section in sections:
            arn = arn_of(section)
            self._by_arn[arn] = Webhook(section) if arn.endswith(":webhook") else NatsStream(section)

    def knows(self, arn: str) -> bool:
        return arn in self._by_arn

    async def send(self, arn: str, body: bytes) -> None:
        """Raises DeliveryFailed."""
        destination = self._by_arn.get(arn)
        if destination is None:
            raise DeliveryFailed("there is no such destination")
        for attempt in range(ATTEMPTS):
            try:
                async with asyncio.timeout(destination.timeout_s):
                    await destination.send(body)
                return
            except (DeliveryFailed, TimeoutError) as error:
                if attempt == ATTEMPTS - 1:
                    raise DeliveryFailed(str(error) or f"no answer within {destination.timeout_s:g} s") from None
            await asyncio.sleep(PAUSE_S * 2**attempt)

    async def close(self) -> None:
        for destination in self._by_arn.values():
            await destination.close()


class Webhook:
    def __init__(self, section: NotificationSection) -> None:
        self.timeout_s = section.timeout_s
        self._url = section.url
        self._headers = {"Content-Type": "application/json", "User-Agent": "storaged"}
        if secret := _secret_of(section):
            self._headers["Authorization"] = f"Bearer {secret}"
        self._tls = _tls_of(section)
        self._session: aiohttp.ClientSession | None = None

    async def send(self, body: bytes) -> None:
        """Raises DeliveryFailed."""
        if self._session is None:
            self._session = aiohttp.ClientSession()
        try:
            async with self._session.post(
                self._url, data=body, headers=self._headers, ssl=self._tls or True, allow_redirects=False
            ) as answer:
                await answer.content.read(ANSWER_BYTES_MAX)
                if not 200 <= answer.status < 300:
                    raise DeliveryFailed(f"it answers {answer.status}")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise DeliveryFailed(str(error) or type(error).__name__) from None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class NatsStream:
    """A subject that a stream of JetStream keeps."""

    def __init__(self, section: NotificationSection) -> None:
        if nats is None:
            raise ConfigInvalid(
                f"notifications: {section.name}: the client of NATS is not installed. Install it with"
                " `pip install 'storaged[nats]'`."
            )
        self.timeout_s = section.timeout_s
        found = urlsplit(section.url)
        self._server = f"{found.scheme}://{found.netloc}"
        self._subject = found.path.lstrip("/")
        self._secret = _secret_of(section)
        self._tls = _tls_of(section) if found.scheme == "tls" else None
        self._client: Any = None
        self._connecting = asyncio.Lock()

    async def send(self, body: bytes) -> None:
        """Raises DeliveryFailed."""
        try:
            client = await self._connected()
            await client.jetstream(timeout=self.timeout_s).publish(self._subject, body)
        except (NatsError, OSError) as error:
            raise DeliveryFailed(str(error) or type(error).__name__) from None

    async def _connected(self) -> Any:
        async with self._connecting:
            if self._client is None or self._client.is_closed:
                options: dict[str, Any] = {"token": self._secret} if self._secret else {}
                if self._tls is not None:
                    options["tls"] = self._tls
                self._client = await nats.connect(
                    self._server, allow_reconnect=True, max_reconnect_attempts=-1, error_cb=_ignore, **options
                )
            return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()


async def _ignore(_error: Exception) -> None:
    """What fails is reported by the call that fails."""


def _secret_of(section: NotificationSection) -> str:
    """Raises ConfigInvalid."""
    if not section.secret:
        return ""
    try:
        lines = Path(section.secret).read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"notifications: {section.name}: the secret can't be read: {error}") from None
    if not lines or not lines[0].strip().isprintable() or not lines[0].strip():
        raise ConfigInvalid(f"notifications: {section.name}: the first line of {section.secret} is no secret")
    return lines[0].strip()


def _tls_of(section: NotificationSection) -> ssl.SSLContext | None:
    """Raises ConfigInvalid."""
    if urlsplit(section.url).scheme not in ("https", "tls"):
        return None
    try:
        return ssl.create_default_context(cafile=section.authority or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigInvalid(f"notifications: {section.name}: {section.authority} can't be read: {error}") from None
