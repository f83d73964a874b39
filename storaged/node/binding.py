"""The register ``cluster``: it binds a ring to one cluster and one keyring, and says which records carry
authenticators.

The first gateway that opens the cluster's keyring writes it, once. It carries an authenticator of that keyring over its
name and sequence number. Records from before version 3 of the internode protocol carry none. They are written again
with one, together with the mark that the names of users have theirs (``objects.system.claims``). A gateway that has
seen the mark records this in a file: when the mark is missing later, somebody put an old record back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec
import structlog

from storaged.clock import Clock
from storaged.durable import replace_file
from storaged.errors import KeyringMismatch, StoragedError
from storaged.meta.names import Change, Value, system_name
from storaged.meta.ports import Registers
from storaged.objects.system.rows import context_of, sequence_after
from storaged.wire import Message, decode, encode

CLUSTER: Final = system_name("cluster")
REMEMBERED_FILE = "records-authenticated"
RETRY_S = 15.0

NAMES_AUTHENTICATED: Final = 1
"""``ClusterRecord.authenticated``: this record and all claims of names carry an authenticator."""

log = structlog.get_logger("gateway")


class ClusterRecord(Message, frozen=True):
    """The value of the register ``cluster``: the cluster, and the keyring that seals its keys.

    ``authenticated`` is 0 in older records; their ``authenticator`` is empty.
    """

    cluster: str
    keyring: bytes
    created_ms: int
    authenticated: int = 0
    authenticator: bytes = b""


class Authenticates(Protocol):
    """The part of a keyring that is needed here."""

    def authenticate(self, context: Sequence[bytes], message: bytes) -> bytes: ...

    def verify(self, context: Sequence[bytes], message: bytes, tag: bytes) -> bool: ...


class Binding:
    """Use ``check`` before the keyring is used, ``confirm`` with it, ``finish`` afterwards."""

    def __init__(self, registers: Registers, cluster: str, clock: Clock, remembered: Path) -> None:
        """``remembered``: this file exists once this node has seen that records carry authenticators."""
        self._registers = registers
        self._cluster = cluster
        self._clock = clock
        self._remembered = remembered
        self.authenticated = False
        """Whether all records that should carry an authenticator do. Then one without is refused."""

    async def check(self, keyring_id: bytes) -> Value | None:
        """Reads the record; None when there is none yet. Raises KeyringMismatch for a record of another cluster or
        keyring, and ServiceUnavailable without a majority.
        """
        value = _written((await self._registers.read(CLUSTER)).value)
        if value is not None:
            self._check_record(_record_of(value), keyring_id)
        return value

    def _check_record(self, known: ClusterRecord, keyring_id: bytes) -> None:
        if known.cluster != self._cluster:
            raise KeyringMismatch(f"the ring belongs to the cluster {known.cluster}, this gateway to {self._cluster}")
        if known.keyring != keyring_id:
            raise KeyringMismatch(
                f"the keyring is {keyring_id.hex()}; this cluster was created with {known.keyring.hex()}"
            )

    async def confirm(self, value: Value | None, keyring_id: bytes, keyring: Authenticates) -> None:
        """Makes the record when there is none, else verifies it. Raises as ``check`` does, and KeyringMismatch for a
        record that no gateway with this keyring wrote.
        """
        if value is None:

            def create(present: Value | None) -> Change | None:
                if _written(present) is not None:
                    return None
                record = ClusterRecord(self._cluster, keyring_id, self._clock.wall_ms(), NAMES_AUTHENTICATED)
                return _change(present, record, keyring)

            value = (await self._registers.change(CLUSTER, create)).after
            assert value is not None
            self._check_record(_record_of(value), keyring_id)
            log.info("the cluster is bound to its keyring", cluster=self._cluster, keyring=keyring_id.hex())
        record = _record_of(value)
        if (record.authenticator or record.authenticated) and not keyring.verify(
            _context(value), _plain(record), record.authenticator
        ):
            raise KeyringMismatch(
                "the ring's record of the cluster is not authentic: no gateway with this keyring wrote it"
            )
        if not record.authenticated and self._remembered.exists():
            raise KeyringMismatch(
                "the ring's record of the cluster is not authentic: it had an authenticator, and has none now. "
                "If the whole cluster was put back to a state from before there was one "
                f"on purpose, remove {self._remembered}"
            )
        if record.authenticated >= NAMES_AUTHENTICATED:
            self._remember()

    def is_authentic(self, value: Value, keyring: Authenticates) -> bool:
        """Whether a gateway with this keyring wrote the record.

        True while the keyring is not open, and while it is unknown whether all records carry authenticators.
        """
        if not self.authenticated:
            return True
        try:
            record = _record_of(value)
            return bool(record.authenticated) and keyring.verify(_context(value), _plain(record), record.authenticator)
        except KeyringMismatch:
            return False
        except StoragedError:
            return True

    def _remember(self) -> None:
        self.authenticated = True
        if not self._remembered.exists():
            replace_file(self._remembered, b"Records of this cluster carry authenticators.\n")

    async def finish(self, keyring: Authenticates, authenticate_all: Callable[[], Awaitable[int]]) -> None:
        """Gives authenticators to records of earlier versions, then marks the cluster's record. Retries what fails."""
        while not self.authenticated:
            try:
                count = await authenticate_all()
                await self._mark(keyring)
                log.info("all records that grant something carry authenticators", names=count)
            except StoragedError as error:
                log.info("authenticators wait", reason=error.message)
                await asyncio.sleep(RETRY_S)

    async def _mark(self, keyring: Authenticates) -> None:
        def mark(value: Value | None) -> Change | None:
            record = _record_of(value) if value is not None else None
            if record is None or record.authenticated >= NAMES_AUTHENTICATED:
                return None
            return _change(value, msgspec.structs.replace(record, authenticated=NAMES_AUTHENTICATED), keyring)

        await self._registers.change(CLUSTER, mark)
        self._remember()


def _written(value: Value | None) -> Value | None:
    return value if value is not None and value.body else None


def _record_of(value: Value) -> ClusterRecord:
    try:
        return decode(value.body, ClusterRecord)
    except msgspec.MsgspecError as error:
        raise KeyringMismatch(f"the ring's record of the cluster cannot be read: {error}") from None


def _change(before: Value | None, record: ClusterRecord, keyring: Authenticates) -> Change:
    tag = keyring.authenticate(context_of(CLUSTER, sequence_after(before)), _plain(record))
    return Change(encode(msgspec.structs.replace(record, authenticator=tag)))


def _plain(record: ClusterRecord) -> bytes:
    return encode(msgspec.structs.replace(record, authenticator=b""))


def _context(value: Value) -> tuple[bytes, ...]:
    return context_of(CLUSTER, value.sequence)
