"""Rows of the system table that can't be used: passed over, named, and healed where a majority of their replicas holds
a good one.

Theory of operation. Buckets and users are rows of one table that many requests scan. A row that does not decode, or
whose authenticator fails, was
not written by a gateway of this cluster: it was damaged, or forged. It concerns its owner alone, so scans go on without
it, and ``BadRows`` keeps its
name for ``status``. Two cases differ:

* One replica holds it, under the ballot that the others have too. Then the ring can't say which is right, but the
  authenticator can: the value that
  verifies and that a majority holds is written again by a change of its own, which reaches all replicas. An identity
  round would not do: it might
  choose the forged value.
* A majority holds it. Nothing can restore it; whoever asks for this bucket or user is refused with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import NamedTuple, TypeVar

import structlog

from storaged.errors import DataDamaged, StoragedError
from storaged.meta.names import SYSTEM_SCOPE, Change, RegisterName, Table, Value, system_name
from storaged.meta.ports import PageQuery, Registers, Scanner

log = structlog.get_logger(__name__)

BAD_ROWS_MAX = 1000
"""Names that are kept. Of more, the number is not known here."""

NAME_CHARS_MAX = 128
"""Of a row's name, as it is shown."""

T = TypeVar("T")

Decode = Callable[[RegisterName, "Value | None"], "T | None"]
"""``decode(name, value)``: the record; None where there is none. Raises DataDamaged for a row that can't be used."""


def context_of(name: RegisterName, sequence: int) -> tuple[bytes, ...]:
    """What the authenticator of a record is bound to, besides its fields: an older record can't be played back under a
    newer sequence number.
    """
    return (name.pack(), sequence.to_bytes(8, "big"))


def sequence_after(before: Value | None) -> int:
    """The sequence number that a change of ``before`` is written under; 1 where there was nothing."""
    return (before.sequence if before is not None else 0) + 1


class BadRow(NamedTuple):
    """``name`` as an operator reads it: ``bucket/photos``."""

    name: str
    reason: str


class BadRows:
    """What this process knows of rows that can't be used. Bounded; each is logged once while it stays bad."""

    def __init__(self) -> None:
        self._reasons: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def listed(self) -> list[BadRow]:
        return [BadRow(shown(key), reason) for key, reason in sorted(self._reasons.items())]

    def note(self, key: bytes, reason: str) -> None:
        if key in self._reasons or len(self._reasons) < BAD_ROWS_MAX:
            if self._reasons.get(key) != reason:
                log.error(
                    "a system record cannot be used", record=shown(key), reason=reason, code="SYSTEM_RECORD_DAMAGED"
                )
            self._reasons[key] = reason

    def clear(self, key: bytes) -> None:
        if self._reasons.pop(key, None) is not None:
            log.info("a system record can be used again", record=shown(key))

    def replace(self, prefix: bytes, found: Mapping[bytes, str]) -> None:
        """``found`` is what a whole scan of the rows under ``prefix`` came to."""
        for key in [key for key in self._reasons if key.startswith(prefix) and key not in found]:
            self.clear(key)
        for key, reason in found.items():
            self.note(key, reason)


def shown(key: bytes) -> str:
    """A row's key as text: what is not printable is escaped, what is long is cut."""
    return key[:NAME_CHARS_MAX].decode("utf-8", "backslashreplace").encode("unicode_escape").decode()


async def scan(
    scanner: Scanner,
    bad: BadRows,
    decode: Decode[T],
    prefix: bytes,
    *,
    after: bytes = b"",
    found: dict[bytes, str] | None = None,
) -> AsyncIterator[T]:
    """The records under ``prefix`` with a key > ``after``, by key. Rows that can't be used are noted in ``bad`` (and
    with their reasons in ``found``).

    Raises ServiceUnavailable when the system partition has no majority, KeyringUnavailable when nothing can be
    verified."""
    start: bytes | None = max(after, prefix)
    while start is not None:
        page = await scanner.list_page(PageQuery(Table.SYSTEM, SYSTEM_SCOPE, [0], prefix=prefix, after=start))
        for row in page.rows:
            try:
                record = decode(RegisterName(Table.SYSTEM, SYSTEM_SCOPE, 0, row.key), row.value)
            except DataDamaged as error:
                bad.note(row.key, error.message)
                if found is not None:
                    found[row.key] = error.message
                continue
            if record is not None:
                yield record
        start = page.next_after


async def scan_healed(
    scanner: Scanner, bad: BadRows, decode: Decode[T], prefix: str, read_one: Callable[[str], Awaitable[T | None]]
) -> list[T]:
    """All records under ``prefix``. What can't be used is healed by ``read_one`` (of the path without the prefix), or
    else named in ``bad``.

    Raises as ``scan``."""
    found: dict[bytes, str] = {}
    records = [record async for record in scan(scanner, bad, decode, prefix.encode(), found=found)]
    for key in list(found):
        with contextlib.suppress(StoragedError, UnicodeDecodeError):
            healed = await read_one(key.decode().removeprefix(prefix))
            del found[key]
            records += [healed] if healed is not None else []
    bad.replace(prefix.encode(), found)
    return records


async def read(
    registers: Registers, bad: BadRows, decode: Decode[T], renewed: Callable[[Value, T], Change], path: str
) -> T | None:
    """The record of one register, healed where that can be. Raises DataDamaged when it can't, ServiceUnavailable
    without a majority.

    ``renewed(value, record)``: the change that writes ``record`` in place of ``value``, authenticated anew."""
    name = system_name(path)
    try:
        found = decode(name, (await registers.read(name)).value)
    except DataDamaged as error:
        healed = await heal(registers, decode, renewed, name)
        if healed is None:
            bad.note(name.key, error.message)
            raise
        found = healed
    if len(bad):
        bad.clear(name.key)
    return found


async def heal(
    registers: Registers, decode: Decode[T], renewed: Callable[[Value, T], Change], name: RegisterName
) -> T | None:
    """Writes what a majority of the replicas holds and what can be used over what can't be. The record as it is then;
    None when there is no such majority.

    Raises ServiceUnavailable when the change could not be committed."""
    value = await registers.held_by_quorum(name, lambda held: _record_of(decode, name, held) is not None)
    record = _record_of(decode, name, value)
    if record is None:
        return None

    def update(present: Value | None) -> Change | None:
        if present is None or (present != value and not _is_bad(decode, name, present)):
            return None  # changed, or deleted, meanwhile
        return renewed(present, record)

    after = (await registers.change(name, update)).after
    found = _record_of(decode, name, after)
    if found is not None:
        log.warning("a system record was healed from a majority of its replicas", record=shown(name.key))
    return found


def _is_bad(decode: Decode[T], name: RegisterName, value: Value) -> bool:
    try:
        decode(name, value)
    except DataDamaged:
        return True
    return False


def _record_of(decode: Decode[T], name: RegisterName, value: Value | None) -> T | None:
    try:
        return decode(name, value)
    except DataDamaged:
        return None
