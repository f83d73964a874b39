"""What is stored about a static website: its index and error documents, and its redirections. Pure."""

from __future__ import annotations

from typing import Any, Final

from storaged.objects.configuration.document import Kind
from storaged.wire import Message

REDIRECT_LOCATION: Final = "x-amz-website-redirect-location"
"""Among the stored headers of an object: where a website sends who asks for it."""


def _always(value: Any) -> bool:
    return True


class RoutingRule(Message, frozen=True):
    """Redirects a request whose key begins with ``prefix`` and whose answer would have the status ``error`` (0: before
    the object is looked for). ``host``, ``protocol``: empty: those of the request. ``replace_prefix``,
    ``replace_key``: what the prefix, or the whole key, becomes; None: it stays. ``status``: of the redirection.
    """

    prefix: str = ""
    error: int = 0
    host: str = ""
    protocol: str = ""
    replace_prefix: str | None = None
    replace_key: str | None = None
    status: int = 301
    shown_prefix: bool = False
    """The document named a prefix, even if it is empty."""
    shown_status: bool = False


class Website(Message, frozen=True):
    """``index``: the suffix of keys that end with a slash. ``error``: the key of the error document, or empty.
    ``redirect_host``: all requests go there, and nothing else counts; ``redirect_protocol``: of these, or empty.
    """

    index: str = ""
    error: str = ""
    redirect_host: str = ""
    redirect_protocol: str = ""
    rules: tuple[RoutingRule, ...] = ()


WEBSITE = Kind("website", Website, plain=_always)
