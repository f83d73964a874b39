"""The places of a gateway's bucket keys, as ports of the key plane: the ring's registers, and this gateway's own
copies.

The first process of a gateway opens the log of copies (``FirstCopies``). Further workers ask it over their socket
(``LeaderCopies``; ``CopiesDesk`` answers). They report damaged registers to it too, as it answers ``status``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Final

import structlog

from storaged.admin.status import KeyDamage
from storaged.clock import Clock
from storaged.errors import KeyringUnavailable, OperatorError, StoragedError
from storaged.keys import CopyLog, KeyChange, KeyCopies, Keyring, StoredRegister
from storaged.meta.names import SYSTEM_SCOPE, Change, Table, Value, Visibility, system_name
from storaged.meta.ports import PageQuery, Registers, Scanner
from storaged.node.leader import Leader

MENDED_SHOWN_MS: Final = 24 * 3600 * 1000
"""A repaired register is shown for a day, as something had destroyed it."""
DAMAGE_KEPT_MAX: Final = 1000
FIRST_PROCESS_WAIT_S: Final = 10.0
"""A worker's keyring may open before that of the first process."""
EXPIRED_EVERY_S: Final = 60.0

log = structlog.get_logger("keys")


class RingRegisters:
    """``keys.ports.SystemRegisters`` over the ring."""

    def __init__(self, registers: Registers, scanner: Scanner) -> None:
        self._registers = registers
        self._scanner = scanner

    async def read(self, path: str) -> StoredRegister | None:
        return _kept((await self._registers.read(system_name(path))).value)

    async def change(
        self, path: str, update: Callable[[StoredRegister | None], KeyChange | None]
    ) -> StoredRegister | None:
        def step(value: Value | None) -> Change | None:
            change = update(_kept(value))
            if change is None:
                return None
            return Change(change.body, Visibility.TOMBSTONE if change.gone else Visibility.LIVE)

        return _kept((await self._registers.change(system_name(path), step)).after)

    async def scan(self, prefix: str) -> AsyncIterator[tuple[str, StoredRegister]]:
        after: bytes | None = b""
        while after is not None:
            page = await self._scanner.list_page(
                PageQuery(Table.SYSTEM, SYSTEM_SCOPE, [0], prefix=prefix.encode(), after=after)
            )
            for row in page.rows:
                yield row.key.decode("utf-8", "replace"), StoredRegister(row.value.sequence, row.value.body)
            after = page.next_after


def _kept(value: Value | None) -> StoredRegister | None:
    return None if value is None else StoredRegister(value.sequence, value.body)


class FirstCopies:
    """``keys.ports.KeyCopies`` in the process that has the log, with the facts for ``status`` and ``doctor``."""

    def __init__(self, copies: CopyLog, clock: Clock) -> None:
        self.log = copies
        self._clock = clock
        self._damage: dict[bytes, KeyDamage] = {}
        self._mended_ms: dict[bytes, int] = {}
        self.get, self.keep, self.forget, self.every = copies.get, copies.keep, copies.forget, copies.every

    def report(self, bucket_id: bytes, damage: str, mended: bool) -> None:
        known = self._damage.get(bucket_id)
        if not damage and (known is None or known.mended):
            return
        if known is None and len(self._damage) >= DAMAGE_KEPT_MAX:
            return
        now = self._clock.wall_ms()
        since = now if known is None else known.since_ms
        detail = damage or (known.detail if known is not None else "")
        self._damage[bucket_id] = KeyDamage(bucket_id.hex(), detail, since, mended)
        if mended:
            self._mended_ms[bucket_id] = now
        else:
            self._mended_ms.pop(bucket_id, None)

    def damaged(self) -> list[KeyDamage]:
        """What is damaged, and what was repaired within a day."""
        oldest = self._clock.wall_ms() - MENDED_SHOWN_MS
        for bucket_id in [other for other, mended_ms in self._mended_ms.items() if mended_ms < oldest]:
            del self._mended_ms[bucket_id], self._damage[bucket_id]
        return sorted(self._damage.values())


class LeaderCopies:
    """``keys.ports.KeyCopies`` in a further worker. ``every`` is left to the first process."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader

    async def _ask(self, what: str, **more: Any) -> str:
        error, answer = await self._leader.ask({"tell": "keys", "what": what, **more})
        if error:
            raise KeyringUnavailable(f"This gateway's copies of bucket keys cannot be had: {error.rstrip('.')}.")
        return answer

    async def get(self, bucket_id: bytes) -> bytes | None:
        return bytes.fromhex(await self._ask("get", buckets=[bucket_id.hex()])) or None

    async def keep(self, bucket_id: bytes, copy: bytes) -> None:
        await self._ask("keep", buckets=[bucket_id.hex()], copy=copy.hex())

    async def forget(self, bucket_ids: Iterable[bytes]) -> None:
        await self._ask("forget", buckets=[bucket_id.hex() for bucket_id in bucket_ids])

    async def every(self) -> dict[bytes, bytes]:
        raise KeyringUnavailable("Only the first process of a gateway looks after its copies of bucket keys.")

    def report(self, bucket_id: bytes, damage: str, mended: bool) -> None:
        found = {"buckets": [bucket_id.hex()], "damage": damage, "mended": mended}
        self._leader.tell({"tell": "keys", "what": "report", **found})


class CopiesDesk:
    """Answers ``LeaderCopies`` in the first process, once its own keyring is open."""

    def __init__(self) -> None:
        self._copies: KeyCopies | None = None
        self._there = asyncio.Event()

    def open(self, copies: KeyCopies) -> None:
        self._copies = copies
        self._there.set()

    async def serve(self, question: Mapping[str, Any]) -> str:
        """Answers one question, in hex. Raises KeyringUnavailable."""
        try:
            async with asyncio.timeout(FIRST_PROCESS_WAIT_S):
                await self._there.wait()
        except TimeoutError:
            raise KeyringUnavailable("the gateway's first process has no keyring open") from None
        assert self._copies is not None
        buckets = [bytes.fromhex(text) for text in question["buckets"]]
        if question["what"] == "get":
            return (await self._copies.get(buckets[0]) or b"").hex()
        if question["what"] == "keep":
            await self._copies.keep(buckets[0], bytes.fromhex(question["copy"]))
        elif question["what"] == "forget":
            await self._copies.forget(buckets)
        elif question["what"] == "report":
            self._copies.report(buckets[0], question["damage"], question["mended"])
        return ""


async def take_restored(keyring: Keyring, copies: CopyLog) -> None:
    """Moves the keys that `storaged keys restore` left in the directory into the log, and into damaged registers.

    A key that can't be taken now stays in the directory.
    """
    try:
        found = await copies.restored()
        if not found:
            return
        taken = await keyring.homes.import_copies(found)
        await copies.remove_restored()
        log.info("bucket keys of a backup were taken", keys=len(found), new_or_mended=taken)
    except (StoragedError, OSError) as error:
        reason = error.message if isinstance(error, StoragedError) else error.strerror or str(error)
        code = error.code if isinstance(error, OperatorError) else ""
        log.error("bucket keys of a backup could not be taken now", code=code, reason=reason)
