"""What is stored about notifications: which events of a bucket go to which destination. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from storaged.objects.configuration.document import Kind
from storaged.wire import Message


class NotificationRule(Message, frozen=True):
    """``events``: names with or without ``*`` at the end, such as ``ObjectCreated:*``, without ``s3:``. ``prefix``,
    ``suffix``: of keys; empty: any. ``destination``: an ARN of the operator's configuration.
    """

    id: str
    destination: str
    events: tuple[str, ...]
    prefix: str = ""
    suffix: str = ""

    def wants(self, event: str, key: bytes) -> bool:
        return (
            key.startswith(self.prefix.encode())
            and key.endswith(self.suffix.encode())
            and any(covers(wanted, event) for wanted in self.events)
        )


class Notification(Message, frozen=True):
    """Without rules when the configuration was removed: that bucket may still have events to be given up."""

    rules: tuple[NotificationRule, ...] = ()

    def wanting(self, event: str, key: bytes) -> Iterator[NotificationRule]:
        return (rule for rule in self.rules if rule.wants(event, key))


def covers(wanted: str, event: str) -> bool:
    return event.startswith(wanted[:-1]) if wanted.endswith("*") else wanted == event


def _is_empty(value: Any) -> bool:
    return not value.rules


NOTIFICATION = Kind("notification", Notification, plain=_is_empty)
