"""A client of the ring for tests, from keywords."""

from __future__ import annotations

import asyncio
from typing import Any

from storaged.clock import SystemClock
from storaged.cluster.ports import Layouts
from storaged.meta.client import RingClient, RingHooks, RingSettings
from storaged.meta.ports import Replicas

_SETTINGS = frozenset(RingSettings.__dataclass_fields__)
_HOOKS = frozenset(RingHooks.__dataclass_fields__)


class LoopTime(SystemClock):
    """The machine's clock, but for a loop on virtual time: its deadlines are by the loop's time then."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.monotonic = loop.time  # type: ignore[method-assign, misc]


def ring_client(
    layouts: Layouts, replicas: Replicas, *, kind: type[RingClient] = RingClient, **options: Any
) -> RingClient:
    """``options``: the fields of RingSettings and RingHooks, and the other keywords of a client of this ``kind``."""
    options.setdefault("clock", LoopTime(asyncio.get_running_loop()))
    settings = RingSettings(**{name: options.pop(name) for name in _SETTINGS & options.keys()})
    hooks = RingHooks(**{name: options.pop(name) for name in _HOOKS & options.keys()})
    return kind(layouts, replicas, settings, hooks, **options)
