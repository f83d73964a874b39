"""The configuration of a bucket: one immutable value with an entry for each kind that was set. Pure.

Theory of operation. The record of a bucket has the whole configuration as one sealed field (FORMATS.md, Records). So
the authenticator of the record covers it, one compare-and-set changes it, and code that has the record has the
configuration: a request reads nothing more. An entry is the encoded message of its kind; it is decoded when it is first
asked for, and kept.

``Kind.plain`` says of a value that a request of the bucket's owner for an object need not look at it. The record has
one bit: all its entries are plain. The short way of small requests asks for that bit alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from storaged.errors import DataDamaged, InvalidRequest, ServiceUnavailable
from storaged.units import KIB
from storaged.wire import Message, decode, encode

T = TypeVar("T", bound=Message)
D = TypeVar("D")

BYTES_MAX = 256 * KIB
"""All entries of a bucket together. The record is read again every second while the bucket is in use."""

FORMAT = 1


class StoredConfiguration(Message, frozen=True):
    """Sealed in ``BucketRecord.configuration``. ``entries``: name of the kind -> its encoded message."""

    format: int
    entries: dict[str, bytes]


def _never(value: Any) -> bool:
    return False


@dataclass(frozen=True)
class Kind(Generic[T]):
    """One kind of configuration. ``name`` is stored: it never changes.

    ``plain``: see the module. ``audited``: each change has an entry in the audit log.
    """

    name: str
    message: type[T]
    plain: Callable[[T], bool] = _never
    audited: bool = True


class Configuration:
    """The entries of one bucket. Immutable: ``having`` and ``lacking`` return another one."""

    __slots__ = ("_derived", "_values", "entries")

    def __init__(self, entries: Mapping[str, bytes]) -> None:
        self.entries = entries
        self._values: dict[str, Any] = {}
        self._derived: dict[Any, Any] = {}

    def get(self, kind: Kind[T]) -> T | None:
        """What was set; None: nothing was. Raises DataDamaged."""
        found: T | None = self._values.get(kind.name)
        if found is None and kind.name in self.entries:
            try:
                found = self._values[kind.name] = decode(self.entries[kind.name], kind.message)
            except msgspec.MsgspecError as error:
                raise DataDamaged(f"The configuration «{kind.name}» of this bucket cannot be read: {error}") from None
        return found

    def derive(self, make: Callable[[Configuration], D]) -> D:
        """``make`` of this configuration, made once."""
        if make not in self._derived:
            self._derived[make] = make(self)
        found: D = self._derived[make]
        return found

    def having(self, kind: Kind[T], value: T | None) -> Configuration:
        """With another value of one kind. None: without that kind. Raises InvalidRequest for too much in all."""
        entries = dict(self.entries)
        if value is None:
            entries.pop(kind.name, None)
        else:
            entries[kind.name] = encode(value)
        size = sum(map(len, entries.values()))
        if size > BYTES_MAX and value is not None:
            raise InvalidRequest(
                f"The configurations of a bucket may have {BYTES_MAX // KIB} KiB in all; they would have"
                f" {size // KIB + 1} KiB."
            )
        return Configuration(entries)

    def is_plain(self, kinds: Iterable[Kind[Any]]) -> bool:
        return all(kind.plain(value) for kind in kinds if (value := self.get(kind)) is not None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Configuration) and self.entries == other.entries

    __hash__ = None  # type: ignore[assignment]


NOTHING = Configuration({})


def packed(configuration: Configuration) -> bytes:
    """The bytes to be sealed; empty when nothing is set."""
    return encode(StoredConfiguration(FORMAT, dict(configuration.entries))) if configuration.entries else b""


def unpacked(data: bytes, known: Iterable[Kind[Any]]) -> Configuration:
    """The reverse of ``packed``. Raises DataDamaged, and ServiceUnavailable for what a newer gateway wrote: this one
    could not honour it.
    """
    try:
        stored = decode(data, StoredConfiguration)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"The configuration of this bucket cannot be read: {error}") from None
    newer = sorted(stored.entries.keys() - {kind.name for kind in known})
    if stored.format != FORMAT or newer:
        raise ServiceUnavailable(
            f"A newer version has configured this bucket ({', '.join(newer) or f'format {stored.format}'}): this"
            " gateway can't honour that, and must be upgraded."
        )
    return Configuration(stored.entries)
