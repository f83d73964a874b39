"""The lifecycle of a bucket, for the operator."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from storaged.objects.configuration.lifecycle import LIFECYCLE
from storaged.objects.lifecycle.index import FORMAT, LifecycleState, every_due, read_state
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord

ROWS_COUNTED_MAX = 1000


def state_document(state: LifecycleState | None) -> dict[str, Any]:
    """How far lifecycle is in a bucket, as JSON. ``walked_ms`` null: the walk is under way, or has not begun."""
    found = state or LifecycleState(FORMAT, b"", 0)
    return {
        "walk_began_ms": found.began_ms or None,
        "walked_ms": found.walked_ms or None,
        "objects_walked": found.objects,
        **{name: getattr(found, name) for name in ("expired", "noncurrent", "markers", "early", "locked")},
    }


async def describe(plane: ObjectPlane, bucket: BucketRecord) -> dict[str, Any]:
    """``waiting``: how many keys the index has, by the time when they have to be looked at (ms since 1970), of its
    first ROWS_COUNTED_MAX rows; ``all_counted``: it has no more. Raises ServiceUnavailable.
    """
    found, day_ms = plane.configurations.of(bucket).get(LIFECYCLE), plane.limits.lifecycle_day_ms
    waiting: dict[int, int] = {}
    rows = 0
    async for row in every_due(plane, bucket):
        rows += 1
        if rows > ROWS_COUNTED_MAX:
            break
        waiting[row.day] = waiting.get(row.day, 0) + len(row.keys)
    return {
        "bucket": bucket.name,
        "rules": [structs.asdict(rule) | {"filter": structs.asdict(rule.filter)} for rule in found.rules]
        if found is not None
        else [],
        **state_document(await read_state(plane, bucket)),
        "waiting": [{"at_ms": day * day_ms, "keys": count} for day, count in sorted(waiting.items())],
        "all_counted": rows <= ROWS_COUNTED_MAX,
    }
