"""Rows of the system table, and those that can't be used: scans skip them, ``status`` names them, and they are healed
when a majority of their replicas has a valid one.

Theory of operation
    Buckets and users are rows of one table that many requests scan. A row that does not decode, or whose authenticator
    fails, was not written by a gateway of this cluster: it was damaged, or forged. It concerns only its owner, so scans
    go on without it, and ``BadRows`` keeps its name for ``status``. There are two cases:

    * One replica has it, under the ballot that the others have too. Then the ring can't tell which value is right, but
      the authenticator can: the value that verifies and that a majority has is written again by a change of its own,
      which reaches all replicas. An identity round is not enough: it might choose the forged value.
    * A majority has it. Nothing can restore the row; requests for this bucket or user are refused with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import structlog

from storaged.errors import DataDamaged, StoragedError
from storaged.meta.names import SYSTEM_SCOPE, Change, RegisterName, Table, Value, system_name
from storaged.meta.ports import PageQuery, Registers, Scanner
from storaged.objects.bad_rows import BadRows, display_name
from storaged.objects.ports import KeyService
from storaged.wire import Message, encode

log = structlog.get_logger(__name__)

T = TypeVar("T")

Decode = Callable[[RegisterName, "Value | None"], "T | None"]
"""``decode(name, value)``: the record; None when there is none. Raises DataDamaged for a row that can't be used."""


def context_of(name: RegisterName, sequence: int) -> tuple[bytes, ...]:
    """The context of a record's authenticator: with it, an older record can't be replayed under a newer sequence
    number.
    """
    return (name.pack(), sequence.to_bytes(8, "big"))


def sequence_after(before: Value | None) -> int:
    """The sequence number of a change of ``before``; 1 when the register was never written."""
    return (before.sequence if before is not None else 0) + 1


def authenticated_change(
    keys: KeyService,
    name: RegisterName,
    before: Value | None,
    record: Message,
    encoded: Callable[[Any], bytes] = encode,
) -> Change:
    """The change that writes ``record`` over ``before``, with its authenticator."""
    plain = msgspec.structs.replace(record, authenticator=b"")
    tag = keys.authenticate(context_of(name, sequence_after(before)), encoded(plain))
    return Change(encoded(msgspec.structs.replace(plain, authenticator=tag)))


def is_authentic(
    keys: KeyService,
    name: RegisterName,
    value: Value,
    record: Message,
    authenticator: bytes,
    encoded: Callable[[Any], bytes] = encode,
) -> bool:
    """Whether a gateway of this cluster wrote ``record``, decoded from ``value``."""
    plain = encoded(msgspec.structs.replace(record, authenticator=b""))
    return keys.verify(context_of(name, value.sequence), plain, authenticator)


async def scan(
    scanner: Scanner,
    bad_rows: BadRows,
    decode: Decode[T],
    prefix: bytes,
    *,
    after: bytes = b"",
    found: dict[bytes, str] | None = None,
) -> AsyncIterator[T]:
    """The records under ``prefix`` with a key > ``after``, by key. Rows that can't be used are noted in ``bad_rows``
    (and with their reasons in ``found``).

    Raises ServiceUnavailable when the system partition has no majority, KeyringUnavailable when nothing can be
    verified.
    """
    start: bytes | None = after
    while start is not None:
        page = await scanner.list_page(PageQuery(Table.SYSTEM, SYSTEM_SCOPE, [0], prefix=prefix, after=start))
        for row in page.rows:
            try:
                record = decode(RegisterName(Table.SYSTEM, SYSTEM_SCOPE, 0, row.key), row.value)
            except DataDamaged as error:
                bad_rows.note(row.key, error.message)
                if found is not None:
                    found[row.key] = error.message
                continue
            if record is not None:
                yield record
        start = page.next_after


async def scan_healed(
    scanner: Scanner, bad_rows: BadRows, decode: Decode[T], prefix: str, read_one: Callable[[str], Awaitable[T | None]]
) -> list[T]:
    """All records under ``prefix``. ``read_one`` (of the path without the prefix) heals a row that can't be used; a row
    that it can't heal is named in ``bad_rows``.

    Raises as ``scan``.
    """
    found: dict[bytes, str] = {}
    records = [record async for record in scan(scanner, bad_rows, decode, prefix.encode(), found=found)]
    for key in list(found):
        with contextlib.suppress(StoragedError, UnicodeDecodeError):
            healed = await read_one(key.decode().removeprefix(prefix))
            del found[key]
            records += [healed] if healed is not None else []
    bad_rows.replace(prefix.encode(), found)
    return records


async def read(
    registers: Registers, bad_rows: BadRows, decode: Decode[T], rewrite: Callable[[Value, T], Change], path: str
) -> T | None:
    """The record of one register, healed if possible. Raises DataDamaged when it is not, ServiceUnavailable without a
    majority.

    ``rewrite(value, record)``: the change that writes ``record`` in place of ``value``, with a new authenticator.
    """
    name = system_name(path)
    try:
        found = decode(name, (await registers.read(name)).value)
    except DataDamaged as error:
        healed = await heal(registers, decode, rewrite, name)
        if healed is None:
            bad_rows.note(name.key, error.message)
            raise
        found = healed
    if len(bad_rows):
        bad_rows.clear(name.key)
    return found


async def heal(
    registers: Registers, decode: Decode[T], rewrite: Callable[[Value, T], Change], name: RegisterName
) -> T | None:
    """Writes the usable value that a majority of the replicas has over the one that can't be used. Returns the record
    afterwards; None when there is no such majority.

    Raises ServiceUnavailable when the change could not be committed.
    """
    value = await registers.held_by_quorum(name, lambda held: _record_of(decode, name, held) is not None)
    record = _record_of(decode, name, value)
    if record is None:
        return None

    def update(present: Value | None) -> Change | None:
        if present is None or (present != value and not _is_bad(decode, name, present)):
            return None  # changed, or deleted, meanwhile
        return rewrite(present, record)

    after = (await registers.change(name, update)).after
    found = _record_of(decode, name, after)
    if found is not None:
        log.warning("a system record was healed from a majority of its replicas", record=display_name(name.key))
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
