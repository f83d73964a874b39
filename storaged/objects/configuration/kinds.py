"""The kinds of configuration that a bucket may have, and what is stored of each. Pure.

A new kind is a message, a ``Kind``, and a place in ``KINDS``; then a row in ``s3.ops.configuration`` parses and prints
it. Its fields are positional, as of every message.
"""

from __future__ import annotations

from typing import Any

from storaged.objects.configuration.document import Kind
from storaged.wire import Message


def _always(value: Any) -> bool:
    return True


class Tags(Message, frozen=True):
    tags: dict[str, str]


class Versioning(Message, frozen=True):
    """``status``: ENABLED or SUSPENDED. A bucket without an entry never had versioning."""

    status: str


ENABLED = "Enabled"
SUSPENDED = "Suspended"

TAGGING = Kind("tagging", Tags, plain=_always, audited=False)
VERSIONING = Kind("versioning", Versioning)

KINDS: tuple[Kind[Any], ...] = (TAGGING, VERSIONING)
"""All of them. A gateway refuses to serve a bucket that has another one."""
