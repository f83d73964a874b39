"""A client of the ring for tests, from keywords."""

from __future__ import annotations

from typing import Any

from storaged.cluster.ports import Layouts
from storaged.meta.client import RingClient, RingHooks, RingSettings
from storaged.meta.ports import Replicas

_SETTINGS = frozenset(RingSettings.__dataclass_fields__)
_HOOKS = frozenset(RingHooks.__dataclass_fields__)


def ring_client(
    layouts: Layouts, replicas: Replicas, *, kind: type[RingClient] = RingClient, **options: Any
) -> RingClient:
    """``options``: the fields of RingSettings and RingHooks, and the other keywords of a client of this ``kind``."""
    settings = RingSettings(**{name: options.pop(name) for name in _SETTINGS & options.keys()})
    hooks = RingHooks(**{name: options.pop(name) for name in _HOOKS & options.keys()})
    return kind(layouts, replicas, settings, hooks, **options)
