"""A condition on an entity tag as a value: none (``None``), the object exists (``ANY``), or one of these tags
(``Tags``).

Empty is not absent: a header without any tag is ``NO_TAG``, which matches no object. Source: RFC 9110, sections 8.8.3
and 13.1.
"""

from __future__ import annotations

from msgspec import Struct


class AnyTag(Struct, frozen=True):
    """``*``: the object exists, with any tag."""


class Tags(Struct, frozen=True):
    """``strong`` and ``weak``: opaque tags without quotes. ``W/"x"`` is the weak tag ``x``."""

    strong: tuple[str, ...] = ()
    weak: tuple[str, ...] = ()


Condition = None | AnyTag | Tags

ANY = AnyTag()
NO_TAG = Tags()


def tag(etag: str) -> Tags:
    """The condition that names exactly the entity tag ``etag`` (without quotes)."""
    return Tags((etag,))


def matches_strongly(condition: AnyTag | Tags, etag: str) -> bool:
    """Whether an existing object's tag satisfies If-Match; weak tags in the condition never match (RFC 9110, section
    13.1.1).
    """
    return isinstance(condition, AnyTag) or etag in condition.strong


def matches_weakly(condition: AnyTag | Tags, etag: str) -> bool:
    """Whether an existing object's tag is one that If-None-Match names (RFC 9110, section 13.1.2)."""
    return isinstance(condition, AnyTag) or etag in condition.strong or etag in condition.weak
