"""What is stored about other origins: the rules by which browsers may use a bucket. Pure."""

from __future__ import annotations

from typing import Any

from storaged.objects.configuration.document import Kind
from storaged.wire import Message


def _always(value: Any) -> bool:
    return True


class CorsRule(Message, frozen=True):
    """``origins``, ``headers``: with at most one ``*`` each. ``expose``: headers that scripts may read. ``max_age_s``:
    how long a browser keeps the answer to a preflight; None: as long as it likes.
    """

    origins: tuple[str, ...]
    methods: tuple[str, ...]
    headers: tuple[str, ...] = ()
    expose: tuple[str, ...] = ()
    max_age_s: int | None = None
    id: str = ""


class Cors(Message, frozen=True):
    rules: tuple[CorsRule, ...]


CORS = Kind("cors", Cors, plain=_always)
