"""Committing a new version to its register: the condition is judged on the record that the accepted ballot's own
prepare brought.

A change whose accept was refused must not simply be proposed again: between the two the collector may have judged the
new fragments to be orphans
(it kills every earlier promise first). So the second run of an update raises, the fragments are seen to exist and their
age renewed, and only then
is the change proposed anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from storaged.errors import SlowDown
from storaged.meta.names import Change, RegisterName, Value
from storaged.meta.ports import Outcome, SmallCopies
from storaged.objects.background import cancel_all
from storaged.objects.code.versions import BucketKeys, KeyNeeded
from storaged.objects.plane import ObjectPlane

ATTEMPTS_MAX = 12
BACKOFF_FIRST_S = 0.01
BACKOFF_MAX_S = 1.0


class ProposedAgain(Exception):
    """The register asked for the update a second time: its accept was refused, or another proposer came first."""


async def commit(
    plane: ObjectPlane,
    keys: BucketKeys,
    name: RegisterName,
    update: Callable[[Value | None], Change | None],
    *,
    ready: Callable[[], Coroutine[Any, Any, None]] | None = None,
    still_there: Callable[[], Awaitable[None]] | None = None,
    small: SmallCopies | None = None,
) -> Outcome:
    """``registers.change`` of a version's data. ``ready``: the barrier, run beside the first prepare; its exceptions
    are raised here. ``still_there``: checked
    before every further proposal. Raises what ``update`` raises, and SlowDown, which clients try again, when others
    change the key all the time."""
    barrier = asyncio.ensure_future(ready()) if ready is not None else None
    try:
        for attempt in range(ATTEMPTS_MAX):
            once = _Once(update) if still_there is not None else update
            try:
                outcome = await plane.registers.change(name, once, small=small, ready=barrier)
            except KeyNeeded as needed:
                await keys.load(needed.version)
                continue
            except ProposedAgain:
                await asyncio.sleep(_backoff_s(plane, attempt))
            else:
                if barrier is not None:
                    await barrier
                return outcome
            if barrier is not None:
                await barrier
            if still_there is not None:
                await still_there()
    finally:
        if barrier is not None:
            await cancel_all([barrier])
    raise SlowDown("Others change this key all the time; it was not written. Please reduce your request rate.")


class _Once:
    """An update that may run once."""

    def __init__(self, update: Callable[[Value | None], Change | None]) -> None:
        self._update = update
        self._ran = False

    def __call__(self, value: Value | None) -> Change | None:
        if self._ran:
            raise ProposedAgain
        change = self._update(value)
        self._ran = True
        return change


def _backoff_s(plane: ObjectPlane, attempt: int) -> float:
    """Exponential with full jitter: two gateways that duel must not meet again."""
    ceiling_s: float = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**attempt)
    return ceiling_s * plane.entropy(1)[0] / 255
