"""What the events of a change say about its request."""

from __future__ import annotations

from storaged.objects.pending_events import Origin
from storaged.s3.request import Request


def origin_of(request: Request, event: str) -> Origin | None:
    """``event``: as ``Origin.name``. None: the bucket sends no events."""
    if request.bucket_record.plain:
        return None
    who = request.who
    principal = who.identity.id if who.identity is not None else who.user_id
    return Origin(event, principal if who.access_key else "", request.remote, request.id)
