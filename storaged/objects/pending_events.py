"""Events of objects on their way to destinations: what registers hold of them, and what a change says about itself.
Pure. ``write.outbox`` has the theory.
"""

from __future__ import annotations

from msgspec import Struct

from storaged.wire import Message


class PendingEvent(Message, frozen=True):
    """An event in the outbox of a key: one destination has not acknowledged it yet. ``id``: random. ``sealed``: an
    ``EventFacts``, under the list key of ``bucket_key``.
    """

    id: bytes
    bucket_key: int
    sealed: bytes


class EventFacts(Message, frozen=True):
    """What an event says. ``name``: as in AWS's document, such as ``ObjectCreated:Put``. ``destination``: an ARN.
    ``rule``: the id of the configuration that asks for it. ``sequence``: of the register, at the change.
    ``version_id``, ``etag``: empty where AWS leaves them out. ``requester``: an id; empty for nobody. ``number``: of
    the event among those of its change.
    """

    name: str
    destination: str
    rule: str
    sequence: int
    at_ms: int
    size: int = 0
    etag: str = ""
    version_id: str = ""
    requester: str = ""
    remote: str = ""
    request_id: str = ""
    number: int = 0


class PendingKeys(Message, frozen=True):
    """The register of ``meta.names.event_name``. ``stamps``: of each key that may have events in its outbox, what the
    last change of that key drew: the time of its gateway's clock (ms, 6 bytes), and random bytes.
    """

    stamps: dict[bytes, bytes]


class Origin(Struct, frozen=True):
    """What a request says about itself for the events of its change. ``name``: the event, such as
    ``ObjectCreated:Put``; of a deletion only the half before the colon.
    """

    name: str
    requester: str = ""
    remote: str = ""
    request_id: str = ""


CREATED = "ObjectCreated"
REMOVED = "ObjectRemoved"
EXPIRED = "LifecycleExpiration"
