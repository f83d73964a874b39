"""Where notifications go, as a port: the operator's configuration names destinations by ARNs."""

from __future__ import annotations

from typing import Protocol


class DeliveryFailed(Exception):
    """The destination has not acknowledged; it may have the event all the same."""


class Destinations(Protocol):
    def knows(self, arn: str) -> bool: ...

    async def send(self, arn: str, body: bytes) -> None:
        """Returns when the destination has acknowledged. Raises DeliveryFailed."""
