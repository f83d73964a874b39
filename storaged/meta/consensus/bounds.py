"""Bounds of requests that no acceptor takes, from any caller. Pure.

They are checked before anything is judged: a batch that the store refuses would make a replica silent. Everything here
raises InvalidRequest.
"""

from __future__ import annotations

from storaged.cluster.layout import SYSTEM_PARTITION
from storaged.errors import InvalidRequest
from storaged.hashes import is_page
from storaged.ids import INCARNATION_BYTES
from storaged.meta import messages
from storaged.meta.consensus.floors import FLOORED_TABLES
from storaged.meta.consensus.register import COUNTER_MAX, created, may_create
from storaged.meta.names import KEY_BYTES_MAX, PACKED_HEAD_BYTES, Ballot, RegisterName, Table, Value, Visibility
from storaged.units import MIB

VALUE_BYTES_MAX = 4 * MIB
PAGE_BYTES_MAX = 4 * MIB
NONCE_BYTES_MAX = 64
NODE_CHARS_MAX = 63
_LOWEST = Ballot(0, 1, "", b"")


def check_name(name: RegisterName, ballot: Ballot) -> None:
    table, scope, shard, key = name
    if (
        not 0 < len(key) <= KEY_BYTES_MAX or len(scope) != 16 or (table | shard) & ~0xFF
    ):  # a negative number has these bits
        raise InvalidRequest("Not the name of a register.")
    epoch, counter, node, incarnation = ballot
    if not 0 < counter <= COUNTER_MAX or not 0 <= epoch <= COUNTER_MAX:
        raise InvalidRequest(f"A ballot's counter lies in 1..2^62, its epoch in 0..2^62, not {counter} and {epoch}.")
    if len(node) > NODE_CHARS_MAX or len(incarnation) > INCARNATION_BYTES:
        raise InvalidRequest(
            f"A ballot's node has at most {NODE_CHARS_MAX} characters, its incarnation {INCARNATION_BYTES} bytes."
        )


def check_register(name: RegisterName) -> None:
    check_name(name, _LOWEST)


def check_value(value: Value) -> None:
    if len(value.body) > VALUE_BYTES_MAX:
        raise InvalidRequest(f"A value of {len(value.body)} bytes; the limit is {VALUE_BYTES_MAX}.")
    if not Visibility.TOMBSTONE <= value.visibility <= Visibility.LIVE:
        raise InvalidRequest(f"No visibility {value.visibility}.")


def check_created(name: RegisterName, value: Value, create: bool) -> None:
    """A create, or a value that was created, of a register that may not be."""
    if (create or created(value)) and not may_create(name):
        raise InvalidRequest(f"Only a register of an object may be created unasked, not one of table {name.table}.")


def check_page(request: messages.PagePut) -> None:
    if len(request.body) > PAGE_BYTES_MAX:
        raise InvalidRequest(f"A page of {len(request.body)} bytes; the limit is {PAGE_BYTES_MAX}.")
    if not is_page(request.body, request.page_hash):
        raise InvalidRequest("The page's bytes are not those that its hash names.")
    if request.owner:
        try:
            owner = RegisterName.unpack(request.owner)
        except ValueError as error:
            raise InvalidRequest(f"The owner of a page is no register: {error}") from None
        if owner.table != Table.OBJECT:
            raise InvalidRequest("The owner of a page is the register of an object.")


def check_pages(request: messages.PageCheck) -> None:
    if len(request.hashes) > messages.PAGES_A_CHECK:
        raise InvalidRequest(f"{len(request.hashes)} pages to check; the limit is {messages.PAGES_A_CHECK}.")


def check_fence(request: messages.FenceSet | messages.FenceLift) -> None:
    if len(request.scope) != 16 or not 0 < len(request.nonce) <= NONCE_BYTES_MAX:
        raise InvalidRequest("Not a fence of a bucket.")


def check_floor(prefix: bytes, floor: Ballot) -> None:
    """``prefix`` of a range: table || scope || shard."""
    if len(prefix) != PACKED_HEAD_BYTES or prefix[0] not in FLOORED_TABLES:
        raise InvalidRequest("Not a range of registers that may have a floor.")
    epoch, counter, node, incarnation = floor
    if node or incarnation or not 0 < counter <= COUNTER_MAX or not 0 <= epoch <= COUNTER_MAX:
        raise InvalidRequest(f"A floor is a ballot without a name, not {floor}.")


def check_epoch(epoch: int, partition: int) -> None:
    if not 0 <= epoch <= COUNTER_MAX:
        raise InvalidRequest(f"An epoch lies in 0..2^62, not {epoch}.")
    if partition != messages.WHOLE_DISK and not 0 <= partition <= SYSTEM_PARTITION:
        raise InvalidRequest(f"A partition lies in 0..{SYSTEM_PARTITION}, not {partition}.")
