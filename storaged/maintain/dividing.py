"""Asks gateways to code what registers keep whole, since the layout trusts no operator alone (``cluster.spread``): only
with its key a small body can be divided (``objects.write.divide``). Repair finds them like objects under an old
profile, and comes to them last.
"""

from __future__ import annotations

from storaged.errors import StoragedError
from storaged.maintain.asks import Divide, DividedNames
from storaged.maintain.context import MaintainContext

NAMES_A_CALL = 32


class Divider:
    """Registers that wait to be asked about. ``full``: as many as go into a call."""

    def __init__(self, context: MaintainContext) -> None:
        self._context = context
        self._waiting: dict[bytes, None] = {}

    def add(self, name: bytes) -> None:
        self._waiting[name] = None

    def has(self, name: bytes) -> bool:
        return name in self._waiting

    @property
    def full(self) -> bool:
        return len(self._waiting) >= NAMES_A_CALL

    async def ask(self) -> dict[bytes, str]:
        """Asks about all that wait. Returns for each why it stays; empty where it does not."""
        names, self._waiting = tuple(self._waiting), {}
        if not names:
            return {}
        try:
            found = await self._context.asks.ask("divide", Divide(names), DividedNames)
        except (StoragedError, TimeoutError) as error:
            return dict.fromkeys(names, f"no gateway codes it now: {error}")
        return dict.fromkeys(names, "") | dict(zip(names, found.reasons, strict=False))
