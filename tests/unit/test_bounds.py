"""Both ends of each bound that acceptors check: the last value that they take, and the first that they refuse."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from storaged.cluster.layout import SYSTEM_PARTITION
from storaged.errors import InvalidRequest
from storaged.hashes import page_hash
from storaged.meta import messages
from storaged.meta.consensus.bounds import (
    check_created,
    check_epoch,
    check_fence,
    check_floor,
    check_name,
    check_page,
    check_pages,
    check_register,
    check_value,
)
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility

NAME = RegisterName(Table.OBJECT, b"s" * 16, 3, b"key")
PART = NAME._replace(table=Table.PART)
BALLOT = Ballot(1, 1, "gw", b"incarnat")
VALUE = Value(2, b"o" * 16, Visibility.LIVE, b"v")
CREATED = Value(1, b"o" * 14 + bytes(2), Visibility.LIVE, b"v")
LARGE = bytes(4 << 20)
"""As large as a value and a page may be."""


def _name(**fields: object) -> Callable[[], None]:
    return lambda: check_name(NAME._replace(**fields), BALLOT)  # type: ignore[arg-type]


def _ballot(**fields: object) -> Callable[[], None]:
    return lambda: check_name(NAME, BALLOT._replace(**fields))  # type: ignore[arg-type]


def _value(**fields: object) -> Callable[[], None]:
    return lambda: check_value(msgspec.structs.replace(VALUE, **fields))


def _page(body: bytes, owner: bytes = b"") -> Callable[[], None]:
    return lambda: check_page(messages.PagePut("d", page_hash(body), body, owner=owner))


def _fence(scope: bytes, nonce: bytes) -> Callable[[], None]:
    return lambda: check_fence(messages.FenceSet("d", scope, nonce))


def _floor(**fields: object) -> Callable[[], None]:
    return lambda: check_floor(NAME.prefix, Ballot(1, 1, "", b"")._replace(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "check",
    [
        lambda: check_register(NAME),
        _name(key=b"k"),
        _name(key=b"k" * 1041),
        _name(shard=0),
        _name(shard=255),
        _name(table=255),
        _ballot(counter=1 << 62),
        _ballot(epoch=0),
        _ballot(epoch=1 << 62),
        _ballot(node="n" * 63),
        _ballot(incarnation=b"i" * 8),
        _value(body=LARGE),
        _value(visibility=int(Visibility.TOMBSTONE)),
        lambda: check_created(NAME, CREATED, True),
        lambda: check_created(PART, VALUE, False),
        _page(LARGE),
        _page(b"page", NAME.pack()),
        lambda: check_pages(messages.PageCheck("d", (bytes(16),) * 256)),
        _fence(b"s" * 16, b"n"),
        _fence(b"s" * 16, b"n" * 64),
        _floor(counter=1),
        _floor(counter=1 << 62),
        _floor(epoch=0),
        _floor(epoch=1 << 62),
        lambda: check_epoch(0, 0),
        lambda: check_epoch(1 << 62, SYSTEM_PARTITION),
        lambda: check_epoch(1, messages.WHOLE_DISK),
    ],
)
def test_the_last_value_within_a_bound_is_taken(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    [
        _name(key=b""),
        _name(key=b"k" * 1042),
        _name(scope=b"s" * 15),
        _name(scope=b"s" * 17),
        _name(shard=256),
        _name(shard=-1),
        _name(table=256),
        _name(table=-1),
        _ballot(counter=0),
        _ballot(counter=(1 << 62) + 1),
        _ballot(epoch=-1),
        _ballot(epoch=(1 << 62) + 1),
        _ballot(node="n" * 64),
        _ballot(incarnation=b"i" * 9),
        _value(body=LARGE + b"x"),
        _value(visibility=int(Visibility.TOMBSTONE) - 1),
        _value(visibility=int(Visibility.LIVE) + 1),
        lambda: check_created(PART, VALUE, True),
        lambda: check_created(PART, CREATED, False),
        _page(LARGE + b"x"),
        lambda: check_page(messages.PagePut("d", page_hash(b"other"), b"page")),
        _page(b"page", PART.pack()),
        _page(b"page", b"no register"),
        lambda: check_pages(messages.PageCheck("d", (bytes(16),) * 257)),
        _fence(b"s" * 15, b"n"),
        _fence(b"s" * 17, b"n"),
        _fence(b"s" * 16, b""),
        _fence(b"s" * 16, b"n" * 65),
        _floor(counter=0),
        _floor(counter=(1 << 62) + 1),
        _floor(epoch=-1),
        _floor(epoch=(1 << 62) + 1),
        _floor(node="n"),
        _floor(incarnation=b"i"),
        lambda: check_floor(NAME.prefix + b"k", Ballot(1, 1, "", b"")),
        lambda: check_floor(bytes([Table.SYSTEM]) + NAME.prefix[1:], Ballot(1, 1, "", b"")),
        lambda: check_epoch(-1, 0),
        lambda: check_epoch((1 << 62) + 1, 0),
        lambda: check_epoch(1, SYSTEM_PARTITION + 1),
        lambda: check_epoch(1, -2),
    ],
)
def test_the_first_value_beyond_a_bound_is_refused(check: Callable[[], None]) -> None:
    with pytest.raises(InvalidRequest):
        check()
