"""What an accept is for, as the room of a disk sees it (``disk_room``). Pure."""

from __future__ import annotations

from storaged.disk_room import Use
from storaged.meta.messages import Accept
from storaged.meta.names import Table, Value, Visibility


def use_of(request: Accept, held: Value | None) -> Use:
    """``held``: what the register holds here. A row that gets no longer takes no room, whatever it is for."""
    value = request.value
    if value.visibility == Visibility.TOMBSTONE or (held is not None and len(value.body) <= len(held.body)):
        return Use.FREEING
    if request.identity or value.visibility == Visibility.HIDDEN or request.name.table == Table.SYSTEM:
        return Use.SETTLING
    return Use.ROWS
