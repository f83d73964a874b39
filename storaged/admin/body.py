"""Bodies of admin requests, and helpers that all handlers of the admin API share."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from aiohttp import web

from storaged.admin.listener import peer_of
from storaged.admin.ports import Services
from storaged.cluster.audit.trail import audited
from storaged.errors import InvalidArgument, OperatorError


class NotHere(OperatorError):
    """This node does not offer the call: it belongs to a gateway, or to a storage node."""

    code = "NOT_HERE"
    status = 404
    hint = "Ask the gateway: name its directory, or the trial cluster's, with --dir."


async def texts_of(request: web.Request, *names: str) -> dict[str, str]:
    """The request's JSON object, whose values are texts; fields beyond ``names`` are refused. Raises InvalidArgument
    with the reason.
    """
    try:
        document = json.loads(await request.read())
    except ValueError:
        raise InvalidArgument("the body is not JSON") from None
    if not isinstance(document, dict) or not all(isinstance(value, str) for value in document.values()):
        raise InvalidArgument("the body is an object whose values are texts")
    if unknown := sorted(set(document) - set(names)):
        raise InvalidArgument(f"there is no field {unknown[0]!r}; there are: {', '.join(names)}")
    return document


def recorded(
    services: Services, request: web.Request, kind: str, target: str, **fields: str
) -> contextlib.AbstractAsyncContextManager[dict[str, Any]]:
    """Audits an action: the intent is on disk before the block runs, the outcome after it.

    Raises AuditUnwritable before the block runs.
    """
    if services.trail is None:
        return contextlib.nullcontext({})
    return audited(services.trail, kind, actor=_actor(request), target=target, **fields)


def _actor(request: web.Request) -> str:
    """The caller, as the kernel names it. Raises OSError when the connection has gone."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the connection has gone")
    return peer_of(transport.get_extra_info("socket")).actor
