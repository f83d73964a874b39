"""Keeps the settings of moves (``cluster.move_settings``) current on a node, and changes them on a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import MsgspecError

from storaged.cluster.move_settings import PATH, UNKNOWN, MoveSettings, changed, signed_bytes
from storaged.cluster.signers import is_signed
from storaged.errors import CertificateRefused, StoragedError
from storaged.meta.names import Change, Value, system_name
from storaged.meta.ports import Registers
from storaged.wire import decode, encode

EVERY_S = 10.0
RETRY_S = 2.0

log = structlog.get_logger("partitions")

KeyOf = Callable[[bytes], Awaitable[Ed25519PublicKey]]
"""``await key_of(signer)``: as ``cluster.signers.Signers.key``."""


class FollowedSettings:
    """``current`` is UNKNOWN until the register was read. ``run`` is its task."""

    def __init__(self, registers: Registers, key_of: KeyOf, cluster: str) -> None:
        self._registers = registers
        self._key_of = key_of
        self._cluster = cluster
        self.current = UNKNOWN
        self.problem = ""
        """Why the register is not believed; empty while it is."""

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                await self.read()
                rest_s = EVERY_S
            except (StoragedError, TimeoutError) as error:
                rest_s = RETRY_S
                log.info("the settings of moves are read later", reason=str(error))
            await asyncio.sleep(rest_s)

    async def read(self) -> None:
        """Raises ServiceUnavailable without a majority of the system partition. What no gateway signed, and what is
        older than what is known, changes nothing.
        """
        found = (await self._registers.read(system_name(PATH))).value
        reason = await self._take(found)
        if reason and reason != self.problem:
            log.error("the settings of moves are not believed", reason=reason)
        self.problem = reason

    async def _take(self, value: Value | None) -> str:
        if value is None or not value.body:
            if self.current.revision < 0:
                self.current = MoveSettings()
            return ""
        try:
            settings = decode(value.body, MoveSettings)
            if settings.revision <= self.current.revision:
                return ""
            key = await self._key_of(settings.signer)
        except (MsgspecError, CertificateRefused) as error:
            return str(error)
        if not is_signed(key, signed_bytes(self._cluster, settings), settings.signature):
            return "their signature does not hold"
        self.current = settings
        return ""

    async def change(
        self,
        job: str,
        now_ms: int,
        sign: Callable[[MoveSettings], MoveSettings],
        *,
        paused: bool | None = None,
        pace: int | None = None,
    ) -> MoveSettings:
        """By compare-and-set; ``paused``, ``pace``: None leaves it as it is. Raises ServiceUnavailable, and
        InvalidArgument for a job or a pace that can't be.
        """
        await self.read()

        def update(value: Value | None) -> Change:
            base = self._base(value, sign)
            return Change(encode(sign(changed(base, job, now_ms, paused=paused, pace=pace))))

        outcome = await self._registers.change(system_name(PATH), update)
        self.problem = await self._take(outcome.after)
        return self.current

    def _base(self, value: Value | None, sign: Callable[[MoveSettings], MoveSettings]) -> MoveSettings:
        """What a change goes out from: a value that no gateway signed is written over."""
        known = self.current if self.current.revision >= 0 else MoveSettings()
        try:
            held = decode(value.body, MoveSettings) if value is not None and value.body else known
        except MsgspecError:
            return known
        return held if held.revision > known.revision and sign(held) == held else known
