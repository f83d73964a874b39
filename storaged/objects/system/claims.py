"""Registers ``username/NAME``: which access key a user's name belongs to.

A claim grants nothing: adding or removing a user by name reads the user's own record too. But a forged claim could keep
a name from being used. So a claim carries an authenticator of the keyring over its register's name and sequence number,
as the records of users and buckets do.

Claims from before version 3 of the internode protocol carry none. The first gateway that opens the keyring writes them
again with one (``authenticate_all``), and then notes in the cluster's record that all have one (``node.binding``). From
then on a claim without an authenticator is refused: otherwise leaving it out would be a way to forge.
"""

from __future__ import annotations

from typing import Final

import msgspec

from storaged.errors import DataDamaged
from storaged.meta.listing.merge import every_row
from storaged.meta.names import SYSTEM_SCOPE, Change, RegisterName, Table, Value, Visibility, system_name
from storaged.meta.ports import PageQuery
from storaged.objects.plane import ObjectPlane
from storaged.objects.system import rows
from storaged.wire import Message, decode

PREFIX = "username/"


class NameClaim(Message, frozen=True):
    """``username/NAME``: the access key that the name belongs to; empty when it was freed. ``authenticator``: empty in
    claims from before there was one.
    """

    access_key: str
    claimed_ms: int
    authenticator: bytes = b""


DAMAGED: Final = NameClaim("", -1)
"""Represents a claim that can't be used. It grants nothing, and belongs to the user of that name if there is one."""


def decode_claim(plane: ObjectPlane, register: RegisterName, value: Value | None) -> NameClaim | None:
    """None when there is none. Raises DataDamaged for a claim that no gateway of this cluster wrote."""
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return None
    return _verified(plane, register, value)


def _verified(plane: ObjectPlane, register: RegisterName, value: Value) -> NameClaim:
    try:
        claim = decode(value.body, NameClaim)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"The record of a user's name cannot be read: {error}") from None
    if not claim.authenticator and not plane.names_authenticated():
        return claim
    if not rows.is_authentic(plane.keys, register, value, claim, claim.authenticator):
        raise DataDamaged("The record of a user's name is not authentic.")
    return claim


def claim_of(plane: ObjectPlane, register: RegisterName, value: Value | None) -> NameClaim | None:
    """As ``decode_claim``; DAMAGED for one that can't be used."""
    try:
        return decode_claim(plane, register, value)
    except DataDamaged:
        return DAMAGED


def claim_change(plane: ObjectPlane, register: RegisterName, before: Value | None, claim: NameClaim) -> Change:
    """The change that writes ``claim`` over ``before``, with its authenticator."""
    return rows.authenticated_change(plane.keys, register, before, claim)


def release_change(plane: ObjectPlane, register: RegisterName, before: Value | None) -> Change:
    """The change that frees a name: a claim for no access key, so that it is as authentic as what it ends."""
    return claim_change(plane, register, before, NameClaim("", plane.clock.wall_ms()))._replace(
        visibility=Visibility.TOMBSTONE
    )


def require_authentic(plane: ObjectPlane, register: RegisterName, value: Value) -> None:
    """Raises DataDamaged for a value that no gateway of this cluster wrote, also for the end of a claim. (Older claims
    left nothing when they ended: that counts when a majority holds it.)
    """
    claim = _verified(plane, register, value)
    if (value.visibility == Visibility.TOMBSTONE) != (claim.access_key == ""):
        raise DataDamaged("The record of a user's name says otherwise than its row.")


async def authenticate_all(plane: ObjectPlane) -> int:
    """Writes an authenticator into every claim that has none, and returns their number. Raises ServiceUnavailable
    without a majority: then call it again.
    """
    count = 0
    async for row in every_row(plane.scanner, PageQuery(Table.SYSTEM, SYSTEM_SCOPE, [0], prefix=PREFIX.encode())):
        register = RegisterName(Table.SYSTEM, SYSTEM_SCOPE, 0, row.key)
        if _bare(row.value) is None:
            continue

        def update(value: Value | None, register: RegisterName = register) -> Change | None:
            claim = _bare(value)
            return None if claim is None else claim_change(plane, register, value, claim)

        outcome = await plane.registers.change(register, update)
        count += outcome.after != outcome.before
    return count


def _bare(value: Value | None) -> NameClaim | None:
    """A claim without an authenticator. One that can't be decoded is left as it is: it is named in
    ``plane.bad_rows``.
    """
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return None
    try:
        claim = decode(value.body, NameClaim)
    except msgspec.MsgspecError:
        return None
    return None if claim.authenticator else claim


def register_of(name: str) -> RegisterName:
    return system_name(PREFIX + name)
